"""NCCL on one rank: FSDP2, tensor and sequence parallelism around the DiT give the numbers of the bare model.

One rank shows that the process group, the streams and the dtypes work; that ranks divide the work rightly is shown on
a CPU (tests/dist).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from parallel import collectives
from parallel.dtensor import fill
from parallel.gradients import clip_gradients, gradient_norm
from parallel.kinds import SequenceKind
from parallel.layout import Layout
from parallel.mesh import Mesh, build_mesh
from parallel.sequence import apply_sequence
from parallel.tensor import apply_tensor
from parallel.zero import Level, apply_zero
from vidit.config import Model, Train
from vidit.model.dit import DiT, text_frames
from vidit.model.init import initial_value
from vidit.model.plan import sharding_plan
from vidit.model.windows import Grid
from vidit.train.optim import build_optimizer
from vidit.train.recompute import recompute

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

GRID, TEXT = (3, 5, 6), 16
CONFIG = Model(num_layers=3, width=64, num_heads=4, mlp_width=128, windows=((1, 0, 0), (0, 2, 4)))
ONE_KIND = CONFIG.model_copy(update={"windows": ((1, 0, 0),)})  # of block, and so one graph to compile


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=device)
    yield build_mesh(Layout(), "cuda")
    dist.destroy_process_group()


@dataclass
class Step:
    """One training step: output, gradients, their norm, and the parameters after the update."""

    out: Tensor
    grads: dict[str, Tensor]
    norm: float
    parameters: dict[str, Tensor]


def one_step(
    dtype: torch.dtype,
    apply: Callable[[DiT], None] = lambda model: None,
    config: Model = CONFIG,
    compiled: bool = False,
) -> Step:
    """Of a model that `apply` has changed; fp64 all through, or fp32 masters under a narrower `dtype`."""
    masters = torch.promote_types(dtype, torch.float32)
    with torch.device("meta"):
        model = DiT(config, 4, GRID, TEXT).to(masters)
    model.dtype = dtype
    for block in model.blocks.values() if compiled else ():
        recompute(block)
        block.compile(fullgraph=True)
    apply(model)
    model.to_empty(device="cuda")
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():  # what starts at zero would hide the blocks
        noise = 0.05 * torch.randn(p.shape, generator=generator)
        fill(p, (initial_value(name, tuple(p.shape), 0) + noise).to("cuda", masters))
    x = torch.randn(2, 4, *GRID, generator=generator).to("cuda", masters)
    text = torch.randn(2, 7, TEXT, generator=generator).to("cuda", masters)
    time_B, mask_BL = torch.tensor([100.0, 700.0], device="cuda"), torch.arange(7, device="cuda") < 5
    optimizer = build_optimizer(Train(learning_rate=1e-2), dict(model.named_parameters()))
    out = model(x, Grid(*GRID), time_B, text, text_frames(mask_BL.expand(2, -1)))
    out.square().mean().backward()
    norm = gradient_norm(model.parameters())
    clip_gradients(model.parameters(), 0.1, norm)
    grads = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    after = {name: whole(p) for name, p in model.named_parameters()}
    return Step(out.detach(), grads, float(norm), after)


def whole(x: Any) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def assert_same(found: Step, expected: Step, bound: float) -> None:
    """Relative errors of everything; a gradient counts as 1e-6 of the largest at least."""
    assert float((found.out - expected.out).norm() / expected.out.norm()) <= bound
    assert abs(found.norm / expected.norm - 1) <= bound
    assert found.grads.keys() == expected.grads.keys()
    floor = 1e-6 * max(float(g.norm()) for g in expected.grads.values())
    for name, grad in expected.grads.items():
        assert float((found.grads[name] - grad).norm()) <= bound * max(floor, float(grad.norm())), name
    assert found.parameters.keys() == expected.parameters.keys()
    if bound < 1e-9:  # AdamW divides by the gradient's size: where that is mere noise, so is the update
        for name, parameter in expected.parameters.items():
            torch.testing.assert_close(found.parameters[name], parameter, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-11), (torch.bfloat16, 2e-2)], ids=["fp64", "bf16"])
@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_zero(mesh: Mesh, level: Level, dtype: torch.dtype, bound: float) -> None:
    sharded = one_step(dtype, lambda model: apply_zero(model, ["blocks.*"], mesh.zero, level=level))
    assert_same(sharded, one_step(dtype), bound)


def test_a_gradient_that_is_not_summed_is_seen(mesh: Mesh) -> None:
    """The comparison above can fail: a wrong divisor is a wrong gradient."""

    def halved(model: DiT) -> None:
        apply_zero(model, ["blocks.*"], mesh.zero)
        for unit in (*model.blocks.values(), model):
            unit.set_gradient_divide_factor(2.0)

    with pytest.raises(AssertionError):
        assert_same(one_step(torch.float64, halved), one_step(torch.float64), 2e-2)


@pytest.mark.parametrize("kind", ["ulysses", "ring", "window"])
def test_tensor_sequence_and_zero(mesh: Mesh, kind: SequenceKind) -> None:
    plan = sharding_plan(CONFIG)

    def all_axes(model: DiT) -> None:
        apply_tensor(model, plan.parameters, plan.regions, mesh.tensor, CONFIG.num_heads)
        apply_sequence(model, plan, mesh, kind)
        apply_zero(model, [plan.blocks], mesh.zero)

    assert_same(one_step(torch.float64, all_axes), one_step(torch.float64), 1e-11)


def test_compiled_blocks_that_recompute_under_zero(mesh: Mesh) -> None:
    """Inductor computes some constants in fp32."""

    def zero(model: DiT) -> None:
        apply_zero(model, ["blocks.*"], mesh.zero)

    assert_same(one_step(torch.float64, zero, ONE_KIND, compiled=True), one_step(torch.float64, config=ONE_KIND), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_collectives_of_one_rank_change_nothing(mesh: Mesh, dtype: torch.dtype) -> None:
    sequence, group = mesh.sequence, collectives.group_name(mesh.tensor)
    x = torch.randn(1, 6, 8, device="cuda", dtype=dtype, requires_grad=True)
    moved = collectives.exchange(collectives.gather(collectives.split(x, 1, sequence), 1, sequence), sequence)
    out = collectives.leave_tensor(collectives.enter_tensor(moved, group), group)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    assert torch.equal(out, x)
    assert x.grad is not None
    assert torch.equal(x.grad, weight)
