"""Attention against an explicit softmax over all tokens, with a mask built from window membership."""

import itertools
import math

import pytest
import torch

from vidit.config import Model
from vidit.model.attention import CrossAttention, RelativeBias, SelfAttention
from vidit.model.context import EVERY_FRAME, PADDING, Positions, TextContext, TextKeys, visible
from vidit.model.core import WindowCore, attend
from vidit.model.init import initialise
from vidit.model.norm import HeadNorm
from vidit.model.position import TokenPositions
from vidit.model.rope import THETA, axis_pairs, rope_angles, rotate
from vidit.model.windows import Grid, partition

F64 = torch.float64
GRIDS = {"even": (4, 4, 4), "odd": (3, 5, 3), "image": (1, 3, 5)}
WINDOWS = {
    "full": (0, 0, 0),
    "spatial": (1, 0, 0),
    "temporal": (0, 1, 1),
    "window": (2, 2, 2),
    "rest": (2, 3, 2),
    "tall": (0, 2, 0),
    "large": (9, 9, 9),
}


def draw(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def qkv(grid, rows=2, heads=3, dim=4, dtype=F64):
    q, k, v = (draw(rows, math.prod(grid), heads, dim, seed=n, dtype=dtype).requires_grad_() for n in (1, 2, 3))
    return q, k, v


def places(grid):
    return list(itertools.product(*map(range, grid)))


def window_number(place, window, grid):
    """Which window a place falls into; a size of 0, or one past the grid, is the whole axis."""
    return tuple(p // (w if 0 < w < g else g) for p, w, g in zip(place, window, grid, strict=True))


def same_window(grid, window):
    number = [window_number(p, window, grid) for p in places(grid)]
    return torch.tensor([[a == b for b in number] for a in number])


def softmax_attention(q, k, v, sees, bias=None):
    """(B, S, N, K) and (B, S', N, K): exp, sum, divide; `sees` (B or 1, S, S') boolean, `bias` (N, S, S')."""
    logits = torch.einsum("bsnk,btnk->bnst", q, k) / math.sqrt(q.shape[-1])
    if bias is not None:
        logits = logits + bias
    weight = (logits - logits.amax(-1, keepdim=True)).exp() * sees[:, None]
    return torch.einsum("bnst,btnk->bsnk", weight / weight.sum(-1, keepdim=True), v)


def check(got, expected, inputs):
    """Equal outputs, and equal gradients of a random projection for every input."""
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    weight = draw(*expected.shape, seed=9)
    for a, b in zip(
        torch.autograd.grad(got, inputs, weight, allow_unused=True, materialize_grads=True),
        torch.autograd.grad(expected, inputs, weight, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def text_keys(frame_BL, heads=3, dim=4):
    shape = (*frame_BL.shape, heads, dim)
    return TextKeys(draw(*shape, seed=4).requires_grad_(), draw(*shape, seed=5).requires_grad_(), frame_BL)


def captions():
    """Two clips: padding in the middle and at the end, and none."""
    return torch.tensor([[EVERY_FRAME, EVERY_FRAME, PADDING, EVERY_FRAME, PADDING], [EVERY_FRAME] * 5])


def image_captions(grid):
    """Row 0 a clip with one caption, row 1 images: a caption of two tokens for each latent frame, then padding."""
    frame = torch.full((2, 2 * grid[0] + 1), PADDING)
    frame[0, :2] = EVERY_FRAME
    frame[1, :-1] = torch.arange(grid[0]).repeat_interleave(2)
    frame[1, 1] = PADDING  # the first caption is shorter
    return frame


def text_seen(frame_BL, grid):
    """(B, S, L): by the words of `TextContext`."""
    rows = [[[int(f) == EVERY_FRAME or int(f) == place[0] for f in row] for place in places(grid)] for row in frame_BL]
    return torch.tensor(rows)


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
class TestWindowCore:
    def test_video(self, grid, window):
        q, k, v = qkv(grid)
        sees = same_window(grid, window)[None]
        check(WindowCore(window)(q, k, v, Grid(*grid)), softmax_attention(q, k, v, sees), (q, k, v))

    def test_bias(self, grid, window):
        q, k, v = qkv(grid)
        table, bias = offset_bias(grid, window)
        relative = RelativeBias(tuple(w or g for w, g in zip(window, grid, strict=True)), 3).to(F64)
        with torch.no_grad():
            relative.table.copy_(table)
        got = WindowCore(relative.window)(q, k, v, Grid(*grid), bias_NWW=relative(Grid(*grid)))
        expected = softmax_attention(q, k, v, same_window(grid, window)[None], bias(relative.table))
        check(got, expected, (q, k, v, relative.table))

    def test_text(self, grid, window):
        q, k, v = qkv(grid)
        text = text_keys(captions())
        sees = torch.cat((same_window(grid, window).expand(2, -1, -1), text_seen(text.frame_BL, grid)), -1)
        expected = softmax_attention(q, torch.cat((k, text[0]), 1), torch.cat((v, text[1]), 1), sees)
        check(WindowCore(window)(q, k, v, Grid(*grid), text=text), expected, (q, k, v, text[0], text[1]))

    def test_bias_and_text(self, grid, window):
        q, k, v = qkv(grid)
        text = text_keys(captions())
        table, bias = offset_bias(grid, window)
        relative = RelativeBias(tuple(w or g for w, g in zip(window, grid, strict=True)), 3).to(F64)
        with torch.no_grad():
            relative.table.copy_(table)
        sees = torch.cat((same_window(grid, window).expand(2, -1, -1), text_seen(text.frame_BL, grid)), -1)
        wide = torch.nn.functional.pad(bias(relative.table), (0, text.frame_BL.shape[1]))
        expected = softmax_attention(q, torch.cat((k, text[0]), 1), torch.cat((v, text[1]), 1), sees, wide)
        got = WindowCore(relative.window)(q, k, v, Grid(*grid), relative(Grid(*grid)), text)
        check(got, expected, (q, k, v, text[0], text[1], relative.table))

    def test_rows_of_images_keep_their_values_where_windows_span_frames(self, grid, window):
        q, k, v = qkv(grid)
        core = WindowCore(window, identity_images=window[0] != 1)
        got = core(q, k, v, Grid(*grid, image_B=torch.tensor([False, True])))
        sees = same_window(grid, window).expand(2, -1, -1).clone()
        images = slice(0 if grid[0] == 1 else 1, None)  # on a grid of one frame every row is an image
        if core.identity_images:
            sees[images] = torch.eye(sees.shape[-1], dtype=torch.bool)
        check(got, softmax_attention(q, k, v, sees), (q, k, v))
        if core.identity_images:
            assert torch.equal(got[1], v[1]), "the identity is exact"

    def test_rows_of_images_attend_within_their_frame(self, grid, window):
        q, k, v = qkv(grid)
        got = WindowCore(window)(q, k, v, Grid(*grid, image_B=torch.tensor([False, True])))
        sees = same_window(grid, window).expand(2, -1, -1).clone()
        sees[1] &= same_window(grid, (1, 0, 0))
        check(got, softmax_attention(q, k, v, sees), (q, k, v))


@pytest.mark.parametrize(
    ("grid", "window"), [((1, 3, 5), (0, 0, 0)), ((1, 3, 5), (2, 2, 2)), ((3, 5, 3), (1, 0, 0)), ((3, 5, 3), (1, 2, 2))]
)
def test_captions_of_images_are_seen_by_their_own_frame(grid, window):
    q, k, v = qkv(grid)
    text = text_keys(image_captions(grid))
    sees = torch.cat((same_window(grid, window).expand(2, -1, -1), text_seen(text.frame_BL, grid)), -1)
    expected = softmax_attention(q, torch.cat((k, text[0]), 1), torch.cat((v, text[1]), 1), sees)
    got = WindowCore(window)(q, k, v, Grid(*grid, image_B=torch.tensor([False, True])), text=text)
    check(got, expected, (q, k, v, text[0], text[1]))


def offset_bias(grid, window):
    """A table with a number for each 3D offset, and a function of it: (N, S, S), zero between windows."""
    most = [w or g for w, g in zip(window, grid, strict=True)]
    shape = [2 * n - 1 for n in most]
    table = draw(3, math.prod(shape), seed=7)
    index = torch.zeros(math.prod(grid), math.prod(grid), dtype=torch.long)
    inside = same_window(grid, window)
    for (i, a), (j, b) in itertools.product(enumerate(places(grid)), repeat=2):
        if inside[i, j]:
            offset = [x - y + n - 1 for x, y, n in zip(a, b, most, strict=True)]
            index[i, j] = (offset[0] * shape[1] + offset[1]) * shape[2] + offset[2]
    return table, lambda table: table[:, index] * inside


@pytest.mark.parametrize("window", [(0, 0, 0), (2, 2, 2)])
def test_what_stands_at_text_padding_changes_nothing(window):
    q, k, v = qkv((3, 5, 3))
    text, core = text_keys(captions()), WindowCore(window)
    hidden = (text.frame_BL == PADDING)[..., None, None]
    other = text._replace(
        key_BLNK=text.key_BLNK.masked_fill(hidden, 50.0), value_BLNK=text.value_BLNK.masked_fill(hidden, -7.0)
    )
    assert torch.equal(core(q, k, v, Grid(3, 5, 3), text=text), core(q, k, v, Grid(3, 5, 3), text=other))


def test_half_precision_bias_keeps_the_dtype():
    q, k, v = qkv((1, 3, 3), dtype=torch.bfloat16)
    bias = draw(3, 9, 9, dtype=torch.float32)
    assert WindowCore((1, 0, 0))(q, k, v, Grid(1, 3, 3), bias).dtype == torch.bfloat16


def test_core_has_no_parameters_and_holds_no_state():
    core = WindowCore((0, 2, 2))
    assert not list(core.parameters())
    assert not list(core.buffers())
    for grid in [(3, 5, 3), (2, 4, 6), (3, 5, 3)]:  # no length is remembered
        q, k, v = qkv(grid)
        expected = softmax_attention(q, k, v, same_window(grid, (0, 2, 2))[None])
        torch.testing.assert_close(core(q, k, v, Grid(*grid)), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mask", [torch.ones(2, 1, 6, 6, dtype=torch.bool), torch.zeros(1, 3, 6, 6, dtype=F64)])
def test_flash_refuses_masks(mask):
    x = draw(2, 6, 3, 4)
    with pytest.raises(ValueError, match=r"attention_backend=flash.*use attention_backend=sdpa"):
        attend(x, x, x, mask, "flash")


def test_attend_takes_boolean_and_additive_masks():
    q, k, v = qkv((1, 2, 3))
    sees = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    sees |= torch.eye(6, dtype=torch.bool)
    bias = draw(3, 6, 6, seed=8)
    got = attend(q, k, v, sees[:, None], "sdpa")
    torch.testing.assert_close(got, softmax_attention(q, k, v, sees), rtol=1e-10, atol=1e-10)
    got = attend(q, k, v, bias[None].masked_fill(~sees[:, None], float("-inf")), "sdpa")
    torch.testing.assert_close(got, softmax_attention(q, k, v, sees, bias), rtol=1e-10, atol=1e-10)


def test_visible():
    frame = torch.tensor([[EVERY_FRAME, PADDING, 0, 1]])
    assert visible(frame, torch.tensor([0, 1, 2])).tolist() == [
        [[True, False, True, False], [True, False, False, True], [True, False, False, False]]
    ]


class TestRope:
    """Rotations by position: logits see differences only, so every window is its own origin."""

    def test_angles_follow_the_three_axes(self):
        cos, sin = rope_angles(torch.tensor([[2, 0, 0], [0, 3, 0], [0, 0, 5]]), 16)
        time = [THETA ** (-2 * i / 4) for i in range(2)]
        space = [THETA ** (-2 * i / 6) for i in range(3)]
        zeros = [0.0, 0.0, 0.0]
        expected = torch.tensor(
            [
                [2 * f for f in time] + zeros + zeros,
                [0.0, 0.0] + [3 * f for f in space] + zeros,
                [0.0, 0.0] + zeros + [5 * f for f in space],
            ]
        )
        torch.testing.assert_close(cos, expected.cos())
        torch.testing.assert_close(sin, expected.sin())

    @pytest.mark.parametrize(
        ("head_dim", "pairs"),
        [(6, (1, 1, 1)), (8, (2, 1, 1)), (24, (4, 4, 4)), (40, (6, 7, 7)), (72, (10, 13, 13)), (88, (12, 16, 16)),
         (16, (2, 3, 3)), (32, (4, 6, 6)), (64, (8, 12, 12)), (128, (16, 24, 24))],
    )  # fmt: skip
    def test_every_pair_of_a_head_belongs_to_one_axis(self, head_dim, pairs):
        """All K/2 pairs are turned, whatever divides, and every axis has its share: a quarter and three eighths."""
        assert axis_pairs(head_dim) == pairs
        assert sum(pairs) == head_dim // 2
        q = draw(1, 4, 2, head_dim, dtype=torch.float32)
        at = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
        turned = rotate(q, *rope_angles(at, head_dim))
        changed = (turned != q).any(dim=(0, 2)).unflatten(-1, (2, -1)).any(dim=1)
        own = torch.arange(3).repeat_interleave(torch.tensor(pairs))
        assert torch.equal(changed[1:], own == torch.arange(3)[:, None])

    @pytest.mark.parametrize(
        ("head_dim", "pairs"), [(6, (1, 1, 1)), (16, (2, 3, 3)), (64, (4, 14, 14)), (128, (8, 28, 28))]
    )
    def test_an_eighth_for_time(self, head_dim, pairs):
        """FLUX's axes of 16, 56 and 56 dims."""
        assert axis_pairs(head_dim, "eighth") == pairs

    def test_the_base_of_the_angles(self):
        at = torch.tensor([[0, 0, 5]])
        cos, _ = rope_angles(at, 128, "eighth", theta=256.0)
        torch.testing.assert_close(cos[0, -1], torch.tensor(5 * 256.0 ** (-27 / 28)).cos())
        assert not torch.equal(cos, rope_angles(at, 128, "eighth")[0])

    @pytest.mark.parametrize("head_dim", [1, 2, 4, 25])
    def test_head_dims_that_rope_refuses_still_have_positions(self, head_dim):
        """A model without RoPE asks for the angles too, and does not read them."""
        cos, sin = rope_angles(torch.zeros(5, 3, dtype=torch.long), head_dim)
        assert cos.shape == sin.shape == (5, head_dim // 2)

    def test_logits_depend_on_differences_only(self):
        q, k = draw(1, 1, 1, 16, seed=1, dtype=torch.float32), draw(1, 1, 1, 16, seed=2, dtype=torch.float32)

        def logit(at, of):
            return (rotate(q, *rope_angles(at, 16)) * rotate(k, *rope_angles(of, 16))).sum()

        at, of = torch.tensor([[1, 4, 2]]), torch.tensor([[3, 1, 2]])
        here = logit(at, of)
        for shift in ([[2, 0, 0]], [[0, 9, 0]], [[0, 0, 7]], [[5, 3, 11]]):
            torch.testing.assert_close(logit(at + torch.tensor(shift), of + torch.tensor(shift)), here)
        assert abs(logit(at + torch.tensor([[1, 0, 0]]), of) - here) > 1e-3
        assert abs(logit(at, of + torch.tensor([[0, 1, 0]])) - here) > 1e-3
        assert abs(logit(at, of + torch.tensor([[0, 0, 1]])) - here) > 1e-3

    def test_rotation_keeps_lengths_and_widens(self):
        x = draw(2, 3, 2, 16, dtype=torch.bfloat16)
        angles = rope_angles(torch.tensor([[0, 0, 0], [3, 1, 2], [9, 8, 7]]), 16)
        out = rotate(x, *angles)
        assert out.dtype == torch.float32, "one cast is enough after norm and rotation"
        assert torch.equal(out[:, 0], x[:, 0]), "the origin is not turned"
        wide = x.float()
        torch.testing.assert_close(rotate(wide, *angles).norm(dim=-1), wide.norm(dim=-1))

    def test_shifting_all_positions_changes_nothing(self):
        grid = (3, 3, 4)
        attention = self_attention(relative="rope", window=(2, 2, 2))
        x, positions = draw(2, 36, 48, dtype=torch.float32), TokenPositions(16)(Grid(*grid), torch.device("cpu"))
        moved = positions.position_S3 + torch.tensor([4, 2, 9])
        shifted = Positions(moved, *rope_angles(moved, 16))
        out = attention(x, positions, Grid(*grid))
        torch.testing.assert_close(attention(x, shifted, Grid(*grid)), out, rtol=1e-4, atol=1e-5)
        turned = positions.position_S3 * 2
        other = attention(x, Positions(turned, *rope_angles(turned, 16)), Grid(*grid))
        assert (other - out).abs().max() > 1e-3

    def test_every_window_is_its_own_origin(self):
        """Equal content in every window gives equal output in every window, wherever it stands."""
        attention = self_attention(relative="rope", window=(1, 2, 2))
        grid = Grid(2, 4, 4)
        tile = draw(1, 2, 2, 48, dtype=torch.float32)
        x = tile.repeat(2, 2, 2, 1).reshape(1, 32, 48)
        out = partition(attention(x, TokenPositions(16)(grid, x.device), grid), (1, 2, 2), grid)
        torch.testing.assert_close(out, out[:1].expand_as(out), rtol=1e-4, atol=1e-5)
        assert (out[0, 0] - out[0, 1]).abs().max() > 1e-3


def self_attention(relative="none", window=(0, 0, 0), qk_norm=True, seed=0):
    c = Model(width=48, num_heads=3, qk_norm=qk_norm, relative_position=relative)
    attention = SelfAttention(c, window, False)
    initialise(attention, seed)
    return attention


class TestHeadNorm:
    def test_formula(self):
        norm = HeadNorm(16)
        with torch.no_grad():
            norm.weight.copy_(draw(16, seed=3))
        x = draw(2, 5, 3, 16, dtype=torch.float32)
        centred = x - x.mean(-1, keepdim=True)
        expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
        torch.testing.assert_close(norm(x), expected)
        assert norm(x.bfloat16()).dtype == torch.float32

    def test_logits_do_not_grow_with_the_input(self):
        """QK-norm bounds the logits: scaling the projections of q and k changes nothing."""
        x, grid = draw(1, 8, 48, dtype=torch.float32), Grid(2, 2, 2)
        positions = TokenPositions(16)(grid, x.device)
        for qk_norm in (True, False):
            attention = self_attention(qk_norm=qk_norm)
            before = attention(x, positions, grid)
            with torch.no_grad():
                attention.query.weight.mul_(30)
                attention.key.weight.mul_(30)
            moved = (attention(x, positions, grid) - before).abs().max()
            assert (moved < 1e-4) == qk_norm

    def test_it_does_not_see_other_heads(self):
        norm, x = HeadNorm(16), draw(1, 2, 3, 16, dtype=torch.float32)
        torch.nn.init.ones_(norm.weight)
        other = x.clone()
        other[:, :, 1] *= 100
        assert torch.equal(norm(other)[:, :, [0, 2]], norm(x)[:, :, [0, 2]])


class TestCross:
    """`CrossAttention` as a whole, projections included."""

    def reference(self, cross, x, text, sees, with_video):
        def heads(y):
            return y.unflatten(-1, (-1, 16))

        q, k, v = heads(cross.query(x)), heads(cross.key(text)), heads(cross.value(text))
        if with_video:
            k, v = torch.cat((heads(cross.key(x)), k), 1), torch.cat((heads(cross.value(x)), v), 1)
        return cross.out(softmax_attention(q, k, v, sees).flatten(-2))

    @pytest.mark.parametrize("images", [False, True])
    @pytest.mark.parametrize("with_video", [False, True])
    @pytest.mark.parametrize("window", [(1, 0, 0), (1, 2, 2)])
    def test_reference(self, window, with_video, images):
        grid = (3, 3, 5)
        keys = "video_and_text" if with_video else "text"
        cross = CrossAttention(Model(width=48, num_heads=3, qk_norm=False, cross_keys=keys), window).to(F64)
        for n, p in enumerate(cross.parameters()):
            p.data = draw(*p.shape, seed=n) / 7
        x = draw(2, 45, 48, seed=11).requires_grad_()
        frame = image_captions(grid) if images else captions()
        text = draw(2, frame.shape[1], 48, seed=12).requires_grad_()
        image_B = torch.tensor([False, True]) if images else None
        positions = TokenPositions(16)(Grid(*grid), x.device)
        got = cross(x, TextContext(text, frame), positions, Grid(*grid, image_B=image_B))
        sees = text_seen(frame, grid)
        if with_video:
            sees = torch.cat((same_window(grid, window).expand(2, -1, -1), sees), -1)
        expected = self.reference(cross, x, text, sees, with_video)
        check(got, expected, (x, text, *cross.parameters()))

    def test_no_text_reaches_a_token_through_padding(self):
        cross = CrossAttention(Model(width=48, num_heads=3, cross_keys="text"), (1, 0, 0))
        initialise(cross, 0)
        grid, frame = Grid(2, 2, 2), torch.tensor([[EVERY_FRAME, PADDING]])
        x, text = draw(1, 8, 48, dtype=torch.float32), draw(1, 2, 48, seed=1, dtype=torch.float32)
        positions = TokenPositions(16)(grid, x.device)
        other = text.clone()
        other[:, 1] = 100
        assert torch.equal(
            cross(x, TextContext(text, frame), positions, grid), cross(x, TextContext(other, frame), positions, grid)
        )
        other[:, 0] = 1
        changed = cross(x, TextContext(other, frame), positions, grid)
        assert not torch.equal(changed, cross(x, TextContext(text, frame), positions, grid))


def test_positions_are_the_places_of_the_grid():
    positions = TokenPositions(16)(Grid(2, 3, 2), torch.device("cpu"))
    assert positions.position_S3.tolist() == [list(p) for p in places((2, 3, 2))]
