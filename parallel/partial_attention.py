"""Attention to some of the keys at a time, exact once all have been met.

The online softmax (1805.02867; FlashAttention 2205.14135, section 3.1): of each part of the keys the output and the
log of the sum of exponentials (lse) are kept, and two parts are merged by weights exp(lse_i - lse). Backward, the
probabilities of any part are exp(logits - lse) with the lse of all keys, so a part's gradients need no other part.

Fused kernels where torch has one that returns the lse: for a CPU with or without a boolean mask, for CUDA in half
precision without a mask. Everything else, learned biases too, goes by plain arithmetic, in fp32 or wider, which holds
the logits of one part: (B, N, s, t).
"""

from typing import NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten


class Part(NamedTuple):
    """Attention to a part of the keys: (B, s, N, K) and its lse (B, N, s), -inf where a query sees no key of it."""

    out_BsNK: Tensor
    lse_BNs: Tensor


class PartGradients(NamedTuple):
    """Of the queries, keys and values of a part; of its logits (B, N, s, t) where the mask is a bias."""

    query: Tensor
    key: Tensor
    value: Tensor
    logits: Tensor | None


def attend_part(q_BsNK: Tensor, k_BtNK: Tensor, v_BtNK: Tensor, mask: Tensor | None) -> Part:
    """`mask` is boolean (B or 1, 1, s or 1, t) or an additive bias (B or 1, N, s, t)."""
    kernel = _kernel(q_BsNK, mask)
    if kernel is None:
        return _plain(q_BsNK, k_BtNK, v_BtNK, mask)
    q, k, v = (x.transpose(1, 2) for x in (q_BsNK, k_BtNK, v_BtNK))
    if kernel == "cuda":
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    else:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=_additive(mask, q.dtype))
        if mask is not None:  # the kernel says 0 where a query sees nothing
            lse = lse.masked_fill(~mask.any(-1), float("-inf"))
    return Part(out.transpose(1, 2), lse)


def merge(a: Part, b: Part) -> Part:
    """Attention to the keys of both; in `a` every query has seen a key."""
    lse = torch.logaddexp(a.lse_BNs, b.lse_BNs)
    out = a.out_BsNK * _weight(a.lse_BNs - lse) + b.out_BsNK * _weight(b.lse_BNs - lse)
    return Part(out, lse)


def part_gradients(
    grad_BsNK: Tensor, q_BsNK: Tensor, k_BtNK: Tensor, v_BtNK: Tensor, mask: Tensor | None, whole: Part
) -> PartGradients:
    """Gradients through one part; `whole` is the attention to all keys."""
    kernel = _kernel(q_BsNK, mask)
    if kernel is None:
        return _plain_gradients(grad_BsNK, q_BsNK, k_BtNK, v_BtNK, mask, whole)
    given = [x.transpose(1, 2) for x in (grad_BsNK, q_BsNK, k_BtNK, v_BtNK, whole.out_BsNK)]
    lse = whole.lse_BNs
    if kernel == "cuda":
        none = torch.zeros((), dtype=torch.uint64, device=lse.device)  # dropout's seed and offset, without dropout
        own, met = q_BsNK.shape[1], k_BtNK.shape[1]
        found = aten._scaled_dot_product_flash_attention_backward(
            *given, lse, None, None, own, met, 0.0, False, none, none
        )
    else:
        extra = _additive(mask, q_BsNK.dtype)
        found = aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, lse, 0.0, False, attn_mask=extra)
    query, key, value = (x.transpose(1, 2) for x in found)
    return PartGradients(query, key, value, None)


def _kernel(q: Tensor, mask: Tensor | None) -> str | None:
    if q.device.type == "cpu" and (mask is None or mask.dtype == torch.bool):
        return "cpu"
    half = q.dtype in (torch.bfloat16, torch.float16)
    fits = q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return "cuda" if q.is_cuda and half and fits and mask is None else None


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if mask is None else torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, float("-inf"))


def _weight(log_BNs: Tensor) -> Tensor:
    return log_BNs.exp().transpose(1, 2)[..., None]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _logits(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    # Nothing in place: selective activation checkpointing keeps the product.
    logits = torch.einsum("bsnk,btnk->bnst", q * q.shape[-1] ** -0.5, k)
    if mask is None:
        return logits
    return logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Part:
    q, k, v = _wide(q), _wide(k), _wide(v)
    logits = _logits(q, k, mask)
    lowest = torch.finfo(logits.dtype).min
    peak = logits.amax(-1).clamp(min=lowest)  # finite where a query sees nothing
    weights = (logits - peak[..., None]).exp()
    total = weights.sum(-1)
    out = torch.einsum("bnst,btnk->bsnk", weights / total.clamp(min=1e-30)[..., None], v)
    return Part(out, peak + total.log())


def _plain_gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, whole: Part) -> PartGradients:
    grad, q, k, v, out = (_wide(x) for x in (grad, q, k, v, whole.out_BsNK))
    weights = (_logits(q, k, mask) - whole.lse_BNs[..., None]).exp()
    value = torch.einsum("bnst,bsnk->btnk", weights, grad)
    mean = (grad * out).sum(-1).transpose(1, 2)  # over all keys, of the gradients of their weights
    logits = weights * (torch.einsum("bsnk,btnk->bnst", grad, v) - mean[..., None])
    scale = q.shape[-1] ** -0.5
    query = torch.einsum("bnst,btnk->bsnk", logits, k) * scale
    key = torch.einsum("bnst,bsnk->btnk", logits, q) * scale
    biased = mask is not None and mask.dtype != torch.bool
    return PartGradients(query, key, value, logits if biased else None)
