"""What `benchmarks.parity` compares: the models, the layouts, and the run that each pair of them makes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vidit.config import FAMILIES, RunConfig
from vidit.train.layout import with_layout

STEPS, ROWS = 5, 8
VAE = {
    "latent_channels": 4, "patch": 2, "base_channels": 8, "multipliers": (1, 2), "num_res_blocks": (0, 1),
    "decoder_res_blocks": (0, 1), "spatial_down": (True,), "temporal_down": (True,),
}  # fmt: skip
SMALL = {"width": 32, "num_heads": 4, "mlp_width": 48, "patch": 1, "attention_backend": "sdpa"}
SKIPS = (("single", 3), ("group", 3))
GIVEN = ({"kind": "random", "share": 0.7},)
PLAIN = {"patch": 1, "text_padding": "masked"}
MODELS: dict[str, dict[str, Any]] = {
    "walt": {"windows": ((1, 0, 0), (0, 2, 2)), "self_conditioning": 0.5, "pooled_text": True},
    "full": {
        "windows": ((0, 0, 0),), "relative_position": "rope", "cross_attention": "all", "cross_keys": "text",
        "image_attention": "frame", "self_conditioning": 0.0, "adaln_rank": 0, "absolute_position": False,
    },
    "wan": {**FAMILIES["wan"], **PLAIN},
    # Sinusoids as in 2B: rotation would tell its text at what time of a row an image is.
    "cogvideox": {
        **FAMILIES["cogvideox"], **PLAIN, "relative_position": "none", "absolute_position": "sincos",
    },
    "latte": {**FAMILIES["latte"], **PLAIN},
    "hunyuanvideo": {
        **FAMILIES["hunyuanvideo"], **PLAIN, "num_single_layers": 1, "relative_position": "none",
        "rope_split": "quarter", "rope_theta": 10_000.0,
    },
    # An image has 15 tokens: groups of 3, so that they are whole in a row of images.
    "opensora_plan": {**FAMILIES["opensora_plan"], **PLAIN, "windows": SKIPS, "given_channels": True},
    "skiparse": {**FAMILIES["opensora_plan"], **PLAIN, "windows": SKIPS, "full_ends": 0},
    "gentron": {**FAMILIES["gentron"], **PLAIN, "motion_free": 0.5},
    "stdit3": {**FAMILIES["stdit3"], **PLAIN, "frame_times": True},
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of the table: what `parallel` and `train` say, and how many ranks that takes."""

    ranks: int
    parallel: Mapping[str, Any]
    train: Mapping[str, Any]
    layers: int = 4

    @property
    def micro_batch(self) -> int:
        """Rows of a micro-batch: 2 of them in a step, or 4 where ranks or stages need as many."""
        data_ranks = self.ranks // (self.parallel.get("tensor", 1) * self.parallel.get("sequence", 1))
        return 4 if data_ranks <= 2 and "pipeline" not in self.parallel else 2

    @property
    def alone(self) -> "Row":
        """The same model and micro-batches in one process, eager."""
        train = {"micro_batch": self.micro_batch}
        return Row(1, {}, train, self.layers)


def row(ranks: int, train: Mapping[str, Any] | None = None, layers: int = 4, **parallel: Any) -> Row:
    return Row(ranks, parallel, train or {}, layers)


