"""What is known of tokens beside their numbers: where they are, and which text they see."""

from typing import NamedTuple

from torch import Tensor

from vidit.model.packed import FirstToken
from vidit.model.windows import Grid

EVERY_FRAME = -1
PADDING = -2


class Positions(NamedTuple):
    """Where each token of this rank is; sharded along S together with the tokens.

    Of a packed row `position_S3` has a fourth column, the number of the token's clip, and `first` tells which token of
    the row is this rank's first.
    """

    position_S3: Tensor
    cos_SK: Tensor
    sin_SK: Tensor
    first: FirstToken | None = None


class TextContext(NamedTuple):
    """Text features, and which latent frames may see each text token.

    `frame_BL` holds a latent frame's number, EVERY_FRAME, or PADDING: a row of T independent images carries
    T captions side by side, each visible to its own image only. None: every token sees all of it, padding too.
    `second` is that of another encoder, which some blocks attend to instead (`model.cross_text`).
    """

    features_BLD: Tensor
    frame_BL: Tensor | None
    second: "TextContext | None" = None


class TextKeys(NamedTuple):
    """Projected text keys and values for a core, with the visibility of `TextContext`."""

    key_BLNK: Tensor
    value_BLNK: Tensor
    frame_BL: Tensor


def visible(frame_BL: Tensor, frame_S: Tensor) -> Tensor:
    """Which text token each video token may see: (B, S, L) boolean."""
    return (frame_BL[:, None, :] == EVERY_FRAME) | (frame_BL[:, None, :] == frame_S[None, :, None])


def text_mask(frame_BL: Tensor | None, positions: Positions, grid: Grid) -> Tensor | None:
    """Which text token each video token sees: (B, 1, 1 or S, L) boolean; None for all of them."""
    if frame_BL is None:
        return None
    if grid.image_B is None:
        return (frame_BL != PADDING)[:, None, None, :]
    return visible(frame_BL, positions.position_S3[:, 0])[:, None]
