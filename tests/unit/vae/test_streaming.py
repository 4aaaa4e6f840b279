"""Chunks of frames give what one pass gives, for every architecture; no later frame changes an earlier latent."""

import pytest
import torch

from vidit.config import VAE_PRESETS, Vae
from vidit.model.init import initialise
from vidit.vae.autoencoder import CausalVae
from vidit.vae.coding import decode_clip, encode_clip
from vidit.vae.streaming import CachedFront, DecodeStream, EncodeStream, stream_decode, stream_encode, twin

CHUNKS = (1, 2, 3, 5, 7)


def narrow(name, **changes):
    """A preset at a width that a test can afford, with at most one block a level."""
    c = Vae.preset(name)
    blocks = {n: tuple(min(1, k) for k in getattr(c, n)) for n in ("num_res_blocks", "decoder_res_blocks")}
    return Vae.preset(name, **{**blocks, "base_channels": 4, "latent_channels": 4, "norm_groups": 2, **changes})


def build(c):
    assert not [fault for fault in c.faults() if "tile" not in fault]
    vae = CausalVae(c)
    initialise(vae, 0)
    with torch.no_grad():  # norms and biases that are not their starting values
        for name, p in vae.named_parameters():
            if "norm" in name or name.endswith("bias"):
                p.add_(0.3 * torch.rand(p.shape, generator=torch.Generator().manual_seed(len(name))))
    return vae


def video(c, latent_frames, height=1, width=2, rows=1):
    shape = (rows, 3, 1 + c.temporal_stride * (latent_frames - 1), c.spatial_stride * height, c.spatial_stride * width)
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(
    scope="module",
    params=[
        (n, k)
        for n in VAE_PRESETS
        for k in ("rms", "group")
        if Vae.preset(n, norm=k).layers == "residual" or k == "group"
    ],
    ids=lambda p: "-".join(p),
)
def vae(request):
    name, norm = request.param
    return build(narrow(name, norm=norm))


@torch.no_grad()
def test_chunks_are_one_pass(vae):
    for frames in (4, 5):
        x = video(vae.config, frames)
        whole = vae.encode(x)
        pixels = vae.decode(whole.mean)
        assert pixels.shape == x.shape
        for size in CHUNKS:
            parts = list(stream_encode(vae, x.split(size, dim=2)))
            for name in ("mean", "log_variance"):
                joined = torch.cat([getattr(part, name) for part in parts], dim=2)
                torch.testing.assert_close(joined, getattr(whole, name), rtol=1e-5, atol=1e-5)
            decoded = torch.cat(list(stream_decode(vae, whole.mean.split(size, dim=2))), dim=2)
            torch.testing.assert_close(decoded, pixels, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_no_later_frame_changes_an_earlier_latent(vae):
    x, t = video(vae.config, 4), vae.config.temporal_stride
    before, pixels = vae.encode(x).mean, None
    pixels = vae.decode(before)
    for k in range(1, x.shape[2], 2):
        other = x.clone()
        other[:, :, k:] = other[:, :, k:].flip(-1) * 3
        after = vae.encode(other).mean
        own = -(-k // t)
        assert torch.equal(after[:, :, :own], before[:, :, :own]), f"frame {k} reached back"
        assert not torch.equal(after[:, :, own], before[:, :, own]), f"frame {k} did not reach its latent"
    for j in range(1, before.shape[2]):
        z = before.clone()
        z[:, :, j:] += 1
        first = 1 + (j - 1) * t
        assert torch.equal(vae.decode(z)[:, :, :first], pixels[:, :, :first])


@pytest.mark.parametrize("plant", ["fronts repeat", "drops on every part"])
@torch.no_grad()
def test_planted_bug_is_seen(plant, monkeypatch):
    vae = build(narrow("walt"))
    x = video(vae.config, 5)
    if plant == "fronts repeat":
        right = CachedFront.forward
        monkeypatch.setattr(
            CachedFront, "forward", lambda self, x: 0 * right(self, x) + (x[:, :, :1] if self.front.past else 0)
        )
        parts = torch.cat([part.mean for part in stream_encode(vae, x.split(4, dim=2))], dim=2)
        assert (parts - vae.encode(x).mean).abs().max() > 1e-3
    else:
        decoder = DecodeStream(vae)
        for module in decoder.decoder.modules():
            if hasattr(module, "started"):
                monkeypatch.setattr(type(module), "forward", lambda self, x: self.drop(x))
        z = vae.encode(x).mean
        parts = [p for chunk in z.split(2, dim=2) if (p := decoder.push(chunk)) is not None]
        assert sum(p.shape[2] for p in parts) < x.shape[2]


@torch.no_grad()
def test_streams_leave_the_vae_and_one_another_alone():
    vae = build(narrow("wavelet"))
    a, b = video(vae.config, 3), -video(vae.config, 3)
    expected = vae.encode(a).mean, vae.encode(b).mean
    streams, found = (EncodeStream(vae), EncodeStream(vae)), ([], [])
    for n in range(a.shape[2]):
        for stream, x, parts in zip(streams, (a, b), found, strict=True):
            part = stream.push(x[:, :, n : n + 1])
            parts += [] if part is None else [part.chunk(2, dim=1)[0]]
        torch.testing.assert_close(vae.encode(a).mean, expected[0], rtol=0, atol=0)
    for parts, whole in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.cat(parts, dim=2), whole, rtol=1e-5, atol=1e-5)


def test_a_twin_has_no_weights_of_its_own():
    vae = build(narrow("walt"))
    made = twin(vae.encoder)
    assert {id(p) for p in made.parameters()} == {id(p) for p in vae.encoder.parameters()}
    assert list(made.state_dict()) == list(vae.encoder.state_dict())


def test_what_is_remembered_does_not_grow():
    vae = build(narrow("walt"))
    stream, sizes = EncodeStream(vae), []
    for chunk in video(vae.config, 12).split(3, dim=2):
        stream.push(chunk)
        kept = [m.last for m in stream.encoder.modules() if isinstance(m, CachedFront) and m.last is not None]
        assert all(t._base is None for t in kept), "a view keeps the whole part"
        sizes.append(sum(t.untyped_storage().nbytes() for t in kept))
    assert len(set(sizes[1:])) == 1, sizes


def test_a_video_that_ends_between_two_latents():
    vae = build(narrow("walt"))
    with pytest.raises(ValueError, match=r"2 frames are left over.*1 \+ a multiple of .* stride 4"):
        list(stream_encode(vae, video(vae.config, 2)[:, :, :3].split(1, dim=2)))


def test_a_size_that_changes():
    vae = build(narrow("walt"))
    x = video(vae.config, 2)
    with pytest.raises(RuntimeError, match="follows one of"):
        list(stream_encode(vae, (x[:, :, :3], x[:, :, 3:, :, :8])))


@torch.no_grad()
@pytest.mark.parametrize("max_frames", [4, 6, 9, 16, 17, 40])
def test_limits_of_a_config(max_frames):
    c = narrow("walt", max_frames=max_frames)
    vae = build(c)
    x = video(c, 5)
    z = vae.encode(x).mean
    torch.testing.assert_close(encode_clip(vae, x, c).mean, z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(decode_clip(vae, z, c), vae.decode(z), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_limit_is_kept(monkeypatch):
    c = narrow("walt", max_frames=8)
    vae, seen = build(c), []
    push = EncodeStream.push
    monkeypatch.setattr(EncodeStream, "push", lambda self, x: seen.append(x.shape[2]) or push(self, x))
    encode_clip(vae, video(c, 6), c)
    assert max(seen) == 8
    assert sum(seen) == 21
