"""Ring, Ulysses in a ring, and whole windows are the same computation as one process; each planted bug shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import dit_case
import pytest
import torch
from dit_case import EVEN, ODD, OF_GRID, Case, errors, loss, on_meta, on_ranks, single, value
from test_layouts import LAYOUTS, MODELS, assert_equal
from test_mesh import fake
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.rank_pool import Pool, TaskError
from parallel import collectives, partial_attention, ring, ring_text, sequence, window
from parallel.dealing import switched_tokens
from parallel.dtensor import fill
from parallel.layout import Layout, LayoutError
from parallel.mesh import build_mesh
from parallel.sequence import apply_sequence
from parallel.shares import share
from vidit.config import FAMILIES
from vidit.model import core
from vidit.model.core import WindowCore
from vidit.model.plan import sharding_plan
from vidit.model.stage import keep_stages, plan_of_stages
from vidit.model.windows import Grid

DEEP, DEEP_EVEN = (5, 5, 3), (4, 4, 4)  # windows for 4 ranks: 5 and 6 (uneven), 4 and 4
REFERENCES: dict[str, dit_case.Result] = {}


def reference(case: Case) -> dit_case.Result:
    key = repr((case.config, case.grid, case.images))
    if key not in REFERENCES:
        REFERENCES[key] = single(case)
    return REFERENCES[key]


def measured(pool: Pool, case: Case, run: Any = on_ranks, argument: Any = None) -> dict[str, float]:
    results = pool.run(Layout(**case.layout).world, run, case if argument is None else argument)
    one = reference(case)
    assert all(r.names == one.names for r in results), "names of the state dict"
    return errors(case, one, results)


@pytest.mark.parametrize(
    ("layout", "grid"), [("sp2", DEEP), ("sp4", DEEP), ("sp4", DEEP_EVEN), ("tp2 sp2", DEEP), ("zero2 sp2", DEEP_EVEN)]
)
@pytest.mark.parametrize("kind", ["ring", "window"])
def test_default_model(pool: Pool, kind: Any, layout: str, grid: Any) -> None:
    """Odd grids; even ones with rows of images and recomputed."""
    even = grid == DEEP_EVEN
    assert_equal(measured(pool, Case(LAYOUTS[layout], {}, grid, even, checkpoint=even, kind=kind)))


# Families are made of parts that the other models have, but for text that attends too; docs/parity.md has all of them.
SINGLE = [model for model in MODELS if model != "bias" and "seen" not in model and model not in FAMILIES]
KINDS = [
    *(("ring", model) for model in (*SINGLE, "cogvideox", "hunyuanvideo", "flux")),
    *(("ulysses_ring", model) for model in ("rope, text keys", "images in frame", "four windows", "two encoders")),
    *(("window", model) for model in SINGLE),
]


@pytest.mark.parametrize(("kind", "model"), KINDS)
def test_every_kind_of_block(pool: Pool, kind: Any, model: str) -> None:
    images = model != "full attention, bare"
    layout, grid = LAYOUTS["sp4"], DEEP if images else ODD
    case = Case(layout, MODELS[model], grid, images, checkpoint=model == "four windows", kind=kind, ulysses=2)
    if kind == "window" and ((0, 0, 0) in MODELS[model].get("windows", ()) or "full_ends" in MODELS[model]):
        with pytest.raises(TaskError, match=r"the whole clip is 1 window, fewer than parallel\.sequence=4"):
            measured(pool, case)
    elif kind == "window" and "temporal_attention" in MODELS[model]:
        with pytest.raises(TaskError, match=r"blocks\.0 mixes tokens in windows of \(1, 0, 0\) and of \(0, 1, 1\)"):
            measured(pool, case)
    else:
        assert_equal(measured(pool, case))


@pytest.mark.parametrize(("model", "grid"), [("cogvideox seen", ODD), ("cogvideox", (3, 1, 1))])
def test_text_around_a_ring(pool: Pool, model: str, grid: Any) -> None:
    """Text that is seen with its padding, and a rank that has no token of the video."""
    assert_equal(measured(pool, Case(LAYOUTS["sp4"], MODELS[model], grid, kind="ring")))


@pytest.mark.parametrize(("grid", "images"), [(DEEP, True), (DEEP_EVEN, False)])
def test_ulysses_in_a_ring(pool: Pool, grid: Any, images: bool) -> None:
    """4 ranks share 2 heads: each pair of neighbours divides them, the pairs form a ring."""
    model = {"num_heads": 2}
    assert_equal(measured(pool, Case(LAYOUTS["sp4"], model, grid, images, kind="ulysses_ring", ulysses=2)))


def test_a_ring_needs_no_heads(pool: Pool) -> None:
    assert_equal(measured(pool, Case(LAYOUTS["sp4"], {"num_heads": 1}, ODD, True, kind="ring")))


@pytest.mark.parametrize("model", ["bias", "full attention, bare"])
def test_ranks_without_tokens(pool: Pool, model: str) -> None:
    """5 tokens: 2, 2, 1 and 0; a single image, so that space-time windows leave it unchanged."""
    assert_equal(measured(pool, Case(LAYOUTS["sp4"], MODELS[model], (1, 5, 1), kind="ring")))


@pytest.mark.parametrize("kind", ["ring", "window"])
def test_without_zero(pool: Pool, kind: Any) -> None:
    """The gradients on their own: what ZeRO averages is already right on each rank, however many tokens it has."""
    assert_equal(measured(pool, Case(LAYOUTS["sp2"], {}, ODD, True, zero=False, kind=kind)))


def compiled(case: Case) -> dit_case.Result:
    """A ring breaks the graph of a block, a switch of windows does not."""
    torch._dynamo.reset()
    with patch.object(nn.Module, "compile", in_pieces if case.kind == "ring" else nn.Module.compile):
        return on_ranks(case)


def in_pieces(module: nn.Module, fullgraph: bool, backend: str) -> None:
    module._compiled_call_impl = torch.compile(module._call_impl, backend=backend)


@pytest.mark.parametrize("kind", ["ring", "window"])
def test_compiled(pool: Pool, kind: Any) -> None:
    model = {**MODELS["rope, text keys"], "num_layers": 2, "qk_norm": False, "pooled_text": False}
    case = Case(LAYOUTS["sp2"], model, ODD, kind=kind, compile="aot_eager")
    assert_equal(measured(pool, case, compiled))


def two_stages(case: Case) -> dit_case.Result:
    """The model as two stages on the same ranks: tokens enter the second as the first left them."""
    mesh, plan = build_mesh(Layout(**case.layout), "cpu"), sharding_plan(case.config)
    stages = nn.ModuleList((on_meta(case), on_meta(case)))
    for stage, layers in zip(stages, (range(2), range(2, 3)), strict=True):
        keep_stages(stage, [layers])
        apply_sequence(stage, plan_of_stages(plan, stage), mesh, case.kind)
    stages.to_empty(device="cpu")
    for name, p in stages.named_parameters():
        fill(p, value(name.partition(".")[2], tuple(p.shape)))
    rows = dit_case.batch(case)
    inputs = {name: x for name, x in rows.items() if name not in ("target", "x_BCTHW", *OF_GRID)}
    tokens = stages[0](rows["x_BCTHW"], Grid(*case.grid, rows["image_B"]), **inputs)
    stages[1].register_forward_pre_hook(lambda module, args: (tokens, *args[1:]))
    total, out = loss(stages[1], rows)
    total.backward()
    dit_case.average(stages, mesh.root)
    grads: dict[str, Tensor] = {}
    for name, p in stages.named_parameters():  # what both stages have has a gradient in each
        own = name.partition(".")[2]
        grads[own] = grads.get(own, 0) + (torch.zeros_like(p) if p.grad is None else p.grad)
    norm = float(torch.stack([g.norm() for g in grads.values()]).norm())
    return dit_case.Result(slice(None), out.detach(), grads, norm, list(on_meta(case).state_dict()))


@pytest.mark.parametrize("kind", ["ring", "window"])
def test_tokens_enter_a_stage_as_the_one_before_left_them(pool: Pool, kind: Any) -> None:
    """The second stage's block has another window than the first's last: how tokens lie is known from the plan."""
    case = Case(LAYOUTS["sp2"], MODELS["rope, text keys"], ODD, kind=kind)
    assert_equal(measured(pool, case, two_stages))


class Sent(TorchDispatchMode):
    """Bytes that leave this rank in all-to-alls, those to itself not counted."""

    def __init__(self, rank: int):
        super().__init__()
        self.rank, self.bytes = rank, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops._c10d_functional.all_to_all_single.default:
            x, _, send = args[:3]
            others = sum(send) - send[self.rank]
            self.bytes += others * x[:1].numel() * x.element_size()
        return func(*args, **(kwargs or {}))


def sent(case: Case) -> tuple[int, int]:
    """(forward, backward) bytes of one rank."""
    mesh, plan, model = build_mesh(Layout(**case.layout), "cpu"), sharding_plan(case.config), on_meta(case)
    apply_sequence(model, plan, mesh, case.kind)
    model.to_empty(device="cpu")
    for name, p in model.named_parameters():
        fill(p, value(name, tuple(p.shape)))
    rank = mesh.sequence.get_local_rank()
    with Sent(rank) as forward:
        total, _ = loss(model, dit_case.batch(case))
    with Sent(rank) as backward:
        total.backward()
    return forward.bytes, backward.bytes


@pytest.mark.parametrize("keys", ["text", "video_and_text"])
def test_bytes_equal_their_formulas(pool: Pool, keys: str) -> None:
    """Two pairs of blocks on 4 ranks, fp64: a residual of width D for each token that changes its rank."""
    model = {"num_layers": 4, "cross_keys": keys, "cross_attention": "all"}
    ranks, rows, width, word, grid = 4, 4, dit_case.TINY["width"], 8, DEEP
    found = {}
    for kind in ("window", "ulysses", "ring"):
        each = pool.run(ranks, sent, Case(LAYOUTS["sp4"], model, grid, kind=kind))
        found[kind] = [sum(r[way] for r in each) for way in (0, 1)]
    a_token, cores = rows * width * word, 4 * (2 if keys == "video_and_text" else 1)
    moved = switched_tokens((1, 0, 0), (0, 2, 2), grid, ranks)
    block = share(75, ranks)
    assert found["window"] == [3 * moved * a_token] * 2
    assert found["ulysses"] == [cores * 4 * (ranks - 1) * block * a_token] * 2
    travelled = cores * 2 * ranks * block * a_token  # k and v, one step of all ranks
    assert found["ring"] == [(ranks - 1) * travelled, (2 * ranks - 1) * travelled]
    assert 4 / 3 * sum(found["window"]) <= 0.27 * sum(found["ulysses"])  # 4 switches, as many as 2 pairs have


def _unscaled(a: Any, b: Any) -> Any:
    return partial_attention.Part(a.out_BsNK + b.out_BsNK, torch.logaddexp(a.lse_BNs, b.lse_BNs))


def _every_key(core: ring.RingCore, grid: Any, own: int, first: int, real: int) -> tuple[tuple[int, int, int], ...]:
    starts = ((core.rank - step) % core.size * own for step in range(core.size))
    return tuple((0, own, start) for start in starts)


def _own_block_only(grad: Tensor, logits: Tensor, place: Tensor, route: ring.Route, block: Any) -> Tensor:
    own = block[2] <= route.first < block[2] + block[1] - block[0]
    return right_with_bias(grad, logits, place, route, block) if own else grad


def _left_away(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """The gradients of k and v are those of the block met last, as without the last step home."""
    found = right_backward(ctx, grad)
    size, group = ctx.route.size, ctx.route.group
    away = [collectives._all_gather(x[None], 0, size, group)[(ctx.route.rank + 1) % size] for x in found[1:3]]
    return found[0], *away, *found[3:]


def _own_words_on_every_rank(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """What text finds in itself is counted by each rank, not the n-th part of it."""
    ctx.size = 1
    return right_words_backward(ctx, grad)


def _own_copy(x: Tensor, group: str) -> Tensor:
    return x


def _first_deal(switch: window.Switch, grid: Any) -> int:
    return 0


def _all_real(window: Any, grid: Any, device: Any) -> None:
    """No window is short, as where the clip has k^2 tokens, or a multiple."""


def _unsorted(x: Tensor, move: window.Move, mesh: Any) -> Tensor:
    leaving = x.transpose(0, 1).index_select(0, move.leaving)
    return collectives.deal(leaving, move.send, move.receive, mesh).transpose(0, 1)


def _first_windows(
    core: WindowCore, q: Tensor, k: Tensor, v: Tensor, grid: Any, bias: Any, text: Any, own: slice
) -> Any:
    return right_within(core, q, k, v, grid, bias, text, slice(0, own.stop - own.start))


def _swapped(*args: Any, **kwargs: Any) -> Any:
    mesh = right_mesh(*args, **kwargs)
    return replace(mesh, ring=mesh.ulysses, ulysses=mesh.ring)


right_with_bias, right_backward = ring._with_bias, ring._Ring.backward
right_words_backward = ring_text._Words.backward
right_within, right_mesh = WindowCore.within, build_mesh
SPLIT = (collectives._Split, "backward", staticmethod(dit_case._split_without_mean))
# What is put in the place of what; kind, layout, model and grid that must see it, and where.
PLANTS: dict[str, tuple[tuple[Any, str, Any], tuple[str, str, str, Any], str]] = {
    "parts merged without their scale": ((ring, "merge", _unscaled), ("ring", "sp2", "bias", ODD), "forward"),
    "padding attended": (
        (ring.RingCore, "_blocks", _every_key), ("ring", "sp2", "full attention, bare", ODD), "forward",
    ),
    "positions start at 0 on every rank": (
        (sequence._Cut, "_own", dit_case._first_places), ("ring", "sp2", "rope, text keys", ODD), "forward",
    ),
    "gradients of keys do not come home": (
        (ring._Ring, "backward", staticmethod(_left_away)), ("ring", "sp4", "bias", ODD), "gradient",
    ),
    "bias learns from the own block only": (
        (ring, "_with_bias", _own_block_only), ("ring", "sp2", "bias", ODD), "gradient",
    ),
    "text's own keys counted on every rank": (
        (ring_text._Words, "backward", staticmethod(_own_words_on_every_rank)), ("ring", "sp2", "cogvideox", ODD),
        "gradient",
    ),
    "text's gradients not summed": (
        (ring_text, "enter_tensor", _own_copy), ("ring", "sp2", "cogvideox", ODD), "gradient",
    ),
    "ring inside and heads across": (
        (dit_case, "build_mesh", _swapped), ("ulysses_ring", "sp4", "bias", DEEP), "forward",
    ),
    "positions not switched": (
        (window.Switch, "_start", _first_deal), ("window", "sp2", "rope, text keys", ODD), "forward",
    ),
    "tokens stay in the order of senders": ((window, "moved", _unsorted), ("window", "sp2", "bias", ODD), "forward"),
    "padding masked in other windows": (
        (WindowCore, "within", _first_windows), ("window", "sp2", "bias", ODD), "forward",
    ),
    "places past the clip attended": ((core, "padding_mask", _all_real), ("window", "sp2", "skips", ODD), "forward"),
    "gradient of uneven shares not averaged": (SPLIT, ("window", "sp2", "bias", ODD), "gradient"),
}  # fmt: skip


@contextmanager
def planted(name: str) -> Iterator[None]:
    owner, attribute, bug = PLANTS[name][0]
    with patch.object(owner, attribute, bug):
        yield


def with_plant(given: tuple[Case, str]) -> dit_case.Result:
    case, name = given
    with planted(name):
        return on_ranks(case)


@pytest.mark.parametrize("plant", PLANTS)
def test_planted_bug_is_caught(pool: Pool, plant: str) -> None:
    _, (kind, layout, model, grid), spoiled = PLANTS[plant]
    case = Case(LAYOUTS[layout], MODELS[model], grid, kind=kind, ulysses=2 if kind == "ulysses_ring" else 0)
    found = measured(pool, case, with_plant, (case, plant))
    assert found[spoiled] > 1e-3, found
    if spoiled == "gradient":
        assert found["forward"] <= 1e-13, "a right forward hides it"
    with pytest.raises(AssertionError):
        assert_equal(found)


def made_while_sampling(_: None) -> list[bool]:
    """Whether what a deal keeps could be saved for a backward pass later."""
    deals = window.Deals([(1, 0, 0), (0, 2, 2)], build_mesh(Layout(sequence=2), "cpu").sequence)
    with torch.inference_mode():
        deals.prepare(ODD, torch.device("cpu"))
    kept = [d.tokens for d in deals.deals.values()] + [m.leaving for m in deals.moves.values()]
    return [x.is_inference() for x in kept]


def test_deals_made_while_sampling_serve_training(pool: Pool) -> None:
    for found in pool.run(2, made_while_sampling, None):
        assert found
        assert not any(found)


def test_grids_are_what_their_names_say() -> None:
    assert [t * h * w % 2 for t, h, w in (ODD, EVEN, DEEP, DEEP_EVEN)] == [1, 0, 1, 0]


@pytest.mark.parametrize("rank", [0, 13, 300, 511])
def test_neighbours_share_heads_and_rings_lead_across(rank: int) -> None:
    """512 ranks, sequence groups of 4 (8 tensor ranks apart): inner pairs next to each other, rings 2 places apart."""
    layout = Layout(2, 2, 4, 4, 8)
    with fake(512, rank):
        mesh = build_mesh(layout, "cpu", 8, ulysses=2)
        assert mesh.ring is not None
        assert mesh.ulysses is not None
        group, inner, outer = (m.mesh.flatten().tolist() for m in (mesh.sequence, mesh.ulysses, mesh.ring))
        place = mesh.sequence.get_local_rank()
    assert rank == group[place]
    assert inner == group[place // 2 * 2 :][:2]
    assert outer == group[place % 2 :: 2]


def test_a_degree_that_does_not_divide() -> None:
    with fake(4, 0), pytest.raises(LayoutError, match=r"parallel\.ulysses=3 does not divide parallel\.sequence=4; use"):
        build_mesh(Layout(sequence=4), "cpu", ulysses=3)
