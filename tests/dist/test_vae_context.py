"""The VAE over time and rows is the same computation as on one rank: outputs, gradients of parameters and inputs."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
import vae_case
from vae_case import PLANTS, Case, errors, on_ranks, single

from benchmarks.rank_pool import Pool, TaskError
from parallel.context import apply_context
from parallel.names import PlanError, modules
from parallel.parts import Parts, context_faults, row_faults
from vidit.vae.autoencoder import CausalVae
from vidit.vae.layers import CausalConv3d, DropFirst, Front
from vidit.vae.plan import context_plan

VAES: dict[str, dict[str, Any]] = {
    "4x4x4": {},
    "2x2x2, no patch": {
        "patch": 1, "multipliers": (1, 2), "num_res_blocks": (1, 1), "decoder_res_blocks": (1, 2),
        "spatial_down": (True,), "temporal_down": (True,),
    },
    "1x4x4": {"temporal_down": (False, False)},
    "4x8x8, four levels": {
        "patch": 1, "multipliers": (1, 2, 2, 2), "num_res_blocks": (1, 0, 0, 1), "decoder_res_blocks": (0, 1, 0, 1),
        "spatial_down": (True, True, True), "temporal_down": (False, True, True),
    },
    "one level": {
        "multipliers": (1,), "num_res_blocks": (1,), "decoder_res_blocks": (1,), "spatial_down": (),
        "temporal_down": (),
    },
    "wavelet, frame norm": {
        "fold": "haar", "patch_frames": 2, "temporal_down": (False, True), "norm": "group", "norm_groups": 2,
    },
    "layers of latent diffusion": {
        "layers": "ldm", "mid_attention": True, "norm": "group", "norm_groups": 2, "num_res_blocks": (1, 1, 2),
    },
    "no blocks": {"num_res_blocks": (0, 0, 0), "decoder_res_blocks": (0, 0, 0)},
}  # fmt: skip


@functools.cache
def reference(vae: str, frames: int, height: int, images: bool, dtype: torch.dtype) -> vae_case.Result:
    return single(Case(1, frames, 1, VAES[vae], height, images, dtype=dtype))


def measured(pool: Pool, case: Case, vae: str = "4x4x4") -> dict[str, float]:
    one = reference(vae, case.frames, case.height, case.images, case.dtype)
    results = pool.run(case.world, on_ranks, replace(case, vae=VAES[vae]))
    assert all(r.names == one.names for r in results), "names of the state dict"
    return errors(one, results)


def assert_equal(found: dict[str, float], forward: float = 1e-12, gradient: float = 1e-11) -> None:
    assert found["forward"] <= forward, found
    assert found["gradient"] <= gradient, found


# (ranks over time, ranks over rows), frames, VAE: 5 latent frames over 2 and 4 ranks, and other even and odd counts.
DIVIDED: list[tuple[tuple[int, int], int, str]] = [
    ((2, 1), 17, "4x4x4"),
    ((4, 1), 17, "4x4x4"),
    ((2, 1), 13, "4x4x4"),
    ((4, 1), 29, "4x4x4"),
    ((2, 1), 9, "2x2x2, no patch"),
    ((4, 1), 11, "2x2x2, no patch"),
    ((2, 1), 3, "1x4x4"),
    ((4, 1), 17, "1x4x4"),
    ((2, 1), 9, "4x8x8, four levels"),
    ((4, 1), 33, "4x8x8, four levels"),
    ((4, 1), 6, "one level"),
    ((2, 1), 17, "no blocks"),
    ((2, 1), 17, "wavelet, frame norm"),
    ((4, 1), 29, "wavelet, frame norm"),
    ((2, 1), 13, "layers of latent diffusion"),
    ((1, 2), 5, "4x4x4"),
    ((1, 4), 3, "2x2x2, no patch"),
    ((1, 2), 9, "4x8x8, four levels"),
    ((2, 2), 17, "4x4x4"),
]


@pytest.mark.parametrize(("ranks", "frames", "vae"), DIVIDED)
def test_the_same_computation(pool: Pool, ranks: tuple[int, int], frames: int, vae: str) -> None:
    assert_equal(measured(pool, Case(ranks[0], frames, ranks[1], height=16), vae))


@pytest.mark.parametrize("ranks", [(2, 1), (4, 1), (2, 2)])
def test_fp32(pool: Pool, ranks: tuple[int, int]) -> None:
    assert_equal(measured(pool, Case(ranks[0], 17, ranks[1], dtype=torch.float32)), 1e-5, 1e-5)


@pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("ranks", [(2, 1), (4, 1), (2, 2)])
def test_clips_and_images_in_one_step(pool: Pool, ranks: tuple[int, int], checkpoint: bool) -> None:
    """The blocks of the clip run anew after the image went through them: nothing may be remembered of a call."""
    assert_equal(measured(pool, Case(ranks[0], 17, ranks[1], images=True, checkpoint=checkpoint)))


def test_compiled_blocks(pool: Pool) -> None:
    """A rank that receives nothing holds the exchange in its graph all the same, forward and backward."""
    assert_equal(measured(pool, Case(2, 3, compile="aot_eager"), "one level"))


def test_every_rank_has_the_same_bits(pool: Pool) -> None:
    results = pool.run(4, on_ranks, Case(4))
    for r in results[1:]:
        assert all(torch.equal(x, results[0].out[name]) for name, x in r.out.items())


# What each planted bug spoils, and the ranks in (time, rows) that must see it.
CAUGHT = {
    "halo one frame off": ((2, 1), "forward"),
    "repeats on later ranks": ((2, 1), "forward"),
    "up drops on later ranks": ((2, 1), "forward"),
    "halo's gradient not sent back": ((2, 1), "gradient"),
    "split gradient not averaged": ((2, 1), "gradient"),
    "rows padded inside the picture": ((1, 2), "forward"),
}


def test_every_plant_is_tried() -> None:
    assert CAUGHT.keys() == PLANTS.keys()


@pytest.mark.parametrize("plant", CAUGHT)
def test_planted_bug_is_caught(pool: Pool, plant: str) -> None:
    (time, rows), spoiled = CAUGHT[plant]
    try:
        found = measured(pool, Case(time, 17, rows, plant=plant))
    except TaskError as error:
        pytest.fail(f"a crash proves nothing about the comparison: {error}")
    assert found[spoiled] > 1e-3, found
    assert spoiled == "forward" or found["forward"] <= 1e-12, "a right forward hides it"
    with pytest.raises(AssertionError):
        assert_equal(found)


@pytest.mark.parametrize("vae", VAES)
def test_the_plan_names_what_looks_around(vae: str) -> None:
    c = Case(1, vae=VAES[vae]).config
    with torch.device("meta"):
        module = CausalVae(c)
    plan = context_plan(c)

    def names(kind: type) -> set[str]:
        return {name for name, m in module.named_modules() if isinstance(m, kind)}

    wide = {n for n in names(CausalConv3d) if module.get_submodule(n).kernel_size != (1, 1, 1)}
    assert set(modules(module, plan.fronts)) == names(Front)
    assert set(modules(module, plan.drops)) == names(DropFirst)
    assert set(modules(module, plan.convolutions)) == wide
    assert {f"{n}.front" for n in wide} <= names(Front)


class TestParts:
    @pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
    @pytest.mark.parametrize("stride", [1, 2, 4])
    @pytest.mark.parametrize("latent", [8, 9, 12])
    def test_every_frame_is_on_one_rank(self, latent: int, stride: int, ranks: int) -> None:
        frames = 1 + (latent - 1) * stride
        parts = Parts("time", frames, stride, ranks)
        assert parts.latent == latent
        assert parts.own == -(-latent // ranks) * stride
        assert parts.missing + frames + parts.padding == ranks * parts.own
        assert parts.scaled(1) == Parts("time", latent, 1, ranks)
        assert parts.scaled(1).scaled(stride) == parts

    def test_rows_are_not_padded(self) -> None:
        parts = Parts("rows", 24, 8, 3)
        assert (parts.latent, parts.own, parts.missing, parts.padding) == (3, 8, 0, 0)
        assert parts.scaled(1) == Parts("rows", 3, 1, 3)

    @pytest.mark.parametrize(("latent_frames", "ranks"), [(5, 1), (5, 2), (5, 4), (1, 1), (2, 1), (17, 16)])
    def test_legal(self, latent_frames: int, ranks: int) -> None:
        assert not list(context_faults(latent_frames, ranks))

    @pytest.mark.parametrize(
        ("latent_frames", "ranks", "legal"), [(5, 8, "1 to 4"), (5, 5, "1 to 4"), (2, 2, "1"), (1, 2, "1")]
    )
    def test_refused(self, latent_frames: int, ranks: int, legal: str) -> None:
        (fault,) = context_faults(latent_frames, ranks)
        assert fault.startswith(f"{latent_frames} latent frames over {ranks} ranks")
        assert fault.endswith(f"use {legal}")

    def test_rows(self) -> None:
        assert not list(row_faults(16, 4))
        assert list(row_faults(18, 4)) == ["18 latent rows are not divisible by 4 ranks; use one of 1 2 3 6 9 18"]


def _refused(pool: Pool, case: Case) -> set[str]:
    """The last line of what each rank raised."""
    with pytest.raises(TaskError) as caught:
        pool.run(case.world, on_ranks, case)
    assert len(caught.value.failures) == case.world, "every rank refuses"
    return {text.strip().splitlines()[-1] for text in caught.value.failures.values()}


def test_a_short_video_is_refused_on_every_rank(pool: Pool) -> None:
    (line,) = _refused(pool, Case(4, 13))
    assert line.startswith("parallel.layout.LayoutError: 4 latent frames over 4 ranks are 1 on each rank")


def test_rows_that_do_not_divide_are_refused(pool: Pool) -> None:
    (line,) = _refused(pool, Case(1, 5, 2, height=12))
    assert line == "parallel.layout.LayoutError: 3 latent rows are not divisible by 2 ranks; use one of 1 3"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drops": ("encoder.first",)}, "encoder.first is a CausalConv3d without count"),
        ({"fronts": ("encoder.first.front", "encoder.middle.front")}, "encoder.middle.front"),
        ({"time": {"encoder.body": (4, 1)}}, "encoder.body"),
    ],
)
def test_a_plan_that_does_not_fit(change: dict[str, Any], message: str) -> None:
    c = Case(1).config
    with torch.device("meta"):
        module = CausalVae(c)
    with pytest.raises(PlanError, match=message):
        apply_context(module, replace(context_plan(c), **change), cast(Any, None))
