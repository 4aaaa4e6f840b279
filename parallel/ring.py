"""Ring attention (2310.01889): keys and values travel around the ranks, each rank keeps its queries.

In n steps every rank meets the keys of all: while it attends to those that it has, they are already on the way to the
next rank. The parts are merged by the online softmax (`partial_attention.py`), so the result is exact; nothing is
divided but tokens, so it works with fewer heads than ranks. Backward, keys and values travel again and take their
gradients along, which come home after n steps; a rank holds its own q, k, v and output, O(S / n), between the two.

A block of keys that no query of this rank sees, by what the core says of its windows, passes without arithmetic.
A compiled block breaks its graph here: traced by torch 2.11, the gradients of q, k and v come out as zeros.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from parallel.collectives import arrived, group_name, pass_on
from parallel.names import PlanError
from parallel.partial_attention import Part, attend_part, merge, part_gradients
from parallel.ring_text import Words, attend_words
from parallel.shares import pad_to


class Route(NamedTuple):
    """A rank's way through one layer: which of the clip's tokens its queries are, which keys it meets at each step.

    `blocks` has, for each step, [first, last) of the keys to attend to inside the block of that step, and the number
    of the first of them in the clip.
    """

    rank: int
    size: int
    group: str
    first: int
    blocks: tuple[tuple[int, int, int], ...]


class RingCore(nn.Module):
    """A core on s = ceil(S / n) tokens of this rank, padding included: (B, s, N, K) in and out.

    Besides the call, the core that it takes the place of has `pairs(grid, device, text)`, which says who sees whom
    (None: every value leaves unchanged), and `reach(grid, first, last)`, outside of which some tokens see nothing.
    One whose text tokens ask too gets their queries as the third of `text`, and has `words_see(grid, text)`: which text
    (B, 1 or L, L) and which video (B, L, S) each of them sees, bool, None for all. It then gives (video, text).
    """

    def __init__(self, inner: nn.Module, mesh: DeviceMesh):
        super().__init__()
        if not (hasattr(inner, "pairs") and hasattr(inner, "reach")):
            raise PlanError(
                f"{type(inner).__name__} does not say who sees whom (`pairs`, `reach`), which a ring has to know; use "
                "the kind ulysses"
            )
        self.inner, self.mesh = inner, mesh
        self.rank, self.size, self.group = mesh.get_local_rank(), mesh.size(), group_name(mesh)

    def forward(
        self, q_BsNK: Tensor, k_BsNK: Tensor, v_BsNK: Tensor, grid: Any, bias: Any = None, text: Any = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        inner: Any = self.inner
        pairs = inner.pairs(grid, q_BsNK.device, text)
        if pairs is None:  # where a token's place does not matter
            kept: Tensor = inner(q_BsNK, k_BsNK, v_BsNK, grid, bias)
            return kept
        own = q_BsNK.shape[1]
        first = self.rank * own
        real = max(0, min(own, grid.num_tokens - first))
        route = Route(self.rank, self.size, self.group, first, self._blocks(grid, own, first, real))
        keys = (None, None) if text is None else (text[0], text[1])
        seen = None if pairs.text_BSL is None else self._own_text(pairs.text_BSL, first, real)
        given = (k_BsNK, v_BsNK, *keys, bias, pairs.group_BS, pairs.place_S, seen)
        out = pad_to(_ring(q_BsNK[:, :real], *given, route), 1, own)
        if pairs.unchanged_B is not None:
            out = torch.where(pairs.unchanged_B[:, None, None, None], v_BsNK, out)
        if not hasattr(inner, "words_see"):
            return out
        sees_text, sees_video = inner.words_see(grid, text)
        own_video = None if sees_video is None else sees_video[:, None, :, first : first + real]
        words = Words(text[2], text[0], text[1], None if sees_text is None else sees_text[:, None], own_video)
        return out, _words(words, k_BsNK, v_BsNK, real, self.mesh)

    def _own_text(self, text_BSL: Tensor, first: int, real: int) -> Tensor:
        own = text_BSL if text_BSL.shape[1] == 1 else text_BSL[:, first : first + real]
        return own[:, None]

    def _blocks(self, grid: Any, own: int, first: int, real: int) -> tuple[tuple[int, int, int], ...]:
        """Of the block met at each step, the keys that exist and that this rank's queries may see."""
        inner: Any = self.inner
        low, high = inner.reach(grid, first, first + real) if real else (0, 0)
        blocks = []
        for step in range(self.size):
            start = (self.rank - step) % self.size * own
            begin, end = max(start, low), min(start + own, high, grid.num_tokens)
            blocks.append((begin - start, end - start, begin) if begin < end else (0, 0, 0))
        return tuple(blocks)


