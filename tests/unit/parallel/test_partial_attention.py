"""Parts of the keys, merged, are attention to all of them: outputs and every gradient, on each device that is here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parallel.partial_attention import attend_part, merge, part_gradients

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]
BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}
ROWS, OWN, HEADS, DIM, CUTS = 2, 9, 3, 16, (9, 5, 7)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mask_of(kind: str, keys: int) -> Tensor | None:
    """Every query sees one of the first keys; some see none of a later part."""
    if kind == "none":
        return None
    sees = draw(ROWS, 1, OWN, keys, seed=7) > 0
    sees[..., : CUTS[0]] |= torch.eye(OWN, dtype=torch.bool)
    sees[:, :, 2, CUTS[0] :] = False
    if kind == "boolean":
        return sees
    return draw(1, HEADS, OWN, keys, seed=8).masked_fill(~sees, float("-inf"))


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("kind", ["none", "boolean", "bias"])
@pytest.mark.parametrize("device", DEVICES)
def test_parts_are_the_whole(kind: str, dtype: torch.dtype, device: str) -> None:
    keys = sum(CUTS)
    wide = [draw(ROWS, n, HEADS, DIM, seed=i).to(dtype).double() for i, n in enumerate((OWN, keys, keys))]
    grad, mask = draw(ROWS, OWN, HEADS, DIM, seed=5).to(dtype).double(), mask_of(kind, keys)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype).double()
    expected = exact(*wide, grad, mask)

    q, k, v, g = (x.to(device, dtype) for x in (*wide, grad))
    m = None if mask is None else mask.to(device, torch.bool if mask.dtype == torch.bool else dtype)
    parts = [
        (slice(sum(CUTS[:i]), sum(CUTS[: i + 1])), None if m is None else m[..., sum(CUTS[:i]) : sum(CUTS[: i + 1])])
        for i in range(len(CUTS))
    ]
    whole = None
    for cut, own_mask in parts:
        part = attend_part(q, k[:, cut], v[:, cut], own_mask)
        whole = part if whole is None else merge(whole, part)
    assert whole is not None
    whole = whole._replace(out_BsNK=whole.out_BsNK.to(dtype))
    found = [part_gradients(g, q, k[:, cut], v[:, cut], own_mask, whole) for cut, own_mask in parts]
    grads = [sum(f.query.double() for f in found), *(torch.cat([f[i] for f in found], 1) for i in (1, 2))]
    if kind == "bias":
        grads.append(torch.cat([f.logits for f in found if f.logits is not None], -1))
    for got, right in zip([whole.out_BsNK, *grads], expected, strict=True):
        assert torch.isfinite(got).all()
        assert (got.cpu().double() - right).norm() <= BOUNDS[dtype] * right.norm()


def exact(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Output and gradients by one softmax over all keys, those of the logits too where they have a bias."""
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    logits = torch.einsum("bsnk,btnk->bnst", q, k) * DIM**-0.5
    logits.retain_grad()
    biased = mask is not None and mask.dtype != torch.bool
    seen = logits
    if mask is not None:
        seen = logits + mask if biased else logits.masked_fill(~mask, float("-inf"))
    out = torch.einsum("bnst,btnk->bsnk", seen.softmax(-1), v)
    out.backward(grad)
    return [out.detach(), *(x.grad for x in (q, k, v, logits)[: 4 if biased else 3] if x.grad is not None)]


@pytest.mark.parametrize("kind", ["boolean", "bias"])
def test_a_query_that_sees_nothing_of_a_part_takes_nothing_from_it(kind: str) -> None:
    q, k = draw(ROWS, OWN, HEADS, DIM, seed=1), draw(ROWS, 4, HEADS, DIM, seed=2)
    mask = torch.ones(1, HEADS if kind == "bias" else 1, OWN, 4, dtype=torch.bool)
    mask[:, :, 3] = False
    given = mask if kind == "boolean" else torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))
    part = attend_part(q, k, k, given)
    assert (part.lse_BNs[:, :, 3] == float("-inf")).all()
    assert part.out_BsNK[:, 3].abs().max() == 0
    assert torch.isfinite(part.lse_BNs[:, :, :3]).all()
