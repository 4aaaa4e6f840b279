"""Every layout is the same computation as one process: output, gradient of every parameter, gradient norm, fp64."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any

import dit_case
import pytest
import torch
from dit_case import EVEN, ODD, PLANTS, Case, errors, on_ranks, single

from benchmarks.rank_pool import Pool, TaskError
from parallel.layout import Layout
from vidit.config import FAMILIES
from vidit.model.context import EVERY_FRAME

LAYOUTS: dict[str, dict[str, int]] = {
    "tp2": {"tensor": 2},
    "tp4": {"tensor": 4},
    "sp2": {"sequence": 2},
    "sp4": {"sequence": 4},
    "zero2": {"shard": 2},
    "zero4": {"shard": 4},
    "dp2": {"replicate": 2},
    "hsdp2x2": {"replicate": 2, "shard": 2},
    "zero2 sp2": {"shard": 2, "sequence": 2},
    "dp2 sp2": {"replicate": 2, "sequence": 2},
    "zero2 tp2": {"shard": 2, "tensor": 2},
    "tp2 sp2": {"sequence": 2, "tensor": 2},
}
PLAIN = {"patch": 1, "pooled_text": False, "text_padding": "masked"}
MODELS: dict[str, dict[str, Any]] = {
    "bias": {},
    "rope, text keys": {"relative_position": "rope", "cross_keys": "text", "cross_attention": "all"},
    "images in frame": {"image_attention": "frame", "cross_attention": "all"},
    "full attention, bare": {
        "windows": ((0, 0, 0),), "relative_position": "none", "qk_norm": False, "absolute_position": False,
        "cross_attention": "none", "pooled_text": False, "adaln_rank": 0, "self_conditioning": 0.0,
    },
    "four windows": {"windows": ((1, 0, 0), (0, 1, 1), (2, 2, 2)), "cross_attention": "all"},
    **{name: {**fields, **PLAIN} for name, fields in FAMILIES.items()},
    "skips": {
        "windows": (("single", 4), ("group", 5)), "relative_position": "rope", "image_attention": "frame",
        "cross_attention": "all",
    },
    "gentron still": {**FAMILIES["gentron"], **PLAIN, "motion_free": 0.5},
    "channels of frames": {"given_channels": True},
    "two encoders": {**FAMILIES["gentron"], "patch": 1, "cross_text": "interleaved", "text_embedding": "none"},
    "times of frames": {"frame_times": True, "pooled_text": True},
    "stdit3 frames": {**FAMILIES["stdit3"], **PLAIN, "frame_times": True, "pooled_text": True},
    "hunyuanvideo": {**FAMILIES["hunyuanvideo"], "patch": 1, "num_single_layers": 1},
    "wide norms of two streams": {**FAMILIES["flux"], **PLAIN, "qk_norm": "width"},
    **{
        f"{name} seen": {**FAMILIES[name], **PLAIN, "text_padding": "seen"}
        for name in ("wan", "cogvideox", "hunyuanvideo")
    },
}  # fmt: skip


@functools.cache
def reference(grid: tuple[int, int, int], images: bool, model: str) -> dit_case.Result:
    return single(Case({}, MODELS[model], grid, images))


def measured(pool: Pool, case: Case, model: str) -> dict[str, float]:
    one = reference(case.grid, case.images, model)
    results = pool.run(Layout(**case.layout).world, on_ranks, replace(case, model=MODELS[model]))
    assert all(r.names == one.names for r in results), "names of the state dict"
    return errors(case, one, results)


def assert_equal(found: dict[str, float]) -> None:
    assert found["forward"] <= 1e-13, found
    assert found["gradient"] <= 1e-11, found
    assert found["norm"] <= 1e-12, found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_default_model(pool: Pool, layout: str) -> None:
    assert_equal(measured(pool, Case(LAYOUTS[layout], {}, ODD), "bias"))


@pytest.mark.parametrize("layout", ["tp4", "sp4", "zero2", "hsdp2x2", "tp2 sp2"])
def test_even_grids_rows_of_images_and_recomputation(pool: Pool, layout: str) -> None:
    assert_equal(measured(pool, Case(LAYOUTS[layout], {}, EVEN, True, checkpoint=True), "bias"))


@pytest.mark.parametrize(
    "model", [m for m in MODELS if m not in ("bias", "two encoders", *FAMILIES) and "seen" not in m]
)
@pytest.mark.parametrize("layout", ["sp4", "tp2 sp2"])
def test_every_kind_of_block(pool: Pool, layout: str, model: str) -> None:
    images = model in (
        "images in frame",
        "four windows",
        "rope, text keys",
        "times of frames",
        "skips",
        "gentron still",
    )
    checkpoint = model == "four windows"
    assert_equal(measured(pool, Case(LAYOUTS[layout], {}, ODD, images, checkpoint=checkpoint), model))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["tp4", "sp4", "zero2 tp2"])
def test_every_family(pool: Pool, layout: str, family: str) -> None:
    assert_equal(measured(pool, Case(LAYOUTS[layout], {}, ODD, True, checkpoint="sp" in layout), family))


@pytest.mark.parametrize("family", ["wan seen", "cogvideox seen", "hunyuanvideo seen"])
def test_padding_that_is_seen(pool: Pool, family: str) -> None:
    assert_equal(measured(pool, Case(LAYOUTS["tp2 sp2"], {}, ODD), family))


def test_two_encoders(pool: Pool) -> None:
    """Keys and values straight from both; rows of images among the clips. A pipeline has their embeddings."""
    assert_equal(measured(pool, Case(LAYOUTS["tp2 sp2"], {}, ODD, True, checkpoint=True), "two encoders"))


@pytest.mark.parametrize("layout", ["tp4", "sp4"])
def test_without_zero(pool: Pool, layout: str) -> None:
    """The gradients on their own: what ZeRO averages is already right on each rank."""
    assert_equal(measured(pool, Case(LAYOUTS[layout], {}, ODD, True, zero=False), "bias"))


def test_parameters_kept_gathered(pool: Pool) -> None:
    assert_equal(measured(pool, Case(LAYOUTS["zero2 tp2"], {}, ODD, level=2), "bias"))


def test_one_frame(pool: Pool) -> None:
    """An image as a one-frame grid: identity in space-time windows, and an odd count for both ranks."""
    assert_equal(measured(pool, Case(LAYOUTS["sp2"], {}, (1, 3, 3)), "bias"))


# What each planted bug spoils, and the layout that must see it.
CAUGHT = {
    "split gradient not averaged": ("sp2", "gradient"),
    "region gradient not summed": ("tp2", "gradient"),
    "per-head gradient not summed": ("tp2", "gradient"),
    "row bias counted on every rank": ("tp2", "forward"),
    "padding trimmed at the wrong end": ("sp2", "forward"),
    "positions not cut": ("sp2", "forward"),
    "text's heads averaged backward": ("sp2", "gradient"),
    "heads' means not averaged": ("tp2", "forward"),
    "heads' means not summed backward": ("tp2", "gradient"),
    "sequence not averaged": ("sp2", "gradient"),
    "norm halved": ("zero2", "norm"),
    "replicas counted twice in the norm": ("dp2", "norm"),
}


def test_every_plant_is_tried() -> None:
    assert CAUGHT.keys() == PLANTS.keys()


@pytest.mark.parametrize("plant", CAUGHT)
def test_planted_bug_is_caught(pool: Pool, plant: str) -> None:
    layout, spoiled = CAUGHT[plant]
    special = {"positions not cut": "rope, text keys", "text's heads averaged backward": "cogvideox"}
    model = special.get(plant, "wan" if "means" in plant else "bias")
    try:
        found = measured(pool, Case(LAYOUTS[layout], {}, ODD, plant=plant), model)
    except TaskError as error:
        pytest.fail(f"a crash proves nothing about the comparison: {error}")
    assert found[spoiled] > 1e-3, found
    with pytest.raises(AssertionError):
        assert_equal(found)


def test_a_right_forward_hides_a_wrong_gradient(pool: Pool) -> None:
    found = measured(pool, Case(LAYOUTS["sp2"], {}, ODD, plant="split gradient not averaged"), "bias")
    assert found["forward"] <= 1e-13
    assert found["gradient"] > 0.5


def test_cases_cover_both_sides() -> None:
    """Odd and even token counts, both layouts of a row; the batch holds what its comment says."""
    assert [t * h * w % 2 for t, h, w in (ODD, EVEN)] == [1, 0]
    rows = dit_case.batch(Case({}, images=True))
    image_B, frame_BL = rows["image_B"], rows["text_frame_BL"]
    assert image_B is not None
    assert frame_BL is not None
    assert image_B.tolist() == [False, True, False, True]
    assert torch.equal(frame_BL[2], torch.full_like(frame_BL[2], EVERY_FRAME))
    sizes = [Layout(**layout).world for layout in LAYOUTS.values()]
    assert {2, 4} == set(sizes)
    assert not [a for a, b in itertools.combinations(LAYOUTS.values(), 2) if a == b]
