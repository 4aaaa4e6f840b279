"""Folding of pixels, Haar wavelets, the norms, and the presets that are built of them."""

import pytest
import torch

from vidit.config import VAE_PRESETS, Vae
from vidit.vae.autoencoder import CausalVae
from vidit.vae.convolution import _pairs_pay, conv3d
from vidit.vae.folding import Fold, Unfold, block_transform, haar
from vidit.vae.norms import ChannelNorm, FrameNorm


class TestHaar:
    @pytest.mark.parametrize("n", [1, 2, 4, 8])
    def test_orthogonal_and_mean_first(self, n):
        matrix = haar(n)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(n))
        torch.testing.assert_close(matrix[0], torch.full((n,), n**-0.5))
        torch.testing.assert_close(matrix[1:].sum(1), torch.zeros(n - 1))

    def test_of_four(self):
        half = 2**-0.5
        expected = torch.tensor(
            [[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, -0.5, -0.5], [half, -half, 0, 0], [0, 0, half, -half]]
        )
        torch.testing.assert_close(haar(4), expected)

    def test_a_flat_block_is_in_one_channel(self):
        wide = block_transform(2, 2) @ torch.full((8,), 3.0)
        torch.testing.assert_close(wide, torch.tensor([3 * 8**0.5, *[0.0] * 7]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("fold", ["pixels", "haar"])
@pytest.mark.parametrize(("frames", "patch"), [(1, 2), (2, 1), (2, 2), (4, 2), (2, 4)])
def test_unfold_is_the_inverse(fold, frames, patch):
    c = Vae(fold=fold, patch=patch, patch_frames=frames)
    x = torch.randn(2, 3, 1 + 2 * frames, 8, 8)
    folded = Fold(c)(x)
    assert folded.shape == (2, c.folded_channels, 3, 8 // patch, 8 // patch)
    torch.testing.assert_close(Unfold(c)(folded), x)
    torch.testing.assert_close(Fold(c)(x[:, :, :1]), folded[:, :, :1], msg="the first frame is a block by itself")


def test_wavelets_of_time_see_the_difference_of_frames():
    c = Vae(fold="haar", patch_frames=2)
    x = torch.randn(1, 3, 3, 2, 2)
    folded = Fold(c)(x).unflatten(1, (3, 2))
    torch.testing.assert_close(folded[:, :, 0, 1], (x[:, :, 1] + x[:, :, 2]) / 2**0.5)
    torch.testing.assert_close(folded[:, :, 1, 1], (x[:, :, 1] - x[:, :, 2]) / 2**0.5)
    assert not folded[:, :, 1, 0].any(), "the first frame has no difference to itself"


class TestNorms:
    def test_group_norm_is_of_one_frame(self):
        norm = FrameNorm(8, 4)
        torch.nn.init.uniform_(norm.weight)
        torch.nn.init.uniform_(norm.bias)
        x = torch.randn(2, 8, 3, 4, 5)
        for n in range(3):
            expected = torch.nn.functional.group_norm(x[:, :, n], 4, norm.weight, norm.bias, 1e-6)
            torch.testing.assert_close(norm(x)[:, :, n], expected)
        assert norm(x.bfloat16()).dtype == torch.bfloat16

    @pytest.mark.parametrize("norm", [ChannelNorm(8), FrameNorm(8, 2)])
    def test_in_place_without_a_backward_pass(self, norm):
        """Inference saves memory where training cannot: the numbers and the argument are the same."""
        for p in norm.parameters():
            torch.nn.init.uniform_(p)
        x = torch.randn(1, 8, 2, 3, 3)
        kept, expected = x.clone(), norm(x)
        with torch.no_grad():
            assert torch.equal(norm(x), expected)
        assert torch.equal(x, kept)

    def test_gradient_of_zeros_is_finite(self):
        norm, x = ChannelNorm(4), torch.zeros(1, 4, 1, 2, 2, requires_grad=True)
        torch.nn.init.ones_(norm.weight)
        norm(x).sum().backward()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 1, 1)])
