"""The loaders that benchmarks/loader.py compares, each from the same video files to batches of the same pixels.

A system is prepared once, in its own storage format, and then gives one shuffled epoch at a time: uint8 tensors
(micro-batch, T, H, W, 3) of the middle of each clip, made by ``decode_clip`` in worker processes, with the captions
read as well. webdataset reads vidit's own tars. LitData is no dependency of vidit: without it there is no such system.
"""

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from vidit.config import Data, RunConfig, Train
from vidit.data.catalog import Catalog
from vidit.data.loader import Batch, MicroBatches, batches
from vidit.data.shard_writer import ShardWriter
from vidit.data.shards import read_index
from vidit.data.video import decode_clip

PREFETCH = 4
SHUFFLE_BUFFER = 100
Clip = tuple[str, Path]
"""A key and the video file to store under it."""


@dataclass(frozen=True)
class Shape:
    """What every system delivers."""

    num_frames: int = 17
    side: int = 128
    micro_batch: int = 8

    def decode(self, video: bytes) -> Tensor:
        """The middle of a clip: (T, H, W, 3) uint8."""
        return decode_clip(video, num_frames=self.num_frames, fps=0, height=self.side, width=self.side)


Epoch = Callable[[int, int], Iterator[Tensor]]
"""(number of the epoch, workers) -> its batches."""


def vidit_batches(folder: Path, shape: Shape, workers: int, start: int, end: int) -> Iterator[Batch]:
    """Micro-batches start to end - 1 of the data set in a folder, as a run reads them."""
    config = RunConfig(
        name="loader",
        data=Data(
            train=str(folder), num_frames=shape.num_frames, height=shape.side, width=shape.side, num_workers=workers,
            prefetch=PREFETCH,
        ),
        train=Train(global_batch=shape.micro_batch, micro_batch=shape.micro_batch),
    )  # fmt: skip
    dataset = MicroBatches(config, Catalog.plain(read_index(folder)), tokenizer=None, images_per_row=0)
    return batches(dataset, start, end)


def vidit_system(clips: Sequence[Clip], folder: Path, shape: Shape, clips_per_shard: int) -> Epoch:
    """Tars, an index with CRCs, and a keyed order of the whole data set."""
    with ShardWriter(folder, clips_per_shard) as writer:
        for key, path in clips:
            writer.add(key, path.read_bytes(), {"caption": key})
    num_batches = len(clips) // shape.micro_batch

    def epoch(number: int, workers: int) -> Iterator[Tensor]:
        for batch in vidit_batches(folder, shape, workers, number * num_batches, (number + 1) * num_batches):
            assert batch.clips.pixels is not None
            assert not batch.skipped, batch.skipped
            yield batch.clips.pixels

    return epoch


def webdataset_system(tars: Sequence[Path], shape: Shape) -> Epoch:
    """The pipeline of webdataset's own guide: shards in random order, a shuffle buffer, decoding, batches."""
    import webdataset
    from torch.utils.data import DataLoader

    def epoch(number: int, workers: int) -> Iterator[Tensor]:
        shards = webdataset.WebDataset([str(path) for path in tars], shardshuffle=len(tars), seed=number)
        dataset = shards.shuffle(SHUFFLE_BUFFER).map(partial(_from_tar, shape)).batched(shape.micro_batch)
        for pixels, _ in DataLoader(dataset, batch_size=None, num_workers=workers, prefetch_factor=PREFETCH):
            yield pixels

    return epoch


def litdata_system(clips: Sequence[Clip], folder: Path, shape: Shape, clips_per_shard: int) -> Epoch | None:
    """Optimised chunks of the same bytes in LitData's own streaming data set and loader; None if not installed."""
    if find_spec("litdata") is None:
        return None
    warnings.filterwarnings("ignore", module="requests")
    from litdata import StreamingDataLoader, StreamingDataset, optimize  # type: ignore[import-not-found,unused-ignore]

    optimize(
        fn=_record, inputs=list(clips), output_dir=str(folder), chunk_size=clips_per_shard, num_workers=1, verbose=False
    )

    def epoch(number: int, workers: int) -> Iterator[Tensor]:
        dataset = StreamingDataset(str(folder), shuffle=True, seed=number, transform=partial(_from_chunk, shape))
        loader = StreamingDataLoader(
            dataset, batch_size=shape.micro_batch, num_workers=workers, prefetch_factor=PREFETCH
        )
        for pixels, _ in loader:
            yield pixels

    return epoch


# At the top of the module, since each worker process looks them up by name.
def _from_tar(shape: Shape, sample: dict[str, Any]) -> tuple[Tensor, str]:
    return shape.decode(sample["mp4"]), json.loads(sample["json"])["caption"]


def _record(clip: Clip) -> dict[str, Any]:
    key, path = clip
    return {"video": path.read_bytes(), "caption": key}


def _from_chunk(shape: Shape, record: dict[str, Any]) -> tuple[Tensor, str]:
    return shape.decode(record["video"]), record["caption"]
