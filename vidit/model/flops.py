"""Arithmetic of the denoisers: parameters and FLOPs from the config alone, without torch.

Forward FLOPs of one clip: 2 S P_lin + 4 S W D for self-attention in windows of W tokens + text, as in
papers.md section 0 and anchors.md section 8; training is three times the forward. Elementwise work is left
out, as every published MFU does.
"""

from vidit.config import AnyWindow, Model, Unet, Window, whole_window
from vidit.model.unet.flops import unet_flops, unet_parameters

Captions = tuple[int, int]
"""Tokens of a caption, and the width of its features."""
REFINER_RATIO = 4
"""Hidden width of a refiner's MLP over the model's."""


def window_of(c: Model, layer: int) -> AnyWindow:
    """The attention window of a block, as configured."""
    return c.window(layer)


def window_tokens(window: AnyWindow, grid: Window) -> int:
    """Tokens of a window on a grid, those past its end included."""
    if len(window) == 2:
        k = window[1]
        return -(-grid[0] * grid[1] * grid[2] // (k * k)) * k
    t, h, w = whole_window(window, grid)
    return t * h * w


def forward_flops(
    c: Model | Unet,
    grid: tuple[int, int, int],
    channels: int,
    text_width: int,
    text_tokens: int,
    second: Captions = (0, 0),
) -> int:
    """FLOPs of one forward pass of one clip through the denoiser, two for each multiply-add.

    `second` are the captions of a second encoder.
    """
    if isinstance(c, Unet):
        return unet_flops(c, grid, channels, text_width, text_tokens)
    captions = text_tokens, text_width
    total = embed_flops(c, grid, channels) + head_flops(c, grid, channels) + text_flops(c, text_width, text_tokens)
    total += text_flops(c, second[1], second[0]) if c.interleaves_text else 0
    return total + sum(block_flops(c, layer, grid, captions, second) for layer in range(c.num_layers))


def block_flops(c: Model, layer: int, grid: tuple[int, int, int], captions: Captions, second: Captions = (0, 0)) -> int:
    """Of one block and one clip, as `forward_flops` counts."""
    text_tokens, text_width = second if c.reads_second(layer) else captions
    tokens, d = grid[0] * grid[1] * grid[2], c.width
    window = window_tokens(window_of(c, layer), grid)
    total = tokens * (8 * d * d + 4 * d * c.mlp_width + 4 * window * d)
    if c.is_joint:
        both = tokens + text_tokens  # whether one set of weights or two, in turn or side by side
        return both * (8 * d * d + 4 * d * c.mlp_width + 4 * both * d)
    if c.temporal_attention:
        total += tokens * (8 * d * d + 4 * grid[0] * d)
    if c.crosses(layer):
        joint = c.cross_keys == "video_and_text"
        total += 2 * tokens * (4 if joint else 2) * d * d + 2 * text_tokens * 2 * _key_width(c, text_width) * d
        total += 4 * tokens * (text_tokens + (window if joint else 0)) * d
    return total


def embed_flops(c: Model, grid: tuple[int, int, int], channels: int) -> int:
    """Of the patch embedding and one clip."""
    tokens = grid[0] * grid[1] * grid[2]
    seen = channels * (2 if c.self_conditioning else 1) + (channels + 1) * c.given_channels
    return 2 * tokens * c.width * seen * c.patch_size


def text_flops(c: Model, text_width: int, text_tokens: int) -> int:
    """Of the text embedding and one caption."""
    if not c.embeds_text:
        return 0
    d, refined = c.width, c.num_refiner_layers
    embedded = 2 * text_tokens * (text_width + (d if c.text_embedding == "mlp" else 0)) * d
    return embedded + refined * text_tokens * (8 * d * d + 4 * REFINER_RATIO * d * d + 4 * text_tokens * d)


def head_flops(c: Model, grid: tuple[int, int, int], channels: int) -> int:
    """Of the output layer and one clip."""
    return 2 * grid[0] * grid[1] * grid[2] * c.width * channels * c.patch_size * c.out_factor


def parameter_count(
    c: Model | Unet, grid: tuple[int, int, int], channels: int, text_width: int, second_width: int = 0
) -> int:
    """Parameters of the denoiser, text encoders not included; equal to what `DiT` or `VideoUnet` allocates."""
    if isinstance(c, Unet):
        return unet_parameters(c, grid[0], channels, text_width)
    d, head_dim, f, cond = c.width, c.width // c.num_heads, c.mlp_width, c.cond_width
    vectors, norm = c.num_vectors * d, 2 * d * c.norm_affine
    patch = channels * c.patch_size
    total = patch * (2 if c.self_conditioning else 1) * d + d  # patch embedding
    total += (channels + 1) * c.patch_size * d * c.given_channels
    numbers = 1 + c.frame_rate + (c.guidance > 0)
    total += (c.time_frequencies + 1 + cond + 1) * cond * numbers
    if c.pooled_text:
        pooled = c.pooled_width or second_width or text_width
        total += (pooled + 1) * cond + (cond + 1) * cond * (c.pooled_embedding == "mlp")
    for width in (text_width, *[second_width] * (c.interleaves_text)) if c.embeds_text else ():
        total += (width + 1) * d + (d * d + d if c.text_embedding == "mlp" else 0)
        total += refiner_parameters(c, width) if c.num_refiner_layers else 0
    total += (grid[0] + grid[1] * grid[2]) * d if c.absolute_position == "learned" else 0
    total += (d + 1) * vectors if c.shares_modulation else 0
    of_heads = {"head": 2 * head_dim, "head_rms": 2 * head_dim, "head_affine": 4 * head_dim}
    attention = 4 * d * d + 4 * d + {"none": 0, "width": 2 * d, **of_heads}[c.qk_norm]
    mlp = 2 * d * f + d + f
    cross = attention + (2 * d if c.cross_norm == "affine" else 0)
    own = c.adaln_rank * (cond + vectors) if c.adaln_rank else (cond + 1) * vectors
    # Three vectors, one norm, one bias of the output.
    total += c.num_single_layers * (attention + mlp - d + norm + 3 * d * (cond + 1))
    total += c.num_double_layers * (attention + norm) * c.temporal_attention
    for layer in range(c.num_double_layers):
        total += (attention + mlp) * (2 if c.text_weights == "own" else 1) + 2 * norm
        keys = _key_width(c, second_width if c.reads_second(layer) else text_width)
        total += cross + 2 * (keys - d) * d if c.crosses(layer) else 0
        total += vectors if c.modulation == "table" else own
        window = window_of(c, layer)
        if c.relative_position == "bias" and len(window) == 3:
            t, h, w = (n or axis for n, axis in zip(window, grid, strict=True))
            total += c.num_heads * (2 * t - 1) * (2 * h - 1) * (2 * w - 1)
    total += 2 * d if c.modulation == "table" else 2 * d * (cond + 1)
    return total + (d + 1) * patch * c.out_factor + 2 * norm  # head


def _key_width(c: Model, text_width: int) -> int:
    """Of the text that keys and values are made of."""
    return c.width if c.embeds_text else text_width


def refiner_parameters(c: Model, text_width: int) -> int:
    """Of the token refiner: two vectors of conditioning, then blocks with norms, attention, MLP and two gates."""
    d = c.width
    vectors = (c.time_frequencies + 1 + d + 1) * d + (text_width + 1 + d + 1) * d
    mlp = 2 * REFINER_RATIO * d * d + (REFINER_RATIO + 1) * d
    return vectors + c.num_refiner_layers * (4 * d + 4 * (d + 1) * d + mlp + 2 * d * (d + 1))


def training_flops(forward: int, self_conditioning: float) -> float:
    """FLOPs of forward and backward, with the expected self-conditioning pass."""
    return forward * (3 + self_conditioning)
