"""Micro-batches of clips: micro-batch number -> batch, in worker processes, in order.

Item i of the dataset is a whole micro-batch, a pure function of (config, clips, i, rank, world), so a resume starts
the sampler at any i. A clip that is damaged, does not decode or has no caption is replaced by a keyed other
one of its bucket and data set, counted and named; the caller stops the run when the count passes `data.max_skipped`.
Videos, and latents that `vidit encode` made of others, may share a micro-batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from vidit import keys
from vidit.config import Bucket, Data, RunConfig
from vidit.data.captions import CaptionError, clean_caption
from vidit.data.catalog import Catalog
from vidit.data.encoded import (
    CaptionText,
    EncodedClip,
    Encoding,
    StoredText,
    is_encoded,
    parse_clip,
    read_encoding,
    stored_text,
)
from vidit.data.limits import ClipError
from vidit.data.order import MAX_SUBSTITUTES, ClipOrder
from vidit.data.packed import PackedRow
from vidit.data.rows import Clips, Row, clips_of, named
from vidit.data.schedule import Stream
from vidit.data.shards import ClipRef, expect_clips, read_clip
from vidit.data.storage import Folder
from vidit.data.stream_plan import Mark
from vidit.data.video import decode_clip
from vidit.data.workers import signals_held, start_worker
from vidit.text.encoder import CaptionTokenizer, TextTokens

Size = tuple[int, int, int]
"""Frames, height and width in pixels."""
Skip = tuple[str, str]
"""The key of a clip that cannot be used, and the reason."""
Item = TypeVar("Item")


@dataclass
class Batch:
    """One micro-batch. `rows` number its rows in the whole run; the noise and timesteps are keyed by them.

    The first rows are clips. Each of the others holds T images, `images` in row order, T to a row. `tokens`
    are the captions of the clips and then of the images, `text` what is stored of some of them. `round_rows` are the
    rows that all data ranks work on at the same time, `step_rows` how many rows the whole step has: its loss is the
    mean over them. `size` is that of its clips in frames and pixels, None for the run's own.
    """

    rows: list[int]
    clips: Clips
    images: Clips | None
    tokens: TextTokens | None
    round_rows: Sequence[int]
    step_rows: int
    skipped: list[Skip] = field(default_factory=list)
    text: StoredText | None = None
    size: Size | None = None
    mark: Mark | None = None
    """Of a stream: where its reader stands after this batch."""
    runs: tuple[tuple[Size, Clips], ...] = ()
    """Of a packed row: its clips by shape, in the order of its rows; `clips` then names them alone."""

    @property
    def keys(self) -> list[str]:
        return self.clips.keys + (self.images.keys if self.images else [])

    @property
    def shapes(self) -> list[tuple[int, Size | None]]:
        """(rows, their size)."""
        return [(len(clips.keys), size) for size, clips in self.runs] or [(len(self.rows), self.size)]


class MicroBatches(TorchDataset[Batch]):
    """Micro-batch number -> Batch, for one rank. Picklable, for worker processes."""

    def __init__(
        self,
        config: RunConfig,
        catalog: Catalog,
        tokenizer: CaptionTokenizer | None,
        images_per_row: int,
        rank: int = 0,
        world: int = 1,
        device: str = "cuda",
    ):
        """`device` is where data.decoder=nvdec decodes."""
        self.device = device
        self.config, self.data, self.seed = config, config.data, config.train.seed
        micro = config.train.micro_batch
        assert self.data.image_rows < micro, (
            f"data.image_rows={self.data.image_rows} leaves no row for a clip in train.micro_batch={micro}"
        )
        self.captioned = config.train.task != "vae"
        self.max_tokens = config.text.max_tokens if config.text.kind != "bytes" else 0  # of text that may be stored
        self.second_tokens = config.text.second.max_tokens
        self._encodings: dict[Folder, Encoding | None] = {}
        self.refs, self.catalog, self.schedule = catalog.refs, catalog, catalog.schedule(config)
        self.tokenizer, self.images_per_row = tokenizer, images_per_row
        self.rank, self.world = rank, world

    def __getitem__(self, index: int) -> Batch:
        of = self.schedule.of_rank(index, self.rank, self.world)
        asked, skipped = list(of.asked(self.data.image_rows, self.images_per_row)), list[Skip]()
        read = [self._clips(*part, skipped) for part in asked]
        found, texts = [clips for clips, _ in read], [text for _, own in read for text in own]
        tokens = None if self.tokenizer is None else self.tokenizer([caption for caption, _ in texts])
        kept = [(place, text) for place, (_, text) in enumerate(texts) if text is not None]
        text = stored_text(kept, self.max_tokens, self.second_tokens) if self.max_tokens else None
        shapes = [self.data.shapes[part.bucket] for part in asked]
        sizes = [(shape.num_frames, shape.height, shape.width) for shape in shapes]
        rows = list(of.rows)
        if isinstance(of, PackedRow):
            names, runs = named(found), tuple(zip(sizes, found, strict=True))
            return Batch(rows, names, None, tokens, of.round_rows, of.step_rows, skipped, text, runs=runs)
        clips, *images = found
        beside = images[0] if images else None
        return Batch(rows, clips, beside, tokens, of.round_rows, of.step_rows, skipped, text, sizes[0])

    def _order(self, stream: str, bucket: int) -> ClipOrder:
        return self.catalog.order(self.seed, stream, bucket)

    def _clips(
        self, stream: Stream, bucket: int, places: range, skipped: list[Skip]
    ) -> tuple[Clips, list[tuple[str, CaptionText | None]]]:
        """What stands at places of a stream of a bucket, and of each its caption and what is stored of that.

        Adds what it replaces to `skipped`.
        """
        expect_clips(self.refs[self._order(stream, bucket).at(place)] for place in places)
        rows = [self._read(stream, bucket, place, skipped) for place in places]
        purpose = f"caption_dropout/{self.catalog.stream(stream, bucket)}"
        drop = keys.uniform(self.seed, purpose, list(places)) < self.data.caption_dropout
        captions = ["" if no else row.caption for row, no in zip(rows, drop.tolist(), strict=True)]
        return clips_of(rows), [(text, row.text(text)) for row, text in zip(rows, captions, strict=True)]

    def _read(self, stream: str, bucket: int, place: int, skipped: list[Skip]) -> Row:
        """The clip at a place, or one that replaces it, after an entry in `skipped`."""
        order = self._order(stream, bucket)
        index, name = order.at(place), f"{order.stream}/{place}"
        for attempt in range(MAX_SUBSTITUTES):
            ref, told = self.refs[index], self.catalog.name(index)
            image, shape = stream == "images", self.data.shapes[bucket]
            try:
                if is_encoded(ref):
                    return self._stored(ref, told, image, shape)
                pixels, caption = self.decode(ref, name, image, shape)
                return Row(told, caption, shape.rate(self.data.fps or ref.fps), pixels, None, None)
            except (ClipError, CaptionError) as error:
                skipped.append((told, str(error)))
                index = order.instead(place, attempt)
        raise RuntimeError(
            f"{MAX_SUBSTITUTES} clips in a row cannot be used, the last: {skipped[-1][0]}: {skipped[-1][1]}; "
            "check the dataset with `vidit pack`"
        )

    def _stored(self, ref: ClipRef, told: str, image: bool, shape: Bucket) -> Row:
        """A clip that is latents. ClipError, CaptionError."""
        content, caption, _ = read_clip(ref)
        text, _ = clean_caption(caption, allow_empty=ref.allow_empty_caption)
        folder, vae = ref.shard_path.parent, self.config.vae
        if folder not in self._encodings:
            self._encodings[folder] = read_encoding(folder)
        encoding = self._encodings[folder]
        frames = 1 + (shape.num_frames - 1) // vae.temporal_stride
        size = shape.height // vae.spatial_stride, shape.width // vae.spatial_stride
        clip = parse_clip(content, (vae.latent_channels, frames, *size))
        if image:  # The VAE codes the first frame alone, so a clip's first latent frame is that frame as an image.
            clip = EncodedClip(clip.mean[:, :1], clip.text)
        return Row(told, text, shape.rate(ref.fps), None, clip, encoding.empty if encoding else None)

    def decode(
        self, ref: ClipRef, name: str = "", image: bool = False, shape: Bucket | None = None
    ) -> tuple[Tensor, str]:
        """Pixels (T, H, W, 3) uint8 and the caption of one clip; `name` keys its crop. ClipError, CaptionError."""
        pixels, text, _ = self.decode_whole(ref, name, image, shape)
        return pixels, text

    def decode_whole(
        self, ref: ClipRef, name: str = "", image: bool = False, shape: Bucket | None = None
    ) -> tuple[Tensor, str, dict[str, Any]]:
        """As `decode`, and the sidecar."""
        video, caption, sidecar = read_clip(ref)
        text, _ = clean_caption(caption, allow_empty=ref.allow_empty_caption or not self.captioned)
        pixels = pixels_of(video, self.data, self.seed, name, image, shape or self.data.shapes[0], self.device)
        return pixels, text, sidecar


def pixels_of(video: bytes, d: Data, seed: int, name: str, image: bool, shape: Bucket, device: str) -> Tensor:
    """A video cut to a shape, (T, H, W, 3) uint8; of an image T = 1. `name` keys its crop and its flip. ClipError."""
    start, y, x = (keys.key(seed, "crop", name, i) / 2.0**63 if d.random_crop else 0.5 for i in range(3))
    pixels_THW3 = decode_clip(
        video,
        # Where the crop is fixed, an image is the frame whose latent a cached clip holds: its window's first.
        num_frames=1 if image and d.random_crop else shape.num_frames,
        first_only=image,
        fps=d.fps,
        height=shape.height,
        width=shape.width,
        start_fraction=start,
        crop_fraction=(y, x),
        decoder=d.decoder,
        device=device,
    )
    mirrored = d.horizontal_flip and keys.key(seed, "flip", name) / 2.0**63 < d.horizontal_flip
    return pixels_THW3.flip(2) if mirrored else pixels_THW3


def batches(dataset: MicroBatches, start: int, end: int) -> Iterator[Batch]:
    """Micro-batches start, start+1, ... end-1, read ahead in `data.num_workers` processes."""
    return read_ahead(dataset, range(start, end), dataset.data.num_workers, dataset.data.prefetch)


def read_ahead(dataset: TorchDataset[Item], indices: range, workers: int, prefetch: int) -> Iterator[Item]:
    """`dataset[i]` for each index, in order, by worker processes (0: this one); an error keeps its type and text."""
    if workers == 0:
        for index in indices:
            yield dataset[index]
        return
    loader = DataLoader(
        _Guarded(dataset),
        batch_size=None,
        sampler=indices,
        num_workers=workers,
        prefetch_factor=prefetch,
        worker_init_fn=start_worker,
        multiprocessing_context="forkserver",
    )
    with signals_held():
        items = iter(loader)
    for item in items:
        if isinstance(item, Exception):
            raise item
        yield item


class _Guarded(TorchDataset[Any]):
    """Hands a foreseen error over as an item: DataLoader would put the worker's traceback into its message."""

    def __init__(self, dataset: TorchDataset[Any]):
        self.dataset = dataset

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except (ValueError, RuntimeError, OSError) as error:
            return error
