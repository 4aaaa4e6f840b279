"""Writing a folder that appears when it is whole, and weights into it, one tensor in memory at a time."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from parallel.dtensor import Box
from parallel.shard_file import Part, content, header, in_file_order, write
from vidit.whole_file import full_disk_explained, write_whole

MAX_FILE_BYTES = 5 * 10**9
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Kind(NamedTuple):
    """Shape and dtype of a tensor to be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which is `out` afterwards. ValueError where that holds something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already and not empty; give --out a new folder")
    partial = out.with_name(f".{out.name}.partial")
    with full_disk_explained(out):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            partial.replace(out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def write_tensors(
    folder: Path,
    kinds: Mapping[str, Kind],
    get: Callable[[str], Tensor],
    stem: str = "model",
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Safetensors files named `stem`, several with an index where one would be larger than `max_file_bytes`."""
    parts = [Part(name, kind.dtype, Box((0,) * len(kind.shape), kind.shape)) for name, kind in kinds.items()]
    files = _divided(parts, max_file_bytes, stem)
    for name, own in files.items():
        write(folder / name, header(own), (content(get(part.name).to(part.dtype)) for part in own))
    if len(files) > 1:
        write_whole(folder / f"{stem}.safetensors.index.json", _index(files))


def _divided(parts: Sequence[Part], max_file_bytes: int, stem: str) -> dict[str, list[Part]]:
    """File name -> what it holds: as many in each as fit, in the order of the model, and at least one."""
    groups: list[list[Part]] = [[]]
    size = 0
    for part in parts:
        if groups[-1] and size + part.num_bytes > max_file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += part.num_bytes
    if len(groups) == 1:
        return {f"{stem}.safetensors": in_file_order(groups[0])}
    return {
        f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors": in_file_order(group)
        for number, group in enumerate(groups, start=1)
    }


def _index(files: dict[str, list[Part]]) -> str:
    total = sum(part.num_bytes for parts in files.values() for part in parts)
    places = {part.name: name for name, parts in files.items() for part in parts}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=1) + "\n"