def _layouts() -> dict[str, Row]:
    full, chosen = {"activation_checkpointing": "full"}, {"activation_checkpointing": "selective"}
    compiled = {"compile": True}
    found = {f"tp{n}": row(n, tensor=n) for n in (2, 4)}
    found |= {f"tp{n}, whole norms": row(n, tensor=n, sharded_norms=False) for n in (2, 4)}
    for kind in ("ulysses", "ring", "window"):
        found |= {f"sp{n} {kind}": row(n, sequence=n, sequence_kind=kind) for n in (2, 4)}
    found["sp4 ulysses_ring"] = row(4, sequence=4, sequence_kind="ulysses_ring", ulysses=2)
    for name, own in (("gpipe", {}), ("1f1b", {}), ("interleaved", {"stages_per_rank": 2}), ("zero_bubble", {})):
        layers = {"layers": 8} if own else {}
        found |= {f"pp{n} {name}": row(n, **layers, pipeline=n, schedule=name, **own) for n in (2, 4)}
    found["pp2 zero_bubble V"] = row(2, pipeline=2, schedule="zero_bubble", stages_per_rank=2)
    found |= {f"zero{level} x2": row(2, zero=level) for level in (0, 1, 2, 3)}
    found |= {
        "zero3 x4": row(4),
        "hsdp 2x2": row(4, replicate=2),
        "tp2 x sp2": row(4, tensor=2, sequence=2, sequence_kind="ulysses"),
        "tp2 x sp2 window": row(4, tensor=2, sequence=2, sequence_kind="window"),
        "tp2 x pp2": row(4, tensor=2, pipeline=2),
        "sp2 x pp2": row(4, sequence=2, pipeline=2, sequence_kind="ulysses"),
        "dp2 x tp2": row(4, tensor=2, zero=0),
        "zero3 x tp2": row(4, tensor=2),
        "zero3 x pp2": row(4, pipeline=2),
        "dp2 x sp2": row(4, sequence=2, sequence_kind="ulysses", zero=0),
        "zero3 x sp2 ring": row(4, sequence=2, sequence_kind="ring"),
        "tp2 x sp2 x dp2": row(8, tensor=2, sequence=2, replicate=2, sequence_kind="ulysses"),
        "zero3 x2, recomputed": row(2, full),
        "tp2 x sp2, recomputed": row(4, full, tensor=2, sequence=2, sequence_kind="ulysses"),
        "sp2 window, recomputed": row(2, full, sequence=2, sequence_kind="window"),
        "sp2 ring, recomputed": row(2, full, sequence=2, sequence_kind="ring"),
        "pp2 1f1b, recomputed": row(2, full, pipeline=2),
        "zero3 x2, partly recomputed": row(2, chosen),
        "sp2 ring, partly recomputed": row(2, chosen, sequence=2, sequence_kind="ring"),
        "tp2 x sp2 window, partly recomputed": row(4, chosen, tensor=2, sequence=2, sequence_kind="window"),
        "one process, compiled": row(1, compiled, 2),
        "zero3 x2, compiled": row(2, compiled, 2),
        "tp2, compiled": row(2, compiled, 2, tensor=2),
        "sp2 ulysses, compiled": row(2, compiled, 2, sequence=2, sequence_kind="ulysses"),
        "pp2 1f1b, compiled": row(2, compiled, 2, pipeline=2),
        "sp2 window, compiled": row(2, compiled, 2, sequence=2, sequence_kind="window"),
    }
    return found


LAYOUTS = _layouts()


@dataclass(frozen=True)
class Case:
    model: str
    dtype: str
    row: Row

    @property
    def config(self) -> RunConfig:
        c = RunConfig.model_validate(
            {
                "name": "parity", "vae": {"weights": "unread", **VAE},
                "model": {**SMALL, **MODELS[self.model], "num_layers": self.row.layers},
                "text": {"width": 16, "num_layers": 1, "num_heads": 2, "max_tokens": 5, "hash_buckets": 64},
                "data": {"train": "unread", "num_frames": 9, "height": 20, "width": 12, "image_rows": 1},
                "train": {
                    "global_batch": ROWS, "micro_batch": self.row.micro_batch, "seed": 3, "learning_rate": 1e-3,
                    "steps": STEPS,
                    "device": "cpu", "precision": self.dtype, **self.row.train,
                },
                "parallel": dict(self.row.parallel),
                "diffusion": {"given": GIVEN if {"frame_times", "given_channels"} & MODELS[self.model].keys() else ()},
            }
        )  # fmt: skip
        return with_layout(c, self.row.ranks)
