"""Safetensors files that hold parts of tensors, written in one pass.

The format is that of torch.distributed.checkpoint's HuggingFace storage (`saved_offsets` of every tensor in the
header's metadata), so that either reads the other's files. Its writer makes the file in memory a second time, under
the interpreter's lock, and does not hash; beside a training thread that matters. Here the data part is one host
buffer, laid out as in the file: pieces of it are hashed and written without the lock.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from parallel.dtensor import Box

PIECE_BYTES = 1 << 24
SHARDING = "DCP_SHARDING_INFO"
OFFSETS = "saved_offsets"
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


class Part(NamedTuple):
    """One tensor of a file, or a part of one."""

    name: str
    dtype: torch.dtype
    box: Box

    @property
    def num_bytes(self) -> int:
        return self.box.numel * self.dtype.itemsize


def in_file_order(parts: Iterable[Part]) -> list[Part]:
    """Widest numbers first, so that every tensor is aligned to its own."""
    return sorted(parts, key=lambda part: (-part.dtype.itemsize, part.name))


def header(parts: Sequence[Part]) -> bytes:
    """What stands before the data of these parts, in this order."""
    entries: dict[str, Any] = {}
    end = 0
    for part in parts:
        start, end = end, end + part.num_bytes
        if part.dtype not in DTYPES:
            raise ValueError(f"{part.name} is {part.dtype}, which safetensors cannot hold; keep it in a floating dtype")
        entries[part.name] = {"dtype": DTYPES[part.dtype], "shape": part.box.sizes, "data_offsets": (start, end)}
    offsets = {part.name: {OFFSETS: part.box.offsets} for part in parts}
    about = {"format": "pt", "DCP_VERSION": "1.0", SHARDING: json.dumps(offsets)}
    text = json.dumps({"__metadata__": about, **entries}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def views(buffer: Tensor, parts: Sequence[Part]) -> Iterator[tuple[Part, Tensor]]:
    """Each part as a tensor in a buffer of bytes that is laid out as the file."""
    start = 0
    for part in parts:
        flat = buffer[start : start + part.num_bytes]
        yield part, flat.view(part.dtype).view(part.box.sizes)
        start += part.num_bytes


def content(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous host tensor, without a copy."""
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def write(path: Path, start: bytes, data: Iterable[memoryview]) -> dict[str, Any]:
    """Write and sync a file; its size and SHA-256, as a manifest holds them. OSError where the disk does not take it.

    The hash is that of what should be there: a disk that wrote something else is found out by the next reader.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for whole in itertools.chain((memoryview(start),), data):
            for place in range(0, len(whole), PIECE_BYTES):
                piece = whole[place : place + PIECE_BYTES]
                digest.update(piece)
                file.write(piece)
            size += len(whole)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def boxes(path: Path) -> dict[str, Box]:
    """What a file holds of each tensor. Raises OSError or SafetensorError."""
    with safe_open(str(path), framework="pt") as file:
        about = (file.metadata() or {}).get(SHARDING)
        offsets = json.loads(about) if about else {}
        found = {}
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            sizes = tuple(file.get_slice(name).get_shape())
            start = tuple(offsets[name][OFFSETS]) if name in offsets else (0,) * len(sizes)
            found[name] = Box(start, sizes)
    return found


def read(path: Path, wanted: Iterable[tuple[str, Box, Box, Tensor]]) -> None:
    """Copy parts of a file's tensors: (name, its box in the file, the part to copy, where to). Only they are read."""
    with safe_open(str(path), framework="pt") as file:
        for name, stored, part, target in wanted:
            if stored.sizes:
                target.copy_(file.get_slice(name)[part.within(stored)])
            else:
                target.copy_(file.get_tensor(name))


def total_bytes(parts: Iterable[Part]) -> int:
    return sum(part.num_bytes for part in parts)
