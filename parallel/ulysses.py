"""DeepSpeed-Ulysses (2309.14509): around the core, heads are divided instead of tokens.

One all-to-all takes q, k, v from (all heads, own tokens) to (own heads, all tokens), one takes the result back;
each rank sends (n - 1) / n of what it holds. The core between them sees every token, padding stripped, so any
mask, window or grid works as on one device, and odd counts are exact. Where the ranks are a part of those that divide
the tokens (kind ulysses_ring, 2405.07719), it sees the tokens of that part, and what is inside knows of the others.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from parallel.collectives import exchange, gather
from parallel.layout import divisors, words
from parallel.shares import pad_to, share


class UlyssesCore(nn.Module):
    """A core on all tokens and 1/n of the heads: (B, s, N, K) in and out, s = ceil(S / n) tokens of this rank.

    A core that answers to the text as well gives a named tuple: its video's output, and its text's (B, L, N, K).

    Raises ValueError where the ranks do not divide the heads that are left after tensor parallelism.
    """

    def __init__(self, inner: nn.Module, mesh: DeviceMesh):
        super().__init__()
        self.inner = inner
        self.mesh, self.rank, self.size = mesh, mesh.get_local_rank(), mesh.size()

    def forward(
        self, q_BSNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, grid: Any, bias: Any = None, text: Any = None
    ) -> Any:
        heads = q_BSNK.shape[2]
        if heads % self.size:
            raise ValueError(
                f"{heads} heads on each rank are not divisible by parallel.sequence={self.size} in the kind ulysses; "
                f"use one of {words(divisors(heads))}"
            )
        tokens = min(grid.num_tokens, self.size * q_BSNK.shape[1])
        q, k, v = self._to_heads(torch.stack((q_BSNK, k_BSNK, v_BSNK)), tokens)
        own_bias = None if bias is None else self._own(bias, 0)
        if text is not None:
            own = [self._own(x, 2) if x is not None and x.ndim == 4 else x for x in text]
            text = type(text)(*own) if hasattr(text, "_fields") else tuple(own)
        out = self.inner(q, k, v, grid, own_bias, text)
        if isinstance(out, Tensor):
            return self._to_tokens(out)
        video, said = out  # text tokens that ask too: whole on every rank, of some heads here
        return self._to_tokens(video), gather(said, 2, self.mesh)

    def _own(self, x: Tensor, dim: int) -> Tensor:
        return x.chunk(self.size, dim)[self.rank]

    def _to_heads(self, x_3BsNK: Tensor, tokens: int) -> Tensor:
        """(3, B, s, N, K) -> (3, B, S, N/n, K): to each rank its heads, from each rank its tokens, padding off."""
        three, rows, own, heads, dim = x_3BsNK.shape
        x = x_3BsNK.reshape(three, rows, own, self.size, heads // self.size, dim).permute(3, 0, 1, 2, 4, 5)
        x = exchange(x, self.mesh).permute(1, 2, 0, 3, 4, 5)
        return x.flatten(2, 3)[:, :, :tokens]

    def _to_tokens(self, x_BSHK: Tensor) -> Tensor:
        """(B, S, N/n, K) -> (B, s, N, K), the way back."""
        rows, tokens, heads, dim = x_BSHK.shape
        own = share(tokens, self.size)
        x = pad_to(x_BSHK, 1, own * self.size).reshape(rows, self.size, own, heads, dim).transpose(0, 1)
        return exchange(x, self.mesh).permute(1, 2, 0, 3, 4).flatten(2, 3)
