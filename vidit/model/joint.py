"""Joint attention of video and text (CogVideoX, 2408.06072): text tokens ask as well, by the same projections.

The two stay apart: `Streams` keeps the token axis of the video pure, so it can be divided over ranks while text is
whole on each. Only the core sees both; to it the text's queries, keys and values are an argument of their own.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vidit.config import AnyWindow, Model
from vidit.model.attention import EVERY_FRAME, PADDING, Positions, SelfAttention, TextContext, attend
from vidit.model.windows import Grid


class Streams(NamedTuple):
    """The tokens of a joint model: video first, which is what ranks divide."""

    video_BSD: Tensor
    text_BLD: Tensor


class TextStream(NamedTuple):
    """Projected text for a joint core, heads in dim 2, with the visibility of `TextContext`."""

    query_BLNK: Tensor
    key_BLNK: Tensor
    value_BLNK: Tensor
    frame_BL: Tensor | None


class JointCore(nn.Module):
    """Attention among all tokens of a row and its text: video (B, S, N, K) and text (B, L, N, K), the same out.

    What `TextContext` calls padding is seen by nothing. Of a row of images each attends within its frame and caption.
    """

    def __init__(self, backend: str = "auto"):
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
    ) -> Streams:
        assert text is not None, "joint attention takes text"
        q = torch.cat((text.query_BLNK, q_BSNK), dim=1)
        k = torch.cat((text.key_BLNK, k_BSNK), dim=1)
        v = torch.cat((text.value_BLNK, v_BSNK), dim=1)
        out = attend(q, k, v, sees(text.frame_BL, grid), self.backend)
        words = text.query_BLNK.shape[1]
        return Streams(out[:, words:], out[:, :words])


def sees(frame_BL: Tensor | None, grid: Grid) -> Tensor | None:
    """Which of the text and video tokens each of them sees, text first: (B, 1, 1 or L + S, L + S); None for all."""
    if frame_BL is None:
        return None
    frame_S = torch.arange(grid.frames, device=frame_BL.device).repeat_interleave(grid.height * grid.width)
    if grid.image_B is None:
        real = torch.cat((frame_BL != PADDING, frame_BL.new_ones(len(frame_BL), len(frame_S), dtype=torch.bool)), dim=1)
        return real[:, None, None, :]
    # A clip's tokens are all of one frame, an image's of its own; padding is of a frame of padding.
    frame_BS = torch.where(grid.image_B[:, None], frame_S, EVERY_FRAME)
    place = torch.cat((frame_BL, frame_BS), dim=1)
    return (place[:, :, None] == place[:, None, :])[:, None]


class JointAttention(SelfAttention):
    """(B, S, D) and text (B, L, D) -> the same; rotation turns video tokens alone."""

    def __init__(self, c: Model, window: AnyWindow):
        super().__init__(c, window, identity_images=False)
        self.core = JointCore(c.attention_backend)

    def forward(  # type: ignore[override]
        self, x_BSD: Tensor, positions: Positions, grid: Grid, text: TextContext
    ) -> Streams:
        words = TextStream(*self.heads(text.features_BLD, None), text.frame_BL)
        video, said = self.core(*self.heads(x_BSD, positions), grid, None, words)
        return Streams(self.out(video.flatten(-2)), self.out(said.flatten(-2)))