class _Ring(torch.autograd.Function):
    """q (B, real, N, K), all else of whole blocks; `seen` (B, 1, real or 1, L) is the text that q sees."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        text_key: Tensor | None,
        text_value: Tensor | None,
        bias: Tensor | None,
        group: Tensor | None,
        place: Tensor,
        seen: Tensor | None,
        route: Route,
    ) -> Tensor:
        whole = None
        for block, kv in _meet(torch.stack((k, v)), route):
            begin, end, _ = block
            if begin < end:
                mask = _mask(bias, group, place, route, block, q.shape[1])
                part = attend_part(q, kv[0][:, begin:end], kv[1][:, begin:end], mask)
                whole = part if whole is None else merge(whole, part)
        if whole is None:  # this rank has padding only
            whole = Part(torch.zeros_like(q), q.new_zeros(q.shape[0], q.shape[2], 0))
        elif text_key is not None and text_value is not None:
            whole = merge(whole, attend_part(q, text_key, text_value, seen))
        out = whole.out_BsNK.to(q.dtype)
        ctx.route = route
        ctx.save_for_backward(q, k, v, text_key, text_value, bias, group, place, seen, out, whole.lse_BNs)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, text_key, text_value, bias, group, place, seen, out, lse = ctx.saved_tensors
        route, whole = ctx.route, Part(out, lse)
        wide = torch.promote_types(q.dtype, torch.float32)
        grad_q, travelling = torch.zeros_like(q, dtype=wide), None
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=wide)
        for block, kv in _meet(torch.stack((k, v)), route):
            begin, end, _ = block
            if begin < end:
                mask = _mask(bias, group, place, route, block, q.shape[1])
                part = part_gradients(grad, q, kv[0][:, begin:end], kv[1][:, begin:end], mask, whole)
                grad_q = grad_q + part.query
                grad_kv = F.pad(torch.stack((part.key, part.value)).to(wide), _around(begin, end, kv))
                if grad_bias is not None and part.logits is not None:
                    grad_bias = _with_bias(grad_bias, part.logits, place, route, block)
            else:
                grad_kv = torch.zeros_like(kv, dtype=wide)
            if travelling is not None:
                grad_kv = grad_kv + arrived(travelling)
            travelling = _pass_on(grad_kv, route)  # after the last step, home
        assert travelling is not None
        grad_k, grad_v = arrived(travelling).to(k.dtype)
        grad_text: list[Tensor | None] = [None, None]
        if text_key is not None:
            grad_text = [torch.zeros_like(text_key), torch.zeros_like(text_value)]
            if q.shape[1]:
                part = part_gradients(grad, q, text_key, text_value, seen, whole)
                grad_q = grad_q + part.query
                grad_text = [part.key.to(text_key.dtype), part.value.to(text_value.dtype)]
        grad_bias = None if grad_bias is None else grad_bias.to(bias.dtype)
        return grad_q.to(q.dtype), grad_k, grad_v, *grad_text, grad_bias, None, None, None, None


@torch.compiler.disable(recursive=True)  # type: ignore[no-untyped-call, untyped-decorator]
def _ring(*given: Any) -> Tensor:
    out: Tensor = _Ring.apply(*given)  # type: ignore[no-untyped-call]
    return out


@torch.compiler.disable(recursive=True)  # type: ignore[no-untyped-call, untyped-decorator]
def _words(*given: Any) -> Tensor:
    return attend_words(*given)


def _meet(kv: Tensor, route: Route) -> Iterator[tuple[tuple[int, int, int], Tensor]]:
    """(block, keys and values) of each step; those of the next are on their way while these are used."""
    for step, block in enumerate(route.blocks):
        coming = _pass_on(kv, route) if step + 1 < route.size else None
        yield block, kv
        if coming is not None:
            kv = arrived(coming)


def _pass_on(x: Tensor, route: Route) -> Tensor:
    return pass_on(x, route.rank, route.size, route.group)


def _mask(
    bias: Tensor | None, group: Tensor | None, place: Tensor, route: Route, block: tuple[int, int, int], own: int
) -> Tensor | None:
    """What the queries see of a block: None for all of it, boolean, or with the bias as logits."""
    begin, end, first = block
    mine, theirs = slice(route.first, route.first + own), slice(first, first + end - begin)
    sees = None if group is None else (group[:, mine, None] == group[:, None, theirs])[:, None]
    if bias is None:
        return sees
    logits = bias[:, place[mine, None], place[None, theirs]][None]
    return logits if sees is None else logits.masked_fill(~sees, float("-inf"))


def _around(begin: int, end: int, kv: Tensor) -> tuple[int, ...]:
    """Padding from keys begin .. end - 1 to the whole block, as `F.pad` takes it: the last dim first."""
    return (0, 0, 0, 0, begin, kv.shape[2] - end)


def _with_bias(grad_bias: Tensor, logits: Tensor, place: Tensor, route: Route, block: tuple[int, int, int]) -> Tensor:
    """The gradient of the (N, W, W) bias with that of a block's logits (B, N, s, t) added where they came from."""
    begin, end, first = block
    mine = place[route.first : route.first + logits.shape[2], None]
    at = mine * grad_bias.shape[-1] + place[None, first : first + end - begin]
    added = grad_bias.flatten(1).index_add(1, at.flatten(), logits.sum(0).flatten(1))
    return added.reshape(grad_bias.shape)
