"""Damaged and hostile data sets: what is mutated, how, and what may come of it.

A case is a target (a file of a data set, or a video) and a list of mutations, drawn by hypothesis. The reader is given
the result as it would be given any data set. It may deliver clips, skip some with a reason (ClipError,
CaptionError), or refuse the set with a clear error (ShardError). Anything else is a fault of the reader. A clip whose
index has a CRC must in addition be delivered as it was packed, or not at all.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from hypothesis import strategies as st

from vidit.data.captions import CaptionError, clean_caption
from vidit.data.encode import encode_mp4
from vidit.data.limits import ClipError, ShardError
from vidit.data.shard_writer import ShardWriter
from vidit.data.shards import read_clip, read_index
from vidit.data.stream_reader import clips_in
from vidit.data.tar import BLOCK
from vidit.data.video import decode_clip, verify

SHAPE = {"num_frames": 3, "fps": 0.0, "height": 24, "width": 24}
CONTAINERS = {
    "mp4": ("mp4", "libx264"), "mkv": ("matroska", "libx264"), "webm": ("webm", "libvpx"), "avi": ("avi", "mpeg4"),
    "mov": ("mov", "mjpeg"),
}  # fmt: skip
NUMBERS = (0, 1, 2, 7, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 33, (1 << 63) - 1, (1 << 64) - 1)
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 511, 512, 2**31, 2**63, 2**70, 1e308, float("nan"), float("inf"), -0.5, "", "x", "a" * 5000,
    "../../etc/passwd", "pipe:true", "\x00", "\ud800", [], [[]], {}, {"a": 1}, [0] * 1000,
)  # fmt: skip
BOX = [
    b"ftyp", b"moov", b"mvhd", b"trak", b"tkhd", b"edts", b"elst", b"mdhd", b"hdlr", b"stsd", b"avc1", b"avcC",
    b"stts", b"stss", b"stsc", b"stsz", b"stco", b"ctts", b"colr", b"pasp", b"mdat", b"idx1", b"strh", b"strf",
    b"\x1a\x45\xdf\xa3", b"\x1f\x43\xb6\x75", b"\x16\x54\xae\x6b",
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """`target` is one of `Corpus.targets`; each mutation a name of `MUTATIONS` and three numbers or a few bytes."""

    target: str
    mutations: tuple[tuple[str, int, int, int, bytes], ...]


def _flip(data: bytearray, at: int, bit: int, _: int, __: bytes) -> None:
    data[at % len(data)] ^= 1 << bit % 8


def _write(data: bytearray, at: int, _: int, __: int, piece: bytes) -> None:
    at %= len(data)
    data[at : at + len(piece)] = piece


def _insert(data: bytearray, at: int, times: int, _: int, piece: bytes) -> None:
    at %= len(data)
    data[at:at] = piece * (1 + times % 64)


def _cut(data: bytearray, at: int, length: int, _: int, __: bytes) -> None:
    at %= len(data)
    del data[at : at + 1 + length % len(data)]


def _truncate(data: bytearray, at: int, _: int, __: int, ___: bytes) -> None:
    del data[at % len(data) :]


def _repeat(data: bytearray, at: int, length: int, times: int, __: bytes) -> None:
    at %= len(data)
    data[at:at] = data[at : at + 1 + length % 4096] * (1 + times % 8)


def _number(data: bytearray, at: int, which: int, width: int, _: bytes) -> None:
    at, size = at % len(data), 1 << width % 4
    value = NUMBERS[which % len(NUMBERS)] % (1 << 8 * size)
    data[at : at + size] = value.to_bytes(size, "big" if width & 4 else "little")


def _box(data: bytearray, at: int, which: int, width: int, _: bytes) -> None:
    """A number in a box of a container: its size, or one of its first words."""
    places = [found for name in BOX if (found := data.find(name)) >= 4]
    if places:
        place = places[at % len(places)] - 4 + 4 * (at // len(places) % 24)
        _number(data, min(place, len(data) - 1), which, 2 | width & 4, b"")


def _header(data: bytearray, at: int, which: int, field: int, piece: bytes) -> None:
    """A field of a tar header that then has the right checksum."""
    start = at % max(1, len(data) // BLOCK) * BLOCK
    block = data[start : start + BLOCK]
    if len(block) < BLOCK:
        return
    offset, size = ((0, 100), (100, 8), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155))[field % 7]
    number = b"%o" % NUMBERS[which % len(NUMBERS)]
    block[offset : offset + size] = (number if which % 2 else piece)[:size].ljust(size, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    data[start : start + BLOCK] = block


def _field(data: bytearray, at: int, which: int, line: int, _: bytes) -> None:
    """Another value somewhere in a JSON text of one or more lines; nothing where it is none."""
    lines = bytes(data).split(b"\n") if data[:1] == b"{" and data.count(b"\n{") else [bytes(data)]
    place = line % len(lines)
    try:
        whole = json.loads(lines[place])
    except ValueError:
        return
    spots: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for name in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            spots.append((node, name))
            walk(node[name])

    walk(whole)
    if spots:
        node, name = spots[at % len(spots)]
        if which % (len(VALUES) + 1) == len(VALUES):
            del node[name]
        else:
            node[name] = VALUES[which % (len(VALUES) + 1)]
        lines[place] = json.dumps(whole).encode()
        data[:] = b"\n".join(lines)


Mutation = Callable[[bytearray, int, int, int, bytes], None]
MUTATIONS: dict[str, Mutation] = {
    "flip": _flip, "write": _write, "insert": _insert, "cut": _cut, "truncate": _truncate, "repeat": _repeat,
    "number": _number, "box": _box, "header": _header, "field": _field,
}  # fmt: skip
SUITED = {".tar": ("header",) * 4, ".jsonl": ("field",) * 6, ".json": ("field",) * 6}
STREAMED = "streamed.tar"
"""The target that is the bare tar, read as a stream."""
ANY = ("flip", "write", "insert", "cut", "truncate", "repeat", "number")


def mutated(content: bytes, case: Case) -> bytes:
    data = bytearray(content)
    for name, a, b, c, piece in case.mutations:
        if data:
            MUTATIONS[name](data, a, b, c, piece)
    return bytes(data)


def cases(targets: list[str]) -> st.SearchStrategy[Case]:
    """One to four mutations of one target, of the kinds that suit it."""
    number, piece = st.integers(0, 1 << 24), st.binary(min_size=1, max_size=48)

    def of(target: str) -> st.SearchStrategy[Case]:
        suffix = Path(target).suffix
        kinds = ANY + SUITED.get(suffix, ("box",) * 4)
        mutation = st.tuples(st.sampled_from(kinds), number, number, st.integers(0, 255), piece)
        return st.builds(Case, st.just(target), st.lists(mutation, min_size=1, max_size=4).map(tuple))

    return st.sampled_from(targets).flatmap(of)


class Corpus:
    """What is whole: a packed set, a set of bare tars as others write them, and videos of several containers."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.videos = {f"clip.{suffix}": _video(*of) for suffix, of in CONTAINERS.items()}
        self.packed, self.bare = folder / "packed", folder / "bare"
        self.bare.mkdir(parents=True)
        with ShardWriter(self.packed, max_clips_per_shard=3) as writer:
            for i, (name, video) in enumerate(self.videos.items()):
                writer.add(f"clip-{i}", video, {"caption": f"clip {i}"}, name.rpartition(".")[2])
        with tarfile.open(self.bare / "others.tar", "w") as tar:
            for i, (name, video) in enumerate(self.videos.items()):
                for member, content in ((f"a/{i}.{name.rpartition('.')[2]}", video), (f"a/{i}.txt", b"some words")):
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        self.content = {ref.key: read_clip(ref)[:2] for ref in read_index(self.packed)}
        files = [path for part in (self.packed, self.bare) for path in sorted(part.iterdir())]
        self.targets = [*(str(path.relative_to(folder)) for path in files), STREAMED, *self.videos]
        """What a mutation can meet; names of videos alone are videos."""

    def outcome(self, case: Case) -> str:
        """What came of a case: `delivered`, `skipped` or `refused`. Any other error is raised."""
        if case.target in self.videos:
            return self._of_video(mutated(self.videos[case.target], case))
        if case.target == STREAMED:
            tar = self.folder / "streamed.tar"
            tar.write_bytes(mutated((self.bare / "others.tar").read_bytes(), case))
            return self._of_stream(tar)
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            part, file = case.target.split("/")
            copy = Path(shutil.copytree(self.folder / part, Path(name) / part))
            (copy / file).write_bytes(mutated((copy / file).read_bytes(), case))
            return self._of_set(copy)

    def _of_video(self, video: bytes) -> str:
        found = Counter[str]()
        for use in (lambda: verify(video), lambda: _decoded(video)):
            try:
                use()
                found["delivered"] += 1
            except ClipError:
                found["skipped"] += 1
        return "skipped" if found["skipped"] else "delivered"

    def _of_stream(self, tar: Path) -> str:
        """The tar as a run with `data.streaming` reads it: from front to back, without an index."""
        skipped = False
        try:
            for item in clips_in(tar):
                try:
                    clean_caption(item.caption())
                    _decoded(item.video())
                except (ClipError, CaptionError):
                    skipped = True
        except ShardError as error:
            if str(tar) not in str(error):
                raise AssertionError(f"no file is named: {error}") from error
            return "refused"
        return "skipped" if skipped else "delivered"

    def _of_set(self, folder: Path) -> str:
        skipped = False
        try:
            for ref in read_index(folder):
                try:
                    video, caption, _ = read_clip(ref)
                    # An index is trusted once its tar agrees with it, so a changed one may name another caption's CRC.
                    if ref.video_crc32 is not None and ref.key in self.content:
                        assert video == self.content[ref.key][0], f"{ref.key} is not what was packed"
                    clean_caption(caption)
                    _decoded(video)
                except (ClipError, CaptionError):
                    skipped = True
        except ShardError as error:
            if str(folder) not in str(error):
                raise AssertionError(f"no file is named: {error}") from error
            return "refused"
        return "skipped" if skipped else "delivered"


def _decoded(video: bytes) -> None:
    found = decode_clip(video, **SHAPE, timeout_s=10.0)
    assert found.shape == (SHAPE["num_frames"], SHAPE["height"], SHAPE["width"], 3)


def _video(container: str, codec: str) -> bytes:
    """Five frames of noise of 32x24 pixels."""
    frames = np.random.default_rng(0).integers(0, 256, (5, 24, 32, 3), dtype=np.uint8)
    if container == "mp4":
        return encode_mp4(frames, 8)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=8)
        stream.width, stream.height = 32, 24
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for image in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        out.mux(stream.encode(None))
    return buffer.getvalue()
