"""The video DiT: `embed` -> `blocks` -> `head`, on one device.

No branch here depends on a parallel layout: sharding is applied from outside (`vidit/train/parallelize.py`)
to the blocks, to each `attn.core`, and behind `embed.tokens`, `positions` and `head`.
"""

import torch
from torch import Tensor, nn

from vidit.config import Model
from vidit.dtypes import widen
from vidit.model.block import Block, Tokens
from vidit.model.context import EVERY_FRAME, PADDING, TextContext
from vidit.model.embed import Head, PatchEmbed, TextEmbed
from vidit.model.flops import window_of
from vidit.model.joint import Streams
from vidit.model.linear import Linear
from vidit.model.packed import per_frame
from vidit.model.position import TokenPositions, absolute_position, placed
from vidit.model.single import SingleBlock
from vidit.model.vector import TimeEmbed, VectorEmbed
from vidit.model.windows import Grid


class Conditioning(nn.Module):
    """Time, pooled text and frame rate -> (B, R, D) fp32: c, then A_1, the modulation that all blocks share, if any.

    The frame rate is embedded like the time and added (Open-Sora 1.2).
    Of a model that was distilled with guidance its scale, 1000 times as large, enters in the same way.
    """

    def __init__(self, c: Model, pooled_width: int):
        super().__init__()
        self.num_vectors = c.num_vectors
        self.time = TimeEmbed(c.time_frequencies, c.cond_width, c.time_spacing == "closed")
        pooled_width = c.pooled_width or pooled_width
        self.pooled: nn.Module | None = None
        if c.pooled_text:
            kind = VectorEmbed if c.pooled_embedding == "mlp" else Linear
            self.pooled = kind(pooled_width, c.cond_width)
        self.guidance_scale = c.guidance
        self.guidance = TimeEmbed(c.time_frequencies, c.cond_width) if c.guidance else None
        self.frame_rate = TimeEmbed(c.time_frequencies, c.cond_width) if c.frame_rate else None
        self.shared = Linear(c.width, c.num_vectors * c.width) if c.shares_modulation else None

    def forward(self, time_B: Tensor, pooled_BE: Tensor | None, fps_B: Tensor | None) -> Tensor:
        c_BD = self.time(time_B)
        if self.pooled is not None:
            assert pooled_BE is not None, "model.pooled_text is set, but the batch has no pooled text"
            c_BD = c_BD + self.pooled(widen(pooled_BE))
        if self.guidance is not None:
            c_BD = c_BD + self.guidance(torch.full_like(time_B, 1000 * self.guidance_scale))
        if self.frame_rate is not None:
            assert fps_B is not None, "model.frame_rate is set, but the grid has no frames a second"
            c_BD = c_BD + self.frame_rate(fps_B)
        if self.shared is None:
            return c_BD[:, None]
        shared = self.shared(nn.functional.silu(c_BD)).unflatten(-1, (self.num_vectors, -1))
        return torch.cat((c_BD[:, None], shared), dim=1)


class TokensMade(nn.Module):
    """The place where the tokens of a row are all there for the first time, in the compute dtype.

    `joint`: the text's features are tokens too.
    """

    def __init__(self, joint: bool):
        super().__init__()
        self.joint = joint

    def forward(self, x_BSD: Tensor, grid: Grid, features_BLD: Tensor, dtype: torch.dtype) -> Tokens:
        video = x_BSD.to(dtype)
        return Streams(video, features_BLD) if self.joint else video


class Embed(nn.Module):
    """Latent, time and text -> (tokens, text, cond_BRD), the first two in the compute dtype.

    `tokens` passes the tokens on: the seam behind which sequence parallelism divides them.
    """

    def __init__(self, c: Model, channels: int, grid: tuple[int, int, int], text_width: int, second_width: int):
        super().__init__()
        self.patch: nn.Module = PatchEmbed(channels, c.patch, c.width, c.self_conditioning > 0, c.given_channels)
        self.conditioning = Conditioning(c, second_width or text_width)
        self.text = TextEmbed(c, text_width) if c.embeds_text else None
        self.reads_second = c.interleaves_text
        self.second_text = TextEmbed(c, second_width) if c.embeds_text and self.reads_second else None
        self.position = absolute_position(c, grid)
        self.tokens: nn.Module = TokensMade(c.is_joint)
        self.sees_padding = c.text_padding == "seen"
        self.frame_times = c.frame_times

    def forward(
        self,
        x: Tensor,
        grid: Grid,
        time_B: Tensor,
        text_BLE: Tensor,
        text_frame_BL: Tensor,
        pooled_BE: Tensor | None,
        previous_BCTHW: Tensor | None,
        dtype: torch.dtype,
        second: TextContext | None = None,
    ) -> tuple[Tokens, TextContext, Tensor]:
        tokens = self.patch(x, previous_BCTHW, grid.given_BCTHW)
        if self.position is not None:
            tokens = tokens + placed(self.position, grid, tokens.device)
        assert not self.sees_padding or grid.image_B is None, "captions side by side are told apart by their mask"
        images = grid.image_B is not None

        def embedded(text: TextEmbed | None, text_BLE: Tensor, frame_BL: Tensor | None) -> TextContext:
            frame, features = None if self.sees_padding else frame_BL, text_BLE.to(dtype)
            return TextContext(features if text is None else text(features, time_B, frame, images), frame)

        context = embedded(self.text, text_BLE, text_frame_BL)
        if self.reads_second:
            assert second is not None, "model.cross_text=interleaved, but the batch has no text of a second encoder"
            context = context._replace(second=embedded(self.second_text, second.features_BLD, second.frame_BL))
        tokens = self.tokens(tokens, grid, context.features_BLD, dtype)
        fps_B = grid.fps_B
        if self.frame_times and grid.clips:
            time_B = time_B if len(time_B) != len(grid.clips) else per_frame(time_B, grid)
            pooled_BE, fps_B = (None if x is None else per_frame(x, grid) for x in (pooled_BE, fps_B))
        elif self.frame_times:
            time_B = (time_B if time_B.ndim > 1 else time_B[:, None].expand(-1, grid.frames)).flatten()
            pooled_BE, fps_B = (None if x is None else x.repeat_interleave(grid.frames, 0) for x in (pooled_BE, fps_B))
        return tokens, context, self.conditioning(time_B, pooled_BE, fps_B)


