"""Joint attention of video and text: text tokens ask as well, by the same projections or by their own.

The same are CogVideoX's (2408.06072), their own those of the MMDiT: SD3 (2403.03206), FLUX, HunyuanVideo (2412.03603).

The two stay apart: `Streams` keeps the token axis of the video pure, so it can be divided over ranks while text is
whole on each. Only the core sees both; to it the text's queries, keys and values are an argument of their own.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidit.config import AnyWindow, Model
from vidit.model.attention import SelfAttention
from vidit.model.context import EVERY_FRAME, PADDING, Positions, TextContext
from vidit.model.core import Pairs, attend
from vidit.model.linear import Linear
from vidit.model.norm import query_key_norm
from vidit.model.packed import clip_by_clip
from vidit.model.windows import Grid


class Streams(NamedTuple):
    """The tokens of a joint model: video first, which is what ranks divide."""

    video_BSD: Tensor
    text_BLD: Tensor


class TextStream(NamedTuple):
    """Projected text for a joint core, heads in dim 2, with the visibility of `TextContext`."""

    key_BLNK: Tensor
    value_BLNK: Tensor
    query_BLNK: Tensor
    frame_BL: Tensor | None


class JointCore(nn.Module):
    """Attention among all tokens of a row and its text: video (B, S, N, K) and text (B, L, N, K), the same out.

    What `TextContext` calls padding is seen by nothing. Of a row of images each attends within its frame and caption.

    `pairs`, `reach` and `words_see` tell the same to who has some of the video's tokens.
    """

    def __init__(self, backend: str = "sdpa"):
        super().__init__()
        self.backend = backend

    def forward(
        self,
        q_BSNK: Tensor,
        k_BSNK: Tensor,
        v_BSNK: Tensor,
        grid: Grid,
        bias: None = None,
        text: TextStream | None = None,
    ) -> tuple[Tensor, Tensor]:
        assert text is not None, "joint attention takes text"
        if grid.clips:
            both: tuple[Tensor, Tensor] = clip_by_clip(self, q_BSNK, k_BSNK, v_BSNK, grid, text)
            return both
        q = torch.cat((text.query_BLNK, q_BSNK), dim=1)
        k = torch.cat((text.key_BLNK, k_BSNK), dim=1)
        v = torch.cat((text.value_BLNK, v_BSNK), dim=1)
        out = attend(q, k, v, self._sees(grid, text), self.backend)
        words = text.query_BLNK.shape[1]
        return out[:, words:], out[:, :words]

    def pairs(self, grid: Grid, device: torch.device, text: TextStream) -> Pairs:
        """Which video tokens, and which text, each video token sees."""
        place_S, frame_BL = torch.arange(grid.num_tokens, device=device), text.frame_BL
        if frame_BL is None:
            return Pairs(None, place_S, None, None)
        if grid.image_B is None:
            return Pairs(None, place_S, (frame_BL != PADDING)[:, None], None)
        # A clip's tokens are all of one frame, an image's of its own; padding is of a frame of padding.
        frame_S = torch.arange(grid.frames, device=device).repeat_interleave(grid.height * grid.width)
        frame_BS = torch.where(grid.image_B[:, None], frame_S, EVERY_FRAME)
        return Pairs(frame_BS, place_S, frame_BS[:, :, None] == frame_BL[:, None], None)

    def reach(self, grid: Grid, first: int, last: int) -> tuple[int, int]:
        """All tokens."""
        return 0, grid.num_tokens

    def words_see(self, grid: Grid, text: TextStream) -> tuple[Tensor | None, Tensor | None]:
        """Which text (B, 1 or L, L) and which video (B, L, S) each text token sees; None for all."""
        frame_BL = text.frame_BL
        if frame_BL is None:
            return None, None
        if grid.image_B is None:
            return (frame_BL != PADDING)[:, None], None
        seen_BSL = self.pairs(grid, frame_BL.device, text).text_BSL
        assert seen_BSL is not None
        return frame_BL[:, :, None] == frame_BL[:, None], seen_BSL.mT

    def _sees(self, grid: Grid, text: TextStream) -> Tensor | None:
        """Which of the text and video tokens each of them sees, text first: (B, 1, 1 or L + S, L + S); None for all."""
        by_video = self.pairs(grid, text.key_BLNK.device, text)
        among_text, video = self.words_see(grid, text)
        if among_text is None or by_video.text_BSL is None:
            return None
        if by_video.group_BS is None or video is None:
            return F.pad(among_text, (0, grid.num_tokens), value=True)[:, None]
        group = by_video.group_BS
        above = torch.cat((among_text, video), dim=2)
        below = torch.cat((by_video.text_BSL, group[:, :, None] == group[:, None]), dim=2)
        return torch.cat((above, below), dim=1)[:, None]


class JointAttention(SelfAttention):
    """(B, S, D) and text (B, L, D) -> the same; rotation turns video tokens alone."""

    def __init__(self, c: Model, window: AnyWindow):
        super().__init__(c, window, identity_images=False)
        self.core = JointCore(c.attention_backend)

    def forward(  # type: ignore[override]
        self, x_BSD: Tensor, positions: Positions, grid: Grid, text: TextContext
    ) -> Streams:
        q, k, v = self.text_heads(text.features_BLD)
        words = TextStream(k, v, q, text.frame_BL)
        video, said = self.core(*self.heads(x_BSD, positions), grid, None, words)
        return Streams(self.out(video.flatten(-2)), self.text_output(said.flatten(-2)))

    def text_heads(self, text_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the text, (B, L, N, K)."""
        return self.heads(text_BLD, None)

    def text_output(self, said_BLD: Tensor) -> Tensor:
        """What text tokens have found, back to the width of the stream."""
        out: Tensor = self.out(said_BLD)
        return out


class DualAttention(JointAttention):
    """The same, with projections and norms of the text's own."""

    def __init__(self, c: Model, window: AnyWindow):
        super().__init__(c, window)
        self.text_query, self.text_key, self.text_value, self.text_out = (Linear(c.width, c.width) for _ in range(4))
        self.text_query_norm, self.text_key_norm = query_key_norm(c), query_key_norm(c)

    def text_heads(self, text_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = (-1, self.head_dim)
        q = self.text_query_norm(self.text_query(text_BLD).unflatten(-1, heads))
        k = self.text_key_norm(self.text_key(text_BLD).unflatten(-1, heads))
        v = self.text_value(text_BLD).unflatten(-1, heads)
        return q.to(v.dtype), k.to(v.dtype), v

    def text_output(self, said_BLD: Tensor) -> Tensor:
        out: Tensor = self.text_out(said_BLD)
        return out


def joint_attention(c: Model, window: AnyWindow) -> JointAttention:
    """What `model.text_weights` says, for a block that is not single-stream."""
    return DualAttention(c, window) if c.text_weights == "own" else JointAttention(c, window)
