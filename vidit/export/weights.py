"""Full weights out of a checkpoint: safetensors files and the config they belong to, in one process.

One tensor at a time is put together from the parts that ranks wrote, cast and written; no process group, and never
the model in memory. Above a size the tensors go into several files under an index, as Hugging Face's libraries read
them. Names are those of the trained modules: `dit.blocks.0...`, and `text.`, `vae.` where those were trained.
"""

from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from parallel.checkpoint import folder_of, open_stored, steps
from parallel.save_plan import as_dtype
from parallel.stored import Stored
from vidit.export.files import DTYPES, MAX_FILE_BYTES, Kind, new_folder, write_tensors
from vidit.train.rundir import read_config
from vidit.whole_file import write_whole

Weights = Literal["ema", "model"]


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
    folder = chosen_checkpoint(run_dir, step)
    checkpoint = trained_weights(folder, weights)
    with new_folder(out) as partial:
        write_tensors(partial, checkpoint.kinds(DTYPES[dtype]), checkpoint.get, max_file_bytes=max_file_bytes)
        write_whole(partial / "config.json", config.to_json() + "\n")
    return sorted(out.iterdir())


class Trained(NamedTuple):
    """Full tensors of a checkpoint under the names of the trained modules, one at a time."""

    stored: Stored
    sources: dict[str, str]

    def kinds(self, dtype: torch.dtype) -> dict[str, Kind]:
        """Shape and dtype of each, floating ones in `dtype`."""
        facts = {name: self.stored.tensors[source] for name, source in self.sources.items()}
        kept = {name: as_dtype(own["dtype"]) for name, own in facts.items()}
        return {
            name: Kind(tuple(own["shape"]), dtype if kept[name].is_floating_point else kept[name])
            for name, own in facts.items()
        }

    def get(self, name: str) -> Tensor:
        return self.stored.whole(self.sources[name])


def trained_weights(folder: Path, weights: Weights) -> Trained:
    """Of a checkpoint. CheckpointError where it is damaged."""
    _, stored = open_stored(folder)
    return Trained(stored, _sources(stored, weights))


def chosen_checkpoint(run_dir: Path, step: int | None) -> Path:
    """The checkpoint of that step, or the newest. ValueError where there is none."""
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