class DiT(nn.Module):
    """Denoiser: (x_t, time, text) -> output of the shape of x_t, fp32.

    `channels` is the latent's, `grid` the largest token grid it is built for, `text_width` the
    text encoder's, `second_width` that of a second one, which then gives the pooled caption; 0 where there is none.
    Parameters are allocated, not filled: see `vidit.model.init.initialise`.
    """

    def __init__(self, c: Model, channels: int, grid: tuple[int, int, int], text_width: int, second_width: int = 0):
        super().__init__()
        assert second_width or c.cross_text == "first", "model.cross_text=interleaved reads a second encoder"
        self.dtype = torch.float32
        self.config, self.channels, self.text_width = c, channels, text_width
        blocks: dict[str, nn.Module] = {}
        for layer in range(c.num_layers):
            window = window_of(c, layer)
            identity_images = window[0] != 1 and c.image_attention == "identity"
            if c.relative_position == "bias" and len(window) == 3:  # the table has the size it has on the largest grid
                t, h, w = (n or axis for n, axis in zip(window, grid, strict=True))
                window = (t, h, w)
            if layer >= c.num_double_layers:
                blocks[str(layer)] = SingleBlock(c, window)
            else:
                second = c.reads_second(layer)
                wide = 0 if c.text_embedding != "none" else second_width if second else text_width
                time = layer == c.time_layer
                blocks[str(layer)] = Block(c, window, c.crosses(layer), identity_images, time, second, wide)
        self.embed = Embed(c, channels, grid, text_width, second_width)
        self.positions = TokenPositions(c.width // c.num_heads, c.rope_split, c.rope_theta)
        self.blocks = nn.ModuleDict(blocks)
        self.head: nn.Module = Head(c, channels)

    def forward(
        self,
        x: Tensor,
        grid: Grid,
        time_B: Tensor,
        text_BLE: Tensor,
        text_frame_BL: Tensor,
        pooled_BE: Tensor | None = None,
        previous_BCTHW: Tensor | None = None,
        second: TextContext | None = None,
    ) -> Tensor:
        """Predict the diffusion target.

        Args:
            x: noisy latent (B, C, T, H, W), fp32, or a packed one (1, S, P, C), and then the output has that form
                (`vidit/model/packed.py`); on a stage behind the first (`vidit/model/stage.py`) the tokens of the stage
                before.
            grid: the latent in tokens, which rows are images, and how fast the others run.
            time_B: what the path conditions on, about 0 to 1000; with `model.frame_times` also (B, T), one a frame. Of
                a packed row B counts clips, here and below, and frames of all clips are (F,).
            text_BLE, text_frame_BL: text features and their visibility (`TextContext`).
            pooled_BE: pooled caption, needed when `model.pooled_text`.
            previous_BCTHW: the self-conditioning estimate; zeros when None.
            second: text of a second encoder, needed when `model.cross_text=interleaved`.
        """
        tokens, text, cond = self.embed(
            x, grid, time_B, text_BLE, text_frame_BL, pooled_BE, previous_BCTHW, self.dtype, second
        )
        positions = self.positions(grid, cond.device)
        for block in self.blocks.values():
            tokens = block(tokens, text, cond, positions, grid)
        return self.head(tokens, cond, grid, positions)


def text_frames(mask_BL: Tensor) -> Tensor:
    """Visibility of ordinary captions: a valid token is seen by every latent frame. (B, L) bool -> (B, L) int64."""
    return torch.where(mask_BL, EVERY_FRAME, PADDING)
