"""`train.init_from`: every rank takes its part of the same weights, under any layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dit_case import wholes
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.rank_pool import Pool
from parallel.exchange import num_ranks
from parallel.mesh import build_mesh
from vidit.config import FAMILIES, RunConfig
from vidit.model.dit import DiT
from vidit.resolve import resolve
from vidit.text.encoder import build_text_encoder
from vidit.train.layout import layout_of, with_layout
from vidit.train.parallelize import build_dit
from vidit.vae.stored import adopt_vae

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor": 2},
    "sp2": {"sequence": 2, "sequence_kind": "ulysses"},
    "pp2": {"pipeline": 2},
    "zero3": {"shard": 2},
}
SMALL = {"num_layers": 2, "width": 48, "num_heads": 2, "mlp_width": 64}


def held(config: RunConfig) -> dict[str, Tensor]:
    """What this rank's model begins with, parameters whole."""
    config = with_layout(adopt_vae(config, num_ranks()), num_ranks())
    text = build_text_encoder(config.text, torch.float32)
    model = build_dit(config, text, torch.device("cpu"), torch.float32, build_mesh(layout_of(config), "cpu"))
    return wholes(dict(model.named_parameters()))


@pytest.mark.parametrize("family", ["wan", "cogvideox", "hunyuanvideo"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_takes_its_part(
    pool: Pool, configure: Callable[..., RunConfig], tmp_path: Path, layout: str, family: str
) -> None:
    config = configure(
        tmp_path / "run",
        model={**FAMILIES[family], **SMALL, **({"num_single_layers": 1} if family == "hunyuanvideo" else {})},
        train={"init_from": str(tmp_path / "weights"), "micro_batch": 1, "global_batch": 4},
        parallel=LAYOUTS[layout],
        sample={"prompts": ()},
    )
    with torch.device("meta"):
        grid = resolve(adopt_vae(config, 2), 2).largest_grid
        shapes = {f"dit.{n}": p.shape for n, p in DiT(config.model, 4, grid, config.text.width).named_parameters()}
    g = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    (tmp_path / "weights").mkdir()
    save_file(weights, tmp_path / "weights" / "model.safetensors")
    ranks = pool.run(2, held, config)
    found = {name: value for rank in ranks for name, value in rank.items() if name.startswith("dit.")}
    assert found.keys() == weights.keys()
    for rank in ranks:
        assert all(torch.equal(value, weights[name]) for name, value in rank.items() if name in weights)
    assert all(any(name.startswith("text.") for name in rank) for rank in ranks), "the folder has no text: it is new"
