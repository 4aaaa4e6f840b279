"""A pipeline is the same training step as one process: losses, gradients, norm; validation and samples too."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pipeline_case
import pytest
from pipeline_case import PLANTS, Case, errors, on_ranks, single

from benchmarks.rank_pool import Pool, TaskError
from parallel.layout import Layout
from vidit.config import FAMILIES
from vidit.resolve import resolve

DEEP = {"num_layers": 9}  # two stages on each of four ranks
PAIR = {"pipeline": 2}
SCHEDULES: dict[str, tuple[Any, int]] = {
    "gpipe": ("gpipe", 1),
    "1f1b": ("1f1b", 1),
    "interleaved": ("interleaved", 2),
    "ZB-1P": ("zero_bubble", 1),
    "ZB-V": ("zero_bubble", 2),
}


@functools.cache
def reference(case_without_layout: str) -> pipeline_case.Result:
    return single(REFERENCES[case_without_layout])


REFERENCES: dict[str, Case] = {}


def measured(pool: Pool, case: Case) -> dict[str, float]:
    alone = Case(
        micro_batches=case.micro_batches, model=case.model, images=case.images, trained_text=case.trained_text,
        given=case.given,
    )  # fmt: skip
    REFERENCES[repr(alone)] = alone
    one = reference(repr(alone))
    results = pool.run(Layout(**case.layout).world, on_ranks, case)
    assert set().union(*(r.names for r in results)) == set(one.names), "names of the state dict"
    return errors(one, results)


def assert_equal(found: dict[str, float]) -> None:
    assert found["loss"] <= 1e-13, found
    assert found["gradient"] <= 1e-11, found
    assert found["norm"] <= 1e-12, found
    assert found["validation"] <= 1e-12, found
    assert found["sample"] <= 1, found  # of 255, where rounding falls on another side
    assert found["replica"] == 0, found


@pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "checkpoint"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_two_ranks(pool: Pool, schedule: str, checkpoint: bool) -> None:
    """Joint batches of clips and images, 45 tokens, self-conditioning, a trained text encoder."""
    kind, stages = SCHEDULES[schedule]
    assert_equal(measured(pool, Case(PAIR, kind, stages, checkpoint=checkpoint)))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_four_ranks(pool: Pool, schedule: str) -> None:
    kind, stages = SCHEDULES[schedule]
    assert_equal(measured(pool, Case({"pipeline": 4}, kind, stages, model=DEEP)))


@pytest.mark.parametrize(
    ("axis", "schedule"), [("tensor", "ZB-V"), ("sequence", "ZB-V"), ("shard", "ZB-V"), ("tensor", "1f1b")]
)
def test_with_another_axis(pool: Pool, axis: str, schedule: str) -> None:
    """ZB-V, which puts weight gradients off, is recomputed as well."""
    kind, stages = SCHEDULES[schedule]
    assert_equal(measured(pool, Case({"pipeline": 2, axis: 2}, kind, stages, checkpoint=schedule == "ZB-V")))


def test_windows_dealt_to_ranks(pool: Pool) -> None:
    """Ranks hold different numbers of tokens, and other ones behind every stage."""
    assert_equal(measured(pool, Case({"pipeline": 2, "sequence": 2}, "interleaved", 2, kind="window")))


@pytest.mark.parametrize("level", [0, 1, 2])
def test_levels_of_zero(pool: Pool, level: int) -> None:
    """Weight gradients that come after the hooks of the backward pass are reduced too."""
    assert_equal(measured(pool, Case({"pipeline": 2, "shard": 2}, "zero_bubble", zero=level)))


def test_replicas(pool: Pool) -> None:
    assert_equal(measured(pool, Case({"pipeline": 2, "replicate": 2}, "interleaved", 2)))


PLAIN = {"patch": 1, "pooled_text": False, "text_padding": "masked"}
MODELS: dict[str, Case] = {
    "frozen text, clips": Case(PAIR, trained_text=False, images=False),
    "unequal, text on one stage": Case(
        PAIR, stages=(range(4), range(4, 5)), model={"windows": ((1, 0, 0),) * 4 + ((0, 2, 2),)}
    ),
    "bare": Case(
        PAIR, "zero_bubble", trained_text=False,
        model={
            "windows": ((0, 0, 0),), "relative_position": "rope", "qk_norm": False, "absolute_position": False,
            "cross_attention": "none", "pooled_text": True, "adaln_rank": 0, "self_conditioning": 0.0,
        },
    ),
    "fewer micro-batches than ranks": Case({"pipeline": 4}, "gpipe", micro_batches=2),
    "wan": Case(PAIR, model={**FAMILIES["wan"], **PLAIN}),
    "cogvideox": Case(PAIR, "zero_bubble", model={**FAMILIES["cogvideox"], **PLAIN}, images=False),
    "cogvideox, sinusoids": Case(
        PAIR, model={**FAMILIES["cogvideox"], **PLAIN, "relative_position": "none", "absolute_position": "sincos"}
    ),
    "cogvideox on two sequence ranks": Case(
        {**PAIR, "sequence": 2}, model={**FAMILIES["cogvideox"], **PLAIN}, images=False
    ),
    "two streams, then one": Case(PAIR, model={**FAMILIES["hunyuanvideo"], "patch": 1}, images=False),
    "two streams, then one, weight gradients put off": Case(
        {**PAIR, "tensor": 2}, "zero_bubble", model={**FAMILIES["hunyuanvideo"], "patch": 1}, images=False
    ),
    "two streams, then one, on two sequence ranks": Case(
        {**PAIR, "sequence": 2}, model={**FAMILIES["flux"], "patch": 1, "num_single_layers": 3}, images=False
    ),
    "latte": Case(PAIR, model={**FAMILIES["latte"], **PLAIN}),
    "stdit3": Case(PAIR, model={**FAMILIES["stdit3"], **PLAIN}),
    "stdit3, frames given": Case(
        PAIR, "zero_bubble", model={**FAMILIES["stdit3"], **PLAIN, "frame_times": True, "self_conditioning": 0.6},
        given=({"kind": "random", "share": 0.7},),
    ),
    "opensora_plan": Case(PAIR, model={**FAMILIES["opensora_plan"], **PLAIN}, images=False),
    "gentron": Case(PAIR, model={**FAMILIES["gentron"], **PLAIN, "motion_free": 0.5, "self_conditioning": 0.6}),
    "two encoders in turn": Case(
        {**PAIR, "tensor": 2}, trained_text=False, stages=(range(4), range(4, 5)),
        model={**FAMILIES["gentron"], "patch": 1, "cross_text": "interleaved", "frame_rate": False},
    ),
    "frames given beside": Case(PAIR, model={"given_channels": True}, given=({"kind": "random", "share": 0.7},)),
    "more of them": Case({"pipeline": 4}, "zero_bubble", micro_batches=10),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models_and_cuts(pool: Pool, name: str) -> None:
    assert_equal(measured(pool, MODELS[name]))


# What each planted bug spoils, and the schedule that must see it.
CAUGHT = {
    "shared gradient not summed": ("1f1b", "gradient"),
    "loss not divided by micro-batches": ("1f1b", "gradient"),
    "shared counted twice in the norm": ("1f1b", "norm"),
    "estimate does not arrive": ("1f1b", "loss"),
    "weight gradients forgotten": ("ZB-1P", "gradient"),
}


def test_every_plant_is_tried() -> None:
    assert CAUGHT.keys() == PLANTS.keys()


@pytest.mark.parametrize("plant", CAUGHT)
def test_planted_bug_is_caught(pool: Pool, plant: str) -> None:
    schedule, spoiled = CAUGHT[plant]
    kind, stages = SCHEDULES[schedule]
    try:
        found = measured(pool, Case(PAIR, kind, stages, plant=plant))
    except TaskError as error:
        pytest.fail(f"a crash proves nothing about the comparison: {error}")
    assert found[spoiled] > 1e-3, found
    with pytest.raises(AssertionError):
        assert_equal(found)


def test_the_case_is_what_it_says() -> None:
    """Odd tokens, some micro-batches self-conditioned in part, captions of many lengths."""
    case = Case()
    grid = resolve(case.config).grid
    assert grid[0] * grid[1] * grid[2] % 2
    step = pipeline_case.stepper(case, pipeline_case.encoder(case))
    chosen = [step.inputs(pipeline_case.batch(case, i), "train").chosen_B for i in range(case.micro_batches)]
    picked = [int(own.sum()) for own in chosen if own is not None]
    assert 0 < sum(picked) < pipeline_case.ROWS * case.micro_batches
    tokens = pipeline_case.batch(case, 0).tokens
    assert tokens is not None
    assert len(set(tokens.mask_BL.sum(1).tolist())) > 1
    assert replace(case, images=False).config.data.image_rows == 0
