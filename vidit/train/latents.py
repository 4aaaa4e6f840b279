"""Encoding a small dataset once, before the first step (`data.cache_latents`).

The VAE is frozen and the crop is fixed, so a clip's latent never changes; a run of many epochs then pays the
encoder once. Raw latents are kept in parts, RUN/latents/clips-XXXXXXXX.safetensors, named by the first clip and
each under a key of everything it depends on: a start that is cut short keeps the parts it wrote, and the next
one fills the gaps. The ranks of a run deal out what is missing, and meet when all of it is there. Captions are
read anew at each start.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from parallel.exchange import any_rank, exchange, from_first, num_ranks, own_rank, together
from vidit.config import RunConfig
from vidit.data.captions import CaptionError, clean_caption
from vidit.data.catalog import Catalog, Dropped
from vidit.data.limits import ClipError
from vidit.data.loader import LatentStore, MicroBatches, read_ahead
from vidit.data.shards import ClipRef, read_sidecar
from vidit.train.fingerprint import digest
from vidit.train.step import to_pixels
from vidit.train.stop import StoppedError
from vidit.vae.autoencoder import CausalVae
from vidit.vae.coding import encode_clip
from vidit.whole_file import write_whole

ENCODE_BATCH = 16
PART_CLIPS = 256
PARTS_TOLD = 8  # parts between two lines for the person at the terminal
Say = Callable[[str], None]
Check = Callable[[], None]


@dataclass(frozen=True)
class Part:
    """Neighbouring clips, encoded: those that decode, their latents (n, C, T, H, W), the others with the reason.

    `latents` is None where no clip decodes.
    """

    keys: list[str]
    latents: Tensor | None
    failed: Dropped

    @property
    def num_clips(self) -> int:
        return len(self.keys) + len(self.failed)


class LatentCache:
    """The parts of one run's clips. Whatever asks for another VAE, other clips or another cut finds none."""

    def __init__(self, config: RunConfig, refs: Sequence[ClipRef], vae: CausalVae, device: torch.device, folder: Path):
        self.config, self.refs, self.vae, self.device, self.folder = config, refs, vae, device, folder
        d = config.data
        facts = hashlib.sha256(repr((d.num_frames, d.height, d.width, d.fps, vae.dtype)).encode())
        for tensor in vae.state_dict().values():
            facts.update(tensor.cpu().numpy().tobytes())
        self._facts = facts.hexdigest()

    def load(self, say: Say, check: Check) -> tuple[list[ClipRef], LatentStore, Dropped]:
        """(clips that decode, their latents and captions, the others with the reason), encoding what is missing.

        `check` may raise StoppedError between two batches, on any rank by itself: what is encoded by then is kept.
        """
        missing = [range(*piece) for piece in from_first(self._missing)]
        if missing:
            say(f"encoding {sum(map(len, missing))} of {len(self.refs)} clips once")
            stopped = False
            with together():
                try:
                    self._encode(missing[own_rank() :: num_ranks()], say, check)
                except StoppedError:
                    stopped = True
            if any_rank(stopped):
                raise StoppedError
        with together():
            parts = [part for part in self._walk() if isinstance(part, Part)]
            if (found := sum(part.num_clips for part in parts)) != len(self.refs):
                raise RuntimeError(
                    f"{found} of {len(self.refs)} encoded clips can be read in {self.folder}: what another rank has "
                    "written is not there yet, or damaged; start again, or delete that folder"
                )
        whole = joined(parts)
        if whole.latents is None:
            key, reason = whole.failed[0]
            raise ValueError(f"none of {len(self.refs)} clips decodes; the first: {key}: {reason}")
        captions, failed = self._captions(whole.keys)
        chosen = [number for number, key in enumerate(whole.keys) if key in captions]
        kept = [ref for ref in self.refs if ref.key in captions]
        latents = whole.latents if len(chosen) == len(whole.keys) else whole.latents[chosen]
        return kept, LatentStore(latents, list(captions.values())), whole.failed + failed

    def _missing(self) -> list[tuple[int, int]]:
        """First and last of each run of clips of which no part is there; one rank says it for all."""
        return [(piece.start, piece.stop) for piece in self._walk() if isinstance(piece, range)]

    def _walk(self) -> Iterator[Part | range]:
        """The parts that are there, in order, and between them the clips of none, at most PART_CLIPS at a time."""
        starts = [int(path.stem.removeprefix("clips-")) for path in self.folder.glob("clips-*.safetensors")]
        there = {start: part for start in sorted(starts) if (part := self._read(start)) is not None}
        place = 0
        while place < len(self.refs):
            if place in there:
                yield there[place]
                place += there[place].num_clips
            else:
                end = min([start for start in there if start > place] + [len(self.refs), place + PART_CLIPS])
                yield range(place, end)
                place = end

    def _captions(self, keys: Sequence[str]) -> tuple[dict[str, str], Dropped]:
        """Key -> caption as the loader would give it, and the keys of those that have none on any rank."""
        captions: dict[str, str] = {}
        failed: Dropped = []
        by_key = {ref.key: ref for ref in self.refs}
        for ref in map(by_key.__getitem__, keys):
            try:
                text = read_sidecar(ref)["caption"]
                captions[ref.key] = clean_caption(text, allow_empty=ref.allow_empty_caption)[0]
            except (CaptionError, ClipError) as error:
                failed.append((ref.key, str(error)))
        everywhere = {key: reason for told in exchange(failed) for key, reason in told}
        return {key: text for key, text in captions.items() if key not in everywhere}, list(everywhere.items())

    def _encode(self, pieces: Sequence[range], say: Say, check: Check) -> None:
        """Write a part for each piece; one that is cut short by `check` holds the clips before."""
        self.folder.mkdir(parents=True, exist_ok=True)
        batches: list[Part] = []
        numbers = [number for piece in pieces for number in piece]
        encoded = encode(self.config, [self.refs[n] for n in numbers], self.vae, self.device, check, map(len, pieces))
        for told, piece in enumerate(pieces, start=1):
            try:
                while sum(one.num_clips for one in batches) < len(piece):
                    batches.append(next(encoded))
            finally:
                if batches:
                    self._write(piece.start, batches)
            batches = []
            if told % PARTS_TOLD == 0:
                say(f"encoded {numbers.index(piece.stop - 1) + 1} of {len(numbers)} clips")

    def _path(self, first: int) -> Path:
        return self.folder / f"clips-{first:08d}.safetensors"

    def _key(self, first: int, num_clips: int) -> str:
        return f"{self._facts}/{digest(self.refs[first : first + num_clips])}"

    def _write(self, first: int, batches: list[Part]) -> None:
        part = joined(batches)
        metadata = {
            "key": self._key(first, part.num_clips), "keys": json.dumps(part.keys), "failed": json.dumps(part.failed)
        }  # fmt: skip
        tensors = {} if part.latents is None else {"latents": part.latents}
        write_whole(self._path(first), save(tensors, metadata=metadata))

    def _read(self, first: int) -> Part | None:
        """The part that starts at a clip; None where it is missing, damaged or of something else."""
        try:
            with safe_open(self._path(first), framework="pt") as file:
                metadata = file.metadata()
                failed = [(key, reason) for key, reason in json.loads(metadata["failed"])]
                keys = json.loads(metadata["keys"])
                if not keys + failed or metadata["key"] != self._key(first, len(keys) + len(failed)):
                    return None
                return Part(keys, file.get_tensor("latents") if keys else None, failed)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None


