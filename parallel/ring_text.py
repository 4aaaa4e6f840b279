"""Text tokens that ask as well, beside a ring: whole on every rank, while the video's keys lie on all of them.

They are few, so nothing travels around: each rank attends with all text queries to the video keys that it has, and the
parts of all ranks, with that of the text's own keys, are merged by the online softmax (`partial_attention.py`).

The gradient rule of `sequence.py` holds: what ranks send back for the text has the true gradient as its mean, so the
sum of it is n times that, as the video's keys ask for; of the text's own keys, which no rank divides, each takes its
n-th part.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from parallel.collectives import enter_tensor, gather, group_name
from parallel.partial_attention import Part, attend_part, merge, part_gradients


class Words(NamedTuple):
    """Text queries, keys and values (B, L, N, K), and what each text token sees: None is everything.

    sees_text: (B, 1, 1 or L, L) bool.
    sees_video: (B, 1, L, real) bool, of this rank's tokens without padding.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    sees_text: Tensor | None
    sees_video: Tensor | None


def attend_words(words: Words, k_BsNK: Tensor, v_BsNK: Tensor, real: int, mesh: DeviceMesh) -> Tensor:
    """What text finds in itself and in the video of all ranks, the same on each: (B, L, N, K).

    `real` of this rank's s keys are not padding.
    """
    said: Tensor = _Words.apply(*words, k_BsNK, v_BsNK, real, mesh)  # type: ignore[no-untyped-call]
    return enter_tensor(said, group_name(mesh))


class _Words(torch.autograd.Function):
    """The gradient that comes is the sum of the ranks'."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sees_text: Tensor | None,
        sees_video: Tensor | None,
        k: Tensor,
        v: Tensor,
        real: int,
        mesh: DeviceMesh,
    ) -> Tensor:
        whole = attend_part(query, key, value, sees_text)
        own = _nothing(query) if real == 0 else attend_part(query, k[:, :real], v[:, :real], sees_video)
        wide = torch.promote_types(query.dtype, torch.float32)
        sent = torch.cat((own.out_BsNK.to(wide), own.lse_BNs.to(wide).transpose(1, 2)[..., None]), dim=-1)
        for part in gather(sent[None], 0, mesh):
            whole = merge(whole, Part(part[..., :-1], part[..., -1].transpose(1, 2)))
        out = whole.out_BsNK.to(query.dtype)
        ctx.real, ctx.size = real, mesh.size()
        ctx.save_for_backward(query, key, value, sees_text, sees_video, k, v, out, whole.lse_BNs)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sees_text, sees_video, k, v, out, lse = ctx.saved_tensors
        whole, real = Part(out, lse), ctx.real
        text = part_gradients(grad / ctx.size, query, key, value, sees_text, whole)
        grad_q, grad_k, grad_v = text.query, torch.zeros_like(k), torch.zeros_like(v)
        if real:
            part = part_gradients(grad, query, k[:, :real], v[:, :real], sees_video, whole)
            grad_q = grad_q + part.query
            grad_k, grad_v = (F.pad(x.to(k.dtype), (0, 0, 0, 0, 0, k.shape[1] - real)) for x in (part.key, part.value))
        text_kv = (text.key.to(key.dtype), text.value.to(value.dtype))
        return grad_q.to(query.dtype), *text_kv, None, None, grad_k, grad_v, None, None


def _nothing(query: Tensor) -> Part:
    """Attention to no key."""
    rows, length, heads, _ = query.shape
    return Part(torch.zeros_like(query), query.new_full((rows, heads, length), float("-inf")))
