"""The causal VAE: what may depend on what, sizes, weights on disk."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from vidit.config import ConfigError, Data, RunConfig, Vae
from vidit.model.init import initialise
from vidit.vae.autoencoder import LOG_VARIANCE, CausalVae, Posterior
from vidit.vae.folding import Fold, Unfold
from vidit.vae.layers import CausalConv3d, Down, Up
from vidit.vae.norms import ChannelNorm
from vidit.vae.store import load_vae, save_vae
from vidit.vae.stored import adopt_vae, vae_config

CPU = torch.device("cpu")
BLOCKS = {"num_res_blocks": (1, 1, 1, 1), "decoder_res_blocks": (1, 1, 1, 1)}
STRIDES = {
    "4x8x8": {**BLOCKS, "base_channels": 4, "latent_channels": 2},
    "patch 2, 4x8x8": {
        "patch": 2,
        "base_channels": 4,
        "multipliers": (1, 2, 2),
        "num_res_blocks": (0, 1, 1),
        "decoder_res_blocks": (1, 0, 1),
        "spatial_down": (True, True),
        "temporal_down": (True, True),
        "latent_channels": 2,
    },
    "2x4x4": {**BLOCKS, "base_channels": 4, "latent_channels": 4, "multipliers": (1, 2, 2, 2),
              "spatial_down": (True, True, False), "temporal_down": (True, False, False)},
    "8x2x2": {**BLOCKS, "base_channels": 4, "latent_channels": 2, "spatial_down": (False, False, True),
              "temporal_down": (True, True, True)},
    "1x4x4": {**BLOCKS, "base_channels": 2, "latent_channels": 8, "spatial_down": (True, False, True),
              "temporal_down": (False, False, False)},
}  # fmt: skip


def build(seed=0, **changes):
    vae = CausalVae(Vae(**{**STRIDES["4x8x8"], **changes}))
    initialise(vae, seed)
    return vae


def video(vae, latent_frames=3, height=2, width=3, rows=1, seed=0):
    s, t = vae.config.spatial_stride, vae.config.temporal_stride
    g = torch.Generator().manual_seed(seed)
    return torch.rand(rows, 3, 1 + t * (latent_frames - 1), s * height, s * width, generator=g) * 2 - 1


def latent(vae, latent_frames=3, height=2, width=3, rows=1, seed=0):
    shape = (rows, vae.config.latent_channels, latent_frames, height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("changes", STRIDES.values(), ids=STRIDES)
class TestStrides:
    @torch.no_grad()
    def test_shapes(self, changes):
        vae = build(**changes)
        for frames, height, width in [(1, 1, 1), (2, 1, 3), (3, 2, 2)]:
            x = video(vae, frames, height, width, rows=2)
            q = vae.encode(x)
            assert q.mean.shape == q.log_variance.shape == (2, vae.config.latent_channels, frames, height, width)
            assert vae.decode(q.mean).shape == x.shape

    @torch.no_grad()
    def test_encoder_is_causal(self, changes):
        """Frame 0 is latent frame 0; frames 1 + (j - 1) t ... j t are latent frame j, which no later frame moves."""
        vae = build(**changes)
        x, t = video(vae), vae.config.temporal_stride
        before = vae.encode(x)
        for k in range(x.shape[2]):
            other = x.clone()
            other[:, :, k] = other[:, :, k].flip(-1) * 0.5
            after = vae.encode(other)
            own = -(-k // t)
            for a, b in zip(before, after, strict=True):
                assert torch.equal(a[:, :, :own], b[:, :, :own]), f"frame {k} reached back"
                assert not torch.equal(a[:, :, own], b[:, :, own]), f"frame {k} did not reach latent frame {own}"

    @torch.no_grad()
    def test_decoder_is_causal(self, changes):
        vae = build(**changes)
        z, t = latent(vae), vae.config.temporal_stride
        before = vae.decode(z)
        for j in range(z.shape[2]):
            other = z.clone()
            other[:, :, j] += 1
            after = vae.decode(other)
            first = 0 if j == 0 else 1 + (j - 1) * t
            assert torch.equal(before[:, :, :first], after[:, :, :first]), f"latent frame {j} reached back"
            moved = (before != after).flatten(3).any(-1).all(1)[0]
            assert moved[first : first + (1 if j == 0 else t)].all(), f"latent frame {j} missed its own frames"

    @torch.no_grad()
    def test_a_beginning_is_coded_as_if_it_were_alone(self, changes):
        """So an image is a video of one frame."""
        vae = build(**changes)
        x, z, t = video(vae), latent(vae), vae.config.temporal_stride
        whole, pixels = vae.encode(x), vae.decode(z)
        for frames in (1, 2):
            part = vae.encode(x[:, :, : 1 + t * (frames - 1)])
            for a, b in zip(part, whole, strict=True):
                torch.testing.assert_close(a, b[:, :, :frames], rtol=1e-4, atol=1e-5)
            shorter = vae.decode(z[:, :, :frames])
            torch.testing.assert_close(shorter, pixels[:, :, : 1 + t * (frames - 1)], rtol=1e-4, atol=1e-5)

    def test_gradient_reaches_every_parameter(self, changes):
        vae = build(**changes)
        q = vae.encode(video(vae))
        (vae.decode(q.mean).square().mean() + q.kl()).backward()
        assert [n for n, p in vae.named_parameters() if p.grad is None or not p.grad.any()] == []

    @torch.no_grad()
    def test_rows_are_independent(self, changes):
        vae = build(**changes)
        x = video(vae, rows=2)
        other = torch.cat((x[:1], -x[1:]))
        torch.testing.assert_close(vae.encode(other).mean[0], vae.encode(x).mean[0], rtol=0, atol=1e-6)

    def test_every_parameter_is_touched_by_initialise(self, changes):
        vae = CausalVae(Vae(**changes))
        with torch.no_grad():
            for p in vae.parameters():
                p.fill_(float("nan"))
        initialise(vae, 0)
        assert [n for n, p in vae.named_parameters() if not p.isfinite().all()] == []


class TestSizes:
    @pytest.mark.parametrize("size", [(2, 8, 8), (5, 12, 8), (5, 8, 4), (4, 16, 16), (3, 9, 9)])
    def test_what_does_not_divide(self, size):
        frames, height, width = size
        numbers = f"{frames} frames of {height}x{width} does not fit the VAE's strides 4x8x8"
        with pytest.raises(ValueError, match=f"{numbers}.*1 \\+ a multiple of 4.*multiples of 8"):
            build().encode(torch.zeros(1, 3, *size))

    def test_joints_that_do_not_divide(self):
        c = Vae(base_channels=9, multipliers=(1, 2), latent_channels=6, spatial_down=(True,), temporal_down=(False,),
                num_res_blocks=(1, 1), decoder_res_blocks=(1, 1))  # fmt: skip
        assert not list(c.faults())
        faults = list(c.model_copy(update={"multipliers": (1, 8)}).faults())
        assert any("folds 9 channels to 36, which 72 do not divide" in fault for fault in faults)

    def test_meta(self):
        with torch.device("meta"):
            vae = CausalVae(Vae())
        assert all(p.is_meta for p in vae.parameters())
        assert vae.encode(torch.zeros(1, 3, 17, 64, 64, device="meta")).mean.shape == (1, 8, 5, 8, 8)


class TestLayers:
    def test_first_frame_is_repeated_in_front(self):
        conv = CausalConv3d(2, 3)
        initialise(conv, 0)
        x = torch.randn(1, 2, 4, 5, 5)
        padded = torch.cat((x[:, :, :1], x[:, :, :1], x), 2)
        expected = torch.nn.functional.conv3d(padded, conv.weight, conv.bias, padding=(0, 1, 1))
        torch.testing.assert_close(conv(x), expected)

    def test_a_still_video_stays_still(self):
        """Repeating the first frame in front adds no edge in time."""
        vae = build()
        with torch.no_grad():
            q = vae.encode(video(vae)[:, :, :1].repeat(1, 1, 9, 1, 1))
        torch.testing.assert_close(q.mean, q.mean[:, :, :1].expand_as(q.mean), rtol=1e-4, atol=1e-5)

    def test_norm_is_of_one_position(self):
        norm = ChannelNorm(6)
        torch.nn.init.uniform_(norm.weight)
        x = torch.randn(2, 6, 3, 2, 2)
        expected = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt() * norm.weight.view(-1, 1, 1, 1)
        torch.testing.assert_close(norm(x), expected)
        assert norm(x.bfloat16()).dtype == torch.bfloat16

    @pytest.mark.parametrize("patch", [1, 2, 4])
    def test_folding_pixels(self, patch):
        x = torch.arange(2 * 3 * 2 * 8 * 8.0).view(2, 3, 2, 8, 8)
        fold, unfold = Fold(Vae(patch=patch)), Unfold(Vae(patch=patch))
        folded = fold(x)
        assert folded.shape == (2, 3 * patch**2, 2, 8 // patch, 8 // patch)
        assert torch.equal(unfold(folded), x)
        patches = folded[0, :, 0, 1, 0].sort().values
        assert torch.equal(patches, x[0, :, 0, patch : 2 * patch, :patch].flatten().sort().values)

    @pytest.mark.parametrize(("space", "time"), [(True, True), (True, False), (False, True)])
    def test_shortcuts_keep_the_mean(self, space, time):
        """Without its convolution a joint passes averages on: `Down` means over blocks, `Up` repeats."""
        down, up = Down(4, 4, space, time), Up(4, 4, space, time)
        for p in [*down.parameters(), *up.parameters()]:
            torch.nn.init.zeros_(p)
        z = torch.randn(1, 4, 3, 2, 2)
        wide = up(z)
        s, t = (2 if space else 1), (2 if time else 1)
        assert wide.shape == (1, 4, 1 + 2 * t, 2 * s, 2 * s)
        blocks = z.repeat_interleave(t, 2)[:, :, t - 1 :].repeat_interleave(s, 3).repeat_interleave(s, 4)
        torch.testing.assert_close(wide, blocks)
        torch.testing.assert_close(down(blocks).mean(1), z.mean(1))


class TestLatent:
    def test_shortcut_of_the_encoder(self):
        """With a last convolution of zeros the mean is the mean of groups of channels, and the variance is small."""
        vae, seen = build(), {}
        for p in vae.encoder.last.parameters():
            torch.nn.init.zeros_(p)
        vae.encoder.layers.register_forward_hook(lambda _, args, out: seen.update(h=out))
        with torch.no_grad():
            q = vae.encode(video(vae))
        torch.testing.assert_close(q.mean, seen["h"].unflatten(1, (2, 8)).mean(2))
        assert torch.equal(q.log_variance, torch.full_like(q.mean, LOG_VARIANCE))

    def test_shortcut_of_the_decoder(self):
        vae, seen = build(), {}
        for p in vae.decoder.first.parameters():
            torch.nn.init.zeros_(p)
        vae.decoder.layers.register_forward_pre_hook(lambda _, args: seen.update(h=args[0]))
        z = latent(vae)
        with torch.no_grad():
            vae.decode(z)
        assert torch.equal(seen["h"], z.repeat_interleave(8, 1))

    def test_whitening(self):
        vae = build()
        vae.latent_mean.copy_(torch.tensor([1.0, -3.0]))
        vae.latent_std.copy_(torch.tensor([0.5, 4.0]))
        z = latent(vae, 5, 8, 8, rows=4) * vae.latent_std.view(1, -1, 1, 1, 1) + vae.latent_mean.view(1, -1, 1, 1, 1)
        white = vae.whiten(z)
        torch.testing.assert_close(white.mean((0, 2, 3, 4)), torch.zeros(2), rtol=0, atol=0.1)
        torch.testing.assert_close(white.std((0, 2, 3, 4)), torch.ones(2), rtol=0.1, atol=0)
        torch.testing.assert_close(vae.unwhiten(white), z, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(vae.whiten(vae.unwhiten(z)), z, rtol=1e-6, atol=1e-6)

    def test_kl_is_the_formula(self):
        g = torch.Generator().manual_seed(0)
        mean, log_variance = (torch.randn(2, 3, 2, 2, 2, generator=g) for _ in range(2))
        p = torch.distributions.Normal(torch.zeros_like(mean), 1)
        q = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
        expected = torch.distributions.kl_divergence(q, p).mean()
        torch.testing.assert_close(Posterior(mean, log_variance).kl(), expected)
        assert Posterior(torch.zeros(1), torch.zeros(1)).kl() == 0

    def test_bf16_gives_fp32(self):
        vae = build()
        x = video(vae)
        exact = vae.encode(x).mean
        vae.dtype = torch.bfloat16
        q = vae.encode(x)
        assert q.mean.dtype == q.log_variance.dtype == vae.decode(q.mean).dtype == torch.float32
        assert 0 < (q.mean - exact).norm() / exact.norm() < 0.05


class TestStore:
    @pytest.fixture
    def folder(self, tmp_path):
        vae = build(seed=3)
        vae.latent_mean.copy_(torch.tensor([1.25, 2.0001]))
        save_vae(tmp_path / "vae", vae)
        return tmp_path / "vae"

    def test_round_trip_is_exact(self, folder):
        vae, loaded = build(seed=3), load_vae(folder, CPU, torch.float32)
        assert loaded.config == vae.config.model_copy(update={"weights": str(folder)})
        state = loaded.state_dict()
        assert list(state) == list(vae.state_dict())
        assert all(torch.equal(state[n], p) for n, p in vae.named_parameters())
        assert torch.equal(state["latent_mean"], torch.tensor([1.25, 2.0001]))
        x = video(vae)
        with torch.no_grad():
            assert torch.equal(loaded.encode(x).mean, vae.encode(x).mean)

    def test_loaded_is_frozen(self, folder):
        loaded = load_vae(folder, CPU, torch.bfloat16)
        assert loaded.dtype == torch.bfloat16
        assert not loaded.training
        assert not any(p.requires_grad for p in loaded.parameters())
        assert all(p.dtype == torch.float32 for p in loaded.parameters())

    def test_half_is_close_and_keeps_the_statistics(self, tmp_path):
        vae = build(seed=3)
        vae.latent_std.copy_(torch.tensor([1.00001, 0.3333333]))
        save_vae(tmp_path / "half", vae, half=True)
        save_vae(tmp_path / "full", vae)
        small, large = ((tmp_path / n / "model.safetensors").stat().st_size for n in ("half", "full"))
        assert small < 0.7 * large
        loaded = load_vae(tmp_path / "half", CPU, torch.float32)
        assert torch.equal(loaded.latent_std, vae.latent_std)
        for n, p in vae.named_parameters():
            torch.testing.assert_close(loaded.get_parameter(n), p, rtol=1e-3, atol=1e-6)
        x = video(vae)
        with torch.no_grad():
            a, b = vae.encode(x).mean, loaded.encode(x).mean
        assert (a - b).norm() / a.norm() < 1e-3

    def test_missing_config(self, folder):
        (folder / "config.json").unlink()
        with pytest.raises(ValueError, match=rf"{re.escape(str(folder))} holds no config\.json"):
            load_vae(folder, CPU, torch.float32)

    @pytest.mark.parametrize("text", ["", "{", '{"patch": 0}', '{"colour": 1}', "[]"])
    def test_damaged_config(self, folder, text):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=re.escape(str(folder / "config.json"))):
            load_vae(folder, CPU, torch.float32)

    @pytest.mark.parametrize("damage", ["missing", "empty", "cut", "flipped header", "text"])
    def test_damaged_weights(self, folder, damage):
        path = folder / "model.safetensors"
        data = path.read_bytes()
        if damage == "missing":
            path.unlink()
        else:
            changed = {"empty": b"", "cut": data[:-100], "flipped header": b"\xff" * 8 + data[8:], "text": b"hello"}
            path.write_bytes(changed[damage])
        with pytest.raises(ValueError, match=rf"{re.escape(str(path))}"):
            load_vae(folder, CPU, torch.float32)

    def test_names_that_do_not_fit(self, folder):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        tensors["odd"] = tensors.pop("encoder.first.bias")
        save_file(tensors, path)
        with pytest.raises(ValueError, match=r"(?s)model\.safetensors does not fit .*encoder\.first\.bias.*odd"):
            load_vae(folder, CPU, torch.float32)

    def test_shapes_that_do_not_fit(self, folder):
        other = json.loads((folder / "config.json").read_text()) | {"base_channels": 8}
        (folder / "config.json").write_text(json.dumps(other))
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            load_vae(folder, CPU, torch.float32)


class TestAdopt:
    @pytest.fixture
    def folder(self, tmp_path):
        save_vae(tmp_path, build(base_channels=8))
        return tmp_path

    def run(self, **vae):
        return RunConfig(name="a", vae=Vae(**vae), data=Data(train="x"))

    def test_geometry_comes_with_the_weights(self, folder):
        adopted = adopt_vae(self.run(weights=str(folder))).vae
        assert adopted == vae_config(folder)
        assert adopted.base_channels == 8
        assert adopted.weights == str(folder)
        assert adopt_vae(self.run(weights=str(folder), base_channels=8)).vae == adopted

    def test_a_config_that_says_otherwise(self, folder):
        with pytest.raises(ConfigError, match=r"2 faults") as caught:
            adopt_vae(self.run(weights=str(folder), base_channels=16, latent_channels=4))
        assert "vae.base_channels=16" in str(caught.value)
        assert "vae.latent_channels=4" in str(caught.value)

    def test_no_weights_no_change(self, folder):
        assert adopt_vae(self.run()) == self.run()
        shutil.rmtree(folder)
        with pytest.raises(ValueError, match=r"holds no config\.json"):
            adopt_vae(self.run(weights=str(folder)))