def joined(parts: Sequence[Part]) -> Part:
    """The parts as one."""
    latents = [part.latents for part in parts if part.latents is not None]
    keys, failed = [key for part in parts for key in part.keys], [one for part in parts for one in part.failed]
    return Part(keys, torch.cat(latents) if latents else None, failed)


@torch.no_grad()
def encode(
    config: RunConfig,
    refs: Sequence[ClipRef],
    vae: CausalVae,
    device: torch.device,
    check: Check,
    sizes: Iterable[int],
) -> Iterator[Part]:
    """Clips in batches of ENCODE_BATCH; none reaches over the end of a piece, whose numbers of clips are `sizes`.

    `check` may raise before each.
    """
    decoded = _Decoded(MicroBatches(config, Catalog.plain(refs), None, 1))
    items = read_ahead(decoded, range(len(refs)), config.data.num_workers, 2 * ENCODE_BATCH)
    ends = list(itertools.accumulate(sizes, initial=0))
    for start, stop in (
        (at, min(at + ENCODE_BATCH, end))
        for first, end in itertools.pairwise(ends)
        for at in range(first, end, ENCODE_BATCH)
    ):
        pixels: list[Tensor] = []
        keys: list[str] = []
        failed: Dropped = []
        for ref in refs[start:stop]:
            check()
            found, reason = next(items)
            if found is None:
                failed.append((ref.key, reason))
            else:
                pixels.append(found)
                keys.append(ref.key)
        check()
        latents = encode_clip(vae, to_pixels(torch.stack(pixels), device), config.vae).cpu() if pixels else None
        yield Part(keys, latents, failed)


class _Decoded(TorchDataset[tuple[Tensor | None, str]]):
    """Clip number -> (pixels, ""), or (None, reason)."""

    def __init__(self, clips: MicroBatches):
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips.refs)

    def __getitem__(self, index: int) -> tuple[Tensor | None, str]:
        try:
            return self.clips.decode(self.clips.refs[index])[0], ""
        except (ClipError, CaptionError) as error:
            return None, str(error)