@pytest.mark.parametrize(("rows", "side"), [(1, 8), (2, 8), (1, 64)], ids=["small", "rows", "large"])
def test_convolution_is_exact_with_its_gradients(kernel, stride, rows, side):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 4, 7, side, side, generator=g)
    w, b = torch.randn(6, 4, kernel, kernel, kernel, generator=g), torch.randn(6, generator=g)
    found, expected = [], []
    for results, dtype, call in (
        (found, torch.float32, lambda x, w, b: conv3d(x, w, b, stride, (kernel // 2, kernel // 2))),
        (expected, torch.float64,
         lambda x, w, b: torch.nn.functional.conv3d(x, w, b, stride, (0, kernel // 2, kernel // 2))),
    ):  # fmt: skip
        leaves = [t.to(dtype).requires_grad_() for t in (x, w, b)]
        out = call(*leaves)
        results += [out, *torch.autograd.grad(out.square().sum(), leaves)]
    for a, e in zip(found, expected, strict=True):
        assert a.shape == e.shape
        assert (a - e).norm() / e.norm() < 1e-5


@pytest.mark.parametrize("frames", [3, 4, 5, 6, 7, 9])
@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (2, 2, 2)])
@pytest.mark.parametrize(("rows", "channels", "height"), [(1, 4, 9), (2, 16, 64), (1, 256, 8)])
def test_convolution_without_a_backward_pass(frames, stride, rows, channels, height):
    """Frames stacked, or in pairs where that pays, with one left over or none: the rounding of oneDNN's sums."""
    g = torch.Generator().manual_seed(0)
    shapes = (rows, channels, frames, height, 7), (6, channels, 3, 3, 3), (6,)
    x, w, b = (torch.randn(shape, generator=g) for shape in shapes)
    exact = torch.nn.functional.conv3d(x.double(), w.double(), b.double(), stride, (0, 1, 1))
    plain = torch.nn.functional.conv3d(x, w, b, stride, (0, 1, 1))
    with torch.no_grad():
        found = conv3d(x, w, b, stride, (1, 1))
    assert found.shape == exact.shape
    error, own = ((y - exact).norm() / exact.norm() for y in (plain, found))
    assert own < 3e-7 + 7 * error


def test_a_frame_in_a_pair_depends_on_no_later_one():
    x, w, b = torch.randn(1, 32, 6, 64, 5), torch.randn(8, 32, 3, 3, 3), torch.zeros(8)
    with torch.no_grad():
        assert _pairs_pay(x)
        out = conv3d(x, w, b, (1, 1, 1), (1, 1))
        assert torch.equal(torch.compile(conv3d, backend="eager", fullgraph=True)(x, w, b, (1, 1, 1), (1, 1)), out)
        for frame in range(6):
            changed = conv3d(x.index_fill(2, torch.tensor([frame]), torch.inf), w, b, (1, 1, 1), (1, 1))
            same = [k for k in range(4) if torch.equal(out[:, :, k], changed[:, :, k])]
            assert same == [k for k in range(4) if not k <= frame <= k + 2]


STRIDES = {
    "walt": (4, 8, 8), "cogvideox": (4, 8, 16), "wan": (4, 8, 16), "wavelet": (4, 8, 16), "4x16x16": (4, 16, 32),
    "8x16x16": (8, 16, 64), "stable-diffusion": (4, 8, 4),
}  # fmt: skip


class TestPresets:
    @pytest.mark.parametrize("name", VAE_PRESETS)
    def test_geometry(self, name):
        c = Vae.preset(name)
        assert not list(c.faults())
        assert (c.temporal_stride, c.spatial_stride, c.latent_channels) == STRIDES[name]
        with torch.device("meta"):
            vae = CausalVae(c)
        x = torch.zeros(1, 3, 1 + 2 * c.temporal_stride, 2 * c.spatial_stride, c.spatial_stride, device="meta")
        z = vae.encode(x).mean
        assert z.shape == (1, c.latent_channels, 3, 2, 1)
        assert vae.decode(z).shape == x.shape

    def test_changes_win(self):
        assert Vae.preset("wan", base_channels=8).base_channels == 8

    def test_unknown(self):
        with pytest.raises(ValueError, match="no VAE preset 'sd'; use one of walt cogvideox wan wavelet"):
            Vae.preset("sd")

    @pytest.mark.parametrize(
        ("changes", "fault"),
        [
            ({"norm": "group", "norm_groups": 48}, "vae.norm_groups=48 does not divide the 128 256 256 512 channels"),
            ({"fold": "haar"}, "no effect on blocks of one pixel"),
            ({"fold": "haar", "patch": 3}, "vae.patch=3 is no power of 2"),
            ({"max_frames": 3}, "vae.max_frames=3 is less than one latent frame; give at least 4, or 0"),
        ],
    )
    def test_faults(self, changes, fault):
        assert any(fault in line for line in Vae(**changes).faults())
