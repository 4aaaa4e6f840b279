"""Self- and cross-attention of the DiT, around the core of `vidit/model/core.py`.

W.A.L.T. (2312.06662): QK-norm, cross-attention whose keys are the video tokens of the window and the text (section
3.2). Relative position bias as in Swin (2103.14030, eq. 4).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidit.config import AnyWindow, Model, Window, whole_window
from vidit.model.context import Positions, TextContext, TextKeys, text_mask
from vidit.model.core import WindowCore, attend
from vidit.model.linear import Linear
from vidit.model.norm import query_key_norm
from vidit.model.packed import clips_of_runs, runs_within, side_by_side, tokens_of_runs
from vidit.model.rope import rotate
from vidit.model.windows import Grid


class RelativeBias(nn.Module):
    """A learned logit for every offset inside a window: (N, W, W) from a table of the 3D offsets (Swin, eq. 4)."""

    def __init__(self, window: Window, num_heads: int):
        super().__init__()
        self.window = window
        offsets = (2 * window[0] - 1) * (2 * window[1] - 1) * (2 * window[2] - 1)
        self.table = nn.Parameter(torch.empty(num_heads, offsets))

    def forward(self, grid: Grid) -> Tensor:
        window = whole_window(self.window, grid.shape)
        device = self.table.device
        axes = torch.meshgrid(*(torch.arange(size, device=device) for size in window), indexing="ij")
        index = torch.zeros((), dtype=torch.long, device=device)
        for axis, largest in zip(axes, self.window, strict=True):
            place = axis.flatten()
            index = index * (2 * largest - 1) + place[:, None] - place[None, :] + largest - 1
        return self.table[:, index]


class SelfAttention(nn.Module):
    """Windowed self-attention: (B, S, D) -> (B, S, D)."""

    def __init__(self, c: Model, window: AnyWindow, identity_images: bool):
        super().__init__()
        self.head_dim = c.width // c.num_heads
        self.query, self.key, self.value, self.out = (Linear(c.width, c.width) for _ in range(4))
        self.query_norm, self.key_norm = query_key_norm(c), query_key_norm(c)
        self.bias = RelativeBias(window, c.num_heads) if c.relative_position == "bias" and len(window) == 3 else None
        # Within one frame angles of time turn queries and keys alike.
        self.rope = c.relative_position == "rope" and not (c.rope_split == "time" and window[0] == 1)
        self.core: nn.Module = WindowCore(window, c.attention_backend, identity_images)

    def forward(self, x_BSD: Tensor, positions: Positions, grid: Grid) -> Tensor:
        bias = None if self.bias is None else self.bias(grid)
        return self.out(self.core(*self.heads(x_BSD, positions), grid, bias).flatten(-2))

    def heads(self, x_BSD: Tensor, positions: Positions | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, S, N, K); without positions they are not turned."""
        heads = (-1, self.head_dim)
        q = self.query_norm(self.query(x_BSD).unflatten(-1, heads))
        k = self.key_norm(self.key(x_BSD).unflatten(-1, heads))
        v = self.value(x_BSD).unflatten(-1, heads)
        if self.rope and positions is not None:
            q = rotate(q, positions.cos_SK, positions.sin_SK)
            k = rotate(k, positions.cos_SK, positions.sin_SK)
        return q.to(v.dtype), k.to(v.dtype), v


class CrossAttention(nn.Module):
    """Video tokens attend to text, and with `cross_keys=video_and_text` to the tokens of their own window as well.

    `text_width` is that of the text where it is not the model's (`text_embedding=none`).
    """

    def __init__(self, c: Model, window: AnyWindow, text_width: int = 0):
        super().__init__()
        self.head_dim = c.width // c.num_heads
        self.query, self.out = (Linear(c.width, c.width) for _ in range(2))
        self.key, self.value = (Linear(text_width or c.width, c.width) for _ in range(2))
        self.query_norm, self.key_norm = query_key_norm(c), query_key_norm(c)
        self.core = WindowCore(window, c.attention_backend) if c.cross_keys == "video_and_text" else None

    def forward(self, x_BSD: Tensor, text: TextContext, positions: Positions, grid: Grid) -> Tensor:
        heads = (-1, self.head_dim)
        q = self.query_norm(self.query(x_BSD).unflatten(-1, heads)).to(x_BSD.dtype)
        text_k = self.key_norm(self.key(text.features_BLD).unflatten(-1, heads)).to(x_BSD.dtype)
        text_v = self.value(text.features_BLD).unflatten(-1, heads)
        if self.core is not None:
            assert text.frame_BL is not None, "windows mask the text's padding"
            k = self.key_norm(self.key(x_BSD).unflatten(-1, heads)).to(x_BSD.dtype)
            v = self.value(x_BSD).unflatten(-1, heads)
            out = self.core(q, k, v, grid, text=TextKeys(text_k, text_v, text.frame_BL))
        else:
            out = attend_text(q, text_k, text_v, text.frame_BL, positions, grid)
        return self.out(out.flatten(-2))


def attend_text(
    q: Tensor, k_BLNK: Tensor, v_BLNK: Tensor, frame_BL: Tensor | None, positions: Positions, grid: Grid
) -> Tensor:
    """Video tokens (B, S, N, K) attend to text alone; those of a packed row clip by clip, each to its own."""
    if not grid.clips:
        return attend(q, k_BLNK, v_BLNK, text_mask(frame_BL, positions, grid), "sdpa")
    first, num = 0, q.shape[1]
    if num < grid.num_tokens:
        assert positions.first is not None, "a part of a packed row knows where it begins"
        first = positions.first.among(positions.position_S3, grid)
    each = list(runs_within(grid, first, num))
    masks: list[Tensor | None] = [None] * len(each)
    if frame_BL is not None:
        frames = clips_of_runs(frame_BL, each)
        masks = [text_mask(own_BL, positions, run.grid) for own_BL, run in zip(frames, each, strict=True)]
    keys, values = clips_of_runs(k_BLNK, each), clips_of_runs(v_BLNK, each)
    found = [attend(*own, "sdpa") for own in zip(tokens_of_runs(q, each), keys, values, masks, strict=True)]
    padding = max(0, first + num - grid.num_tokens)
    out = side_by_side(found)
    return F.pad(out, (0, 0, 0, 0, 0, padding)) if padding else out
