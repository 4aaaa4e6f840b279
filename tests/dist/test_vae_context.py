"""The VAE over time and rows is the same computation as on one rank: outputs, gradients of parameters and inputs."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
import vae_case
from rank_pool import Pool, TaskError
from torch import nn
from vae_case import PLANTS, TINY, Case, errors, on_ranks, single

from parallel.context import apply_context
from parallel.names import PlanError
from parallel.parts import Parts, context_faults, row_faults
from vidit.config import Vae
from vidit.vae.autoencoder import CausalVae
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
