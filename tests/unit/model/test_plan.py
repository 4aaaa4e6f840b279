"""The sharding plan fits every variation of the DiT, and says so where it does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from vidit.config import DIT, FAMILIES, Model
from vidit.model.dit import DiT
from vidit.model.plan import sharding_plan

TINY = {"num_layers": 4, "width": 32, "num_heads": 2, "mlp_width": 48, "windows": ((1, 0, 0), (0, 2, 4))}
VARIATIONS = {
    "default": {},
    "rope": {"relative_position": "rope"},
    "bare": {"relative_position": "none", "absolute_position": False, "qk_norm": False, "self_conditioning": 0.0},
    "no text": {"cross_attention": "none"},
    "text everywhere": {"cross_attention": "all"},
    "text keys": {"cross_attention": "all", "cross_keys": "text"},
    "pooled": {"pooled_text": True},
    "frame rate": {"frame_rate": True},
    "rank 0": {"adaln_rank": 0},
    **FAMILIES,
    "images of DiT": DIT,
    "channels of given frames": {"given_channels": True},
    "times of frames": {"frame_times": True},
    "table": {"modulation": "table"},
    "one stream alone": {**FAMILIES["cogvideox"], "num_single_layers": 4},
    "wide norms of two streams": {**FAMILIES["flux"], "qk_norm": "width", "num_single_layers": 1},
    "refined captions": {"text_embedding": "linear", "num_refiner_layers": 1},
    "norms": {"qk_norm": "width", "cross_norm": "affine"},
    "two encoders": {"cross_text": "interleaved", "cross_attention": "all", "pooled_text": True},
    "two encoders as they are": {**FAMILIES["gentron"], "cross_text": "interleaved", "text_embedding": "none"},
    "two encoders, refined": {
        "cross_text": "interleaved",
        "cross_attention": "all",
        "text_embedding": "linear",
        "num_refiner_layers": 1,
    },
    "one block without text": {"num_layers": 1, "windows": ((0, 0, 0),), "cross_attention": "none"},
}


def matching(pattern: str, names: list[str]) -> list[str]:
    """`*` stands for one part."""
    parts = pattern.split(".")
    return [
        name
        for name in names
        if len(parts) == len(name.split("."))
        and all(p in ("*", n) for p, n in zip(parts, name.split("."), strict=True))
    ]


@pytest.fixture(params=VARIATIONS.values(), ids=VARIATIONS)
def pair(request: pytest.FixtureRequest) -> tuple[Model, DiT]:
    config = Model(**{**TINY, **request.param})
    with torch.device("meta"):
        return config, DiT(config, 3, (3, 4, 6), 10, 7)


def test_every_parameter_once_and_every_pattern_used(pair: tuple[Model, DiT]) -> None:
    config, model = pair
    plan, names = sharding_plan(config), [name for name, _ in model.named_parameters()]
    hits = [name for pattern in plan.parameters for name in matching(pattern, names)]
    assert sorted(hits) == sorted(names)
    assert [pattern for pattern in plan.parameters if not matching(pattern, names)] == []


def test_seams_are_there(pair: tuple[Model, DiT]) -> None:
    config, model = pair
    plan, names = sharding_plan(config), [name for name, _ in model.named_modules()]
    for pattern in (*plan.regions, *plan.split, *plan.gather, plan.counted, *plan.cores, plan.blocks):
        assert matching(pattern, names), pattern


def test_every_core_is_named(pair: tuple[Model, DiT]) -> None:
    """A core that stays as it is under sequence parallelism would attend to its rank's tokens alone."""
    config, model = pair
    cores = [name for name, m in model.named_modules() if type(m).__name__ in ("WindowCore", "JointCore")]
    found = [name for pattern in sharding_plan(config).cores for name in matching(pattern, cores)]
    assert sorted(found) == sorted(cores)


def test_columns_and_rows_are_paired(pair: tuple[Model, DiT]) -> None:
    """What is divided by rows takes what a region's columns make; nothing else is divided."""
    config, model = pair
    plan, names = sharding_plan(config), [name for name, _ in model.named_parameters()]
    kinds = {name: kind for pattern, kind in plan.parameters.items() for name in matching(pattern, names)}
    for name, kind in kinds.items():
        region = ".".join(name.split(".")[:3])
        assert (kind == "replicate") == (not any(matching(pattern, [region]) for pattern in plan.regions)), name
        if kind == "row":
            assert isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear)


def test_a_plan_is_a_value() -> None:
    plan = sharding_plan(Model(**TINY))
    assert plan == sharding_plan(Model(**TINY))
    assert replace(plan, counted="other") != plan
