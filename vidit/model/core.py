"""The seam around which attention is built: what mixes video tokens, with no parameters.

A `core` is the only module that does, `attn.core`, and `cross.core` where cross-attention also reads the window
(`cross_keys=video_and_text`), so a sequence-parallel one can take its place without changing a name; everything around
it works token by token.

W.A.L.T. (2312.06662): windows; images pass space-time layers through an identity mask, so their values leave unchanged.
"""

import importlib.util
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidit.config import AnyWindow, whole_window
from vidit.model.context import PADDING, TextKeys, visible
from vidit.model.packed import clip_by_clip, starts
from vidit.model.windows import Grid, merge, numbering, padding_mask, partition

# Keys below which bf16 attention is slower than fp32 on a CPU. Forward and backward of 8192 tokens with AMX, in bf16
# and fp32: 48 keys 75 and 14 ms, 256 keys 44 and 27, 1024 keys 76 and 93 (benchmarks/cpu_attention.py).
CPU_SHORT = 512


def flash_installed() -> bool:
    """Whether flash-attn 2 is; flash-attn-4 is a folder of that name without __init__.py, with other functions."""
    found = importlib.util.find_spec("flash_attn")
    return found is not None and found.origin is not None


def require_flash(backend: str, device: torch.device) -> None:
    """RuntimeError where flash-attn is asked for and cannot run."""
    if backend == "flash" and not (device.type == "cuda" and flash_installed()):
        lacks = "it is not installed" if device.type == "cuda" else f"the device is {device.type}"
        raise RuntimeError(
            f"attention_backend=flash needs flash-attn and a CUDA device, but {lacks}: pip install 'vidit[flash]' "
            "there, or use attention_backend=sdpa, which needs nothing and gives the same"
        )


def is_half(x: Tensor) -> bool:
    return x.dtype in (torch.bfloat16, torch.float16)


def takes_lengths(q: Tensor, backend: str) -> bool:
    """Whether one kernel takes clips of several lengths: flash-attn's, or torch's, for CUDA since Ampere."""
    if backend == "flash":
        return True
    fits = q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return q.is_cuda and is_half(q) and fits and torch.cuda.get_device_capability(q.device) >= (8, 0)


def attend_packed(q_1SNK: Tensor, k_1SNK: Tensor, v_1SNK: Tensor, grid: Grid, backend: str) -> Tensor:
    """Each clip of a packed row within itself, by one kernel: (1, S, N, K)."""
    first, longest = starts(grid, q_1SNK.device), max(t * h * w for t, h, w in grid.clips)
    q, k, v = (x.flatten(0, 1) for x in (q_1SNK, k_1SNK, v_1SNK))
    given = q, k, v, first, first, longest, longest
    if backend == "flash":
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(*given, deterministic=torch.are_deterministic_algorithms_enabled())[None]
    from torch.nn.attention.varlen import varlen_attn

    out = cast(Tensor, varlen_attn(*given))
    return out[None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, backend: str) -> Tensor:
    """Softmax attention, (B, S, N, K) throughout; `mask` is boolean or an additive bias, (B or 1, N or 1, S, S')."""
    if backend == "flash":
        if mask is not None:
            raise ValueError("attention_backend=flash takes no mask or bias here; use attention_backend=sdpa")
        from flash_attn import flash_attn_func

        return flash_attn_func(q, k, v, deterministic=torch.are_deterministic_algorithms_enabled())
    dtype = q.dtype
    if is_half(q) and q.device.type == "cpu" and k.shape[1] < CPU_SHORT:
        q, k, v = q.float(), k.float(), v.float()
        mask = mask.float() if mask is not None and mask.is_floating_point() else mask
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).to(dtype)


class Pairs(NamedTuple):
    """Which tokens of a clip see each other, for a core that meets keys in another order than windows.

    group_BS: (B or 1, S) int, a token sees the tokens of its own group; None where every token sees every other.
    place_S: number of a token in its window: the bias of a query and a key stands at their two places.
    text_BSL: (B, S or 1, L) bool, which text a token sees; None without text keys.
    unchanged_B: rows whose values leave unchanged; None where there are none.
    """

    group_BS: Tensor | None
    place_S: Tensor
    text_BSL: Tensor | None
    unchanged_B: Tensor | None


