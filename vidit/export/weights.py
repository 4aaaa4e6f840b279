"""Full weights out of a checkpoint: safetensors files and the config they belong to, in one process.

One tensor at a time is put together from the parts that ranks wrote, cast and written; no process group, and never
the model in memory. Above a size the tensors go into several files under an index, as Hugging Face's libraries read
them. Names are those of the trained modules: `dit.blocks.0...`, and `text.`, `vae.` where those were trained.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch

from parallel.checkpoint import folder_of, open_stored, steps
from parallel.dtensor import Box
from parallel.save_plan import as_dtype
from parallel.shard_file import Part, content, header, in_file_order, write
from parallel.stored import Stored
from vidit.train.rundir import read_config
from vidit.whole_file import full_disk_explained, write_whole

Weights = Literal["ema", "model"]
MAX_FILE_BYTES = 5 * 10**9
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export_weights(
    run_dir: Path,
    out: Path,
    weights: Weights = "ema",
    dtype: Literal["fp32", "bf16"] = "fp32",
    step: int | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> list[Path]:
    """Write a run's weights and `config.json` into the new folder `out`; returns the files.

    Args:
        weights: the averages ("ema"; what is not averaged, as frozen parameters and buffers, as it is), or "model".
        dtype: of every floating tensor.
        step: of the checkpoint; None is the newest.

    Raises ValueError where the run has no such checkpoint or `out` holds something, CheckpointError where the
    checkpoint is damaged, RuntimeError on a full disk.
    """
    config = read_config(run_dir)
    folder = _chosen(run_dir, step)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already and not empty; give --out a new folder")
    _, stored = open_stored(folder)
    sources = _sources(stored, weights)
    files = _divided(_parts(stored, sources, DTYPES[dtype]), max_file_bytes)
    partial = out.with_name(f".{out.name}.partial")
    with full_disk_explained(out):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for name, parts in files.items():
                write(partial / name, header(parts), (_bytes(stored, sources[part.name], part) for part in parts))
            if len(files) > 1:
                write_whole(partial / "model.safetensors.index.json", _index(files))
            write_whole(partial / "config.json", config.to_json() + "\n")
            partial.replace(out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return sorted(out.iterdir())


def _chosen(run_dir: Path, step: int | None) -> Path:
    root = run_dir / "checkpoints"
    found = steps(root)
    if not found:
        raise ValueError(f"{run_dir} holds no checkpoint to export; train it with `vidit train`")
    if step is not None and step not in found:
        raise ValueError(f"{run_dir} holds no checkpoint of step {step}; it has {' '.join(map(str, found))}")
    return folder_of(root, found[-1] if step is None else step)


def _sources(stored: Stored, weights: Weights) -> dict[str, str]:
    """Name in the export -> name in the checkpoint."""
    names = [name.removeprefix("model.") for name in stored.tensors if name.startswith("model.")]
    averaged = {name for name in names if weights == "ema" and f"ema.{name}" in stored.tensors}
    return {name: f"ema.{name}" if name in averaged else f"model.{name}" for name in names}


def _parts(stored: Stored, sources: dict[str, str], dtype: torch.dtype) -> list[Part]:
    found = []
    for name, source in sources.items():
        facts = stored.tensors[source]
        kept = as_dtype(facts["dtype"])
        box = Box((0,) * len(facts["shape"]), tuple(facts["shape"]))
        found.append(Part(name, dtype if kept.is_floating_point else kept, box))
    return found


def _divided(parts: Sequence[Part], max_file_bytes: int) -> dict[str, list[Part]]:
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
        return {"model.safetensors": in_file_order(groups[0])}
    return {
        f"model-{number:05d}-of-{len(groups):05d}.safetensors": in_file_order(group)
        for number, group in enumerate(groups, start=1)
    }


def _bytes(stored: Stored, source: str, part: Part) -> memoryview:
    return content(stored.whole(source).to(part.dtype))


def _index(files: dict[str, list[Part]]) -> str:
    total = sum(part.num_bytes for parts in files.values() for part in parts)
    places = dict(_places(files))
    return json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=1) + "\n"


def _places(files: dict[str, list[Part]]) -> Iterator[tuple[str, str]]:
    for name, parts in files.items():
        yield from ((part.name, name) for part in parts)