def kept_values(v: Tensor, q: Tensor, k: Tensor, bias_NWW: Tensor | None) -> Tensor:
    """The values, with gradients of 0 for the rest, as rows of images have them beside rows of clips.

    Ranks that divide parameters sum the gradients of the same ones, whatever clips each of them has.
    """
    nothing = (q + k) * 0
    return v + (nothing if bias_NWW is None else nothing + (bias_NWW.sum() * 0).to(v.dtype))


class WindowCore(nn.Module):
    """Attention inside windows; 0 in `window` is the whole axis, so (0, 0, 0) is full attention. Some skip (`folded`).

    q, k, v (B, S, N, K) hold every token of `grid`; `bias_NWW` is added to the logits of each window; `text`
    adds keys that all windows see. Images in a window that spans latent frames (T of them in a row, or one as
    a one-frame grid) keep their values with `identity_images` (W.A.L.T.), else attend within their own frame.

    `within`, `pairs` and `reach` tell the same to who has some of the windows, or some of the tokens.
    """

    def __init__(self, window: AnyWindow, backend: str = "sdpa", identity_images: bool = False):
        super().__init__()
        self.window = window
        self.backend = backend
        self.identity_images = identity_images

    def forward(
        self,
        q_BSNK: Tensor,
        k_BSNK: Tensor,
        v_BSNK: Tensor,
        grid: Grid,
        bias_NWW: Tensor | None = None,
        text: TextKeys | None = None,
    ) -> Tensor:
        if grid.clips:
            assert bias_NWW is None, "the bias of a window depends on the clip"
            if self.is_one_kernel(grid, text) and takes_lengths(q_BSNK, self.backend):
                return attend_packed(q_BSNK, k_BSNK, v_BSNK, grid, self.backend)
            each: Tensor = clip_by_clip(self, q_BSNK, k_BSNK, v_BSNK, grid, text)
            return each
        if self.keeps_values(grid):
            return kept_values(v_BSNK, q_BSNK, k_BSNK, bias_NWW)
        window = whole_window(self.window, grid.shape)
        q, k, v = (partition(x, window, grid) for x in (q_BSNK, k_BSNK, v_BSNK))
        return merge(self.within(q, k, v, grid, bias_NWW, text), window, grid)

    def is_one_kernel(self, grid: Grid, text: TextKeys | None) -> bool:
        """Whether every token of each clip of a packed row sees all of it and nothing else."""
        alone = any(t == 1 for t, _, _ in grid.clips) and self.identity_images
        return self.window == (0, 0, 0) and text is None and grid.image_B is None and not alone

    def keeps_values(self, grid: Grid) -> bool:
        """Whether every row is one image that passes unchanged."""
        return self.identity_images and grid.frames == 1

    def within(
        self,
        q_XWNK: Tensor,
        k_XWNK: Tensor,
        v_XWNK: Tensor,
        grid: Grid,
        bias_NWW: Tensor | None = None,
        text: TextKeys | None = None,
        own: slice = slice(None),
    ) -> Tensor:
        """Attention of windows that are cut already: (B * windows, W, N, K), as `partition` cuts them.

        `own` chooses the windows that are here, out of all of the grid in the order of `partition`.
        """
        if self.keeps_values(grid):
            return kept_values(v_XWNK, q_XWNK, k_XWNK, bias_NWW)
        window = whole_window(self.window, grid.shape)
        mask = self._own_keys(window, grid, q_XWNK, own)
        k, v = k_XWNK, v_XWNK
        if text is not None:
            num_windows = q_XWNK.shape[0] // text.frame_BL.shape[0]
            k = torch.cat((k, text.key_BLNK.repeat_interleave(num_windows, 0)), dim=1)
            v = torch.cat((v, text.value_BLNK.repeat_interleave(num_windows, 0)), dim=1)
            mask = self._with_text(mask, text.frame_BL, window, grid, q_XWNK, own)
        if bias_NWW is not None:
            bias = F.pad(bias_NWW, (0, k.shape[1] - bias_NWW.shape[-1])).to(q_XWNK.dtype)[None]
            mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
        out = attend(q_XWNK, k, v, mask, self.backend)
        if grid.image_B is not None and self.identity_images:
            image_X = grid.image_B.repeat_interleave(out.shape[0] // grid.image_B.shape[0])
            out = torch.where(image_X[:, None, None, None], v_XWNK, out)
        return out

    def pairs(self, grid: Grid, device: torch.device, text: TextKeys | None = None) -> Pairs | None:
        """Who sees whom, token by token; None where every value leaves unchanged."""
        if self.keeps_values(grid):
            return None
        window = whole_window(self.window, grid.shape)
        window_S, place_S = numbering(window, grid, device)
        group = None if window == grid.shape else window_S[None]
        unchanged = grid.image_B if self.identity_images else None
        sees_text = None if text is None else (text.frame_BL != PADDING)[:, None]
        if grid.image_B is not None:
            frame_S = torch.arange(grid.frames, device=device).repeat_interleave(grid.height * grid.width)
            if window[0] != 1 and not self.identity_images:
                group = torch.where(grid.image_B[:, None], window_S * grid.frames + frame_S, window_S * grid.frames)
            if text is not None:
                sees_text = visible(text.frame_BL, frame_S)
        return Pairs(group, place_S, sees_text, unchanged)

    def reach(self, grid: Grid, first: int, last: int) -> tuple[int, int]:
        """Outside of which tokens the tokens first .. last - 1 see nothing: whole latent frames, as [first, last)."""
        window, plane = whole_window(self.window, grid.shape), grid.height * grid.width
        if len(window) == 2:
            return 0, grid.num_tokens
        t = window[0]
        return first // plane // t * t * plane, min(grid.frames, ((last - 1) // plane // t + 1) * t) * plane

    def _own_keys(self, window: AnyWindow, grid: Grid, q: Tensor, own: slice) -> Tensor | None:
        """Which tokens of its window each token sees: (B * windows, 1, 1 or W, W), or None for all of them."""
        real_XW = padding_mask(window, grid, q.device)
        if real_XW is not None:
            real_XW = real_XW[own]
        if grid.image_B is None or window[0] == 1 or self.identity_images:
            if real_XW is None:
                return None
            return real_XW.repeat(q.shape[0] // real_XW.shape[0], 1)[:, None, None, :]
        frame_XW = self._frames(window, grid, q.device)[own]
        image_X = grid.image_B.repeat_interleave(len(frame_XW))[:, None, None]
        sees = (frame_XW[:, :, None] == frame_XW[:, None, :]).repeat(len(grid.image_B), 1, 1) | ~image_X
        if real_XW is not None:
            sees = sees & real_XW.repeat(len(grid.image_B), 1)[:, None, :]
        return sees[:, None]

    def _with_text(
        self, mask: Tensor | None, frame_BL: Tensor, window: AnyWindow, grid: Grid, q: Tensor, own: slice
    ) -> Tensor:
        """The mask over (window keys, text keys): (B * windows, 1, W or 1, W + L)."""
        num_windows = q.shape[0] // frame_BL.shape[0]
        if grid.image_B is None:
            sees_text = (frame_BL != PADDING).repeat_interleave(num_windows, 0)[:, None, :]
        else:
            frame_XW = self._frames(window, grid, q.device)[own]
            sees_text = visible(frame_BL, frame_XW.flatten()).reshape(q.shape[0], q.shape[1], -1)
        own_keys = sees_text.new_ones(q.shape[0], 1, q.shape[1]) if mask is None else mask[:, 0]
        rows = max(own_keys.shape[1], sees_text.shape[1])
        return torch.cat((own_keys.expand(-1, rows, -1), sees_text.expand(-1, rows, -1)), dim=-1)[:, None]

    @staticmethod
    def _frames(window: AnyWindow, grid: Grid, device: torch.device) -> Tensor:
        """The latent frame of every token of every window: (windows, W), 0 past the grid."""
        frame_S = torch.arange(grid.frames, device=device).repeat_interleave(grid.height * grid.width)
        return partition(frame_S[None, :, None], window, grid)[..., 0]
