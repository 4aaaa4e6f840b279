"""`--first`: what a model that takes given frames is shown, what comes out, and what is refused."""

import re

import pytest
import torch
from PIL import Image

from vidit.cli import main
from vidit.config import UNET_FAMILIES, ConfigError, RunConfig
from vidit.data.encode import encode_mp4
from vidit.data.scenes import render, sample_scene
from vidit.sample.draw import draw
from vidit.sample.given import first_latent, read_first
from vidit.sample.run import open_trained
from vidit.train.run import run

GIVEN = {"model": {"frame_times": True}, "diffusion": {"given": ({"kind": "image_head", "share": 0.5},)}}


@pytest.fixture(scope="module")
def trained(configure, tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    assert run(configure(folder / "run", train={"steps": 2}, sample={"prompts": ()}, **GIVEN))
    scene = sample_scene(0, 3, "train")
    pixels = render(scene)
    (folder / "clip.mp4").write_bytes(encode_mp4(pixels, float(scene.fps)))
    Image.fromarray(pixels[0]).save(folder / "image.png")
    return folder


@pytest.mark.parametrize(("name", "count"), [("image.png", 1), ("clip.mp4", 1), ("clip.mp4", 3)])
def test_the_video_begins_with_them(trained, name, count):
    """3 frames are 2 of 3 latent frames. What the VAE makes of the given ones alone is what the samples begin with."""
    opened = open_trained(trained / "run", ["sample.num_steps=3"])
    frames = read_first(opened.config, trained / name, count)
    assert frames.shape == (count, 32, 32, 3)
    first = first_latent(opened.config, opened.step, frames)
    given, seen = first.shape[2], []
    assert given == 1 + (count - 1) // 2

    def note(_, args):
        x, _, time = args[:3]
        seen.append((torch.equal(x[:, :, :given], first.expand(len(x), -1, -1, -1, -1)), time))

    hook = opened.model["dit"].register_forward_pre_hook(note)
    videos = opened.draw(["a red circle moves left", "a blue square"], 0, frames)
    hook.remove()
    assert len(seen) == 3
    for is_first, time in seen:
        assert is_first
        assert time.shape == (4, 3)  # guided
        assert not time[:, :given].any()
        assert (time[:, given:] > 0).all()
        assert (time[:, given:] == time[:, -1:]).all()
    plain = opened.draw(["a red circle moves left", "a blue square"], 0)
    decoded = opened.step.vae.decode(opened.step.vae.unwhiten(first).float())
    expected = ((decoded.clamp(-1, 1) + 1) * 127.5).round()[0].permute(1, 2, 3, 0)
    for video, other in zip(videos, plain, strict=True):
        assert (video[:count].float() - expected).abs().max() <= 1
        assert not torch.equal(video[:count], other[:count])
    assert not torch.equal(videos[0][count:], videos[1][count:])


def test_frames_beside_the_noise(configure, tmp_path, trained):
    """`given_channels`: the model sees them in every pass, with their mask, and makes all frames itself."""
    given = {
        **GIVEN,
        "model": {"given_channels": True},
        "diffusion": {**GIVEN["diffusion"], "path": "vp", "target": "v"},
    }
    assert run(configure(tmp_path / "run", train={"steps": 2}, sample={"prompts": (), "sampler": "ddim"}, **given))
    opened, seen = open_trained(tmp_path / "run", ["sample.num_steps=2"]), []
    frames = read_first(opened.config, trained / "image.png", 1)
    first = first_latent(opened.config, opened.step, frames)
    opened.model["dit"].register_forward_pre_hook(lambda _, args: seen.append((args[1].given_BCTHW, args[2])))
    with torch.no_grad():
        opened.model["dit"].embed.patch.given.weight.normal_()
        opened.model["dit"].head.project.weight.normal_(std=0.1)
    (video,) = opened.draw(["a red circle"], 0, frames)
    assert len(seen) == 2
    for shown, time in seen:
        assert time.shape == (2,)
        assert torch.equal(shown[:, :-1, :1], first.expand(2, -1, -1, -1, -1).to(shown))
        assert not shown[:, :, 1:].any()
        assert (shown[:, -1, 0] == 1).all()
    assert not torch.equal(video, opened.draw(["a red circle"], 0)[0])
    assert seen[-1][0] is None


@pytest.mark.parametrize(("sampler", "precision"), [("ddim", "fp32"), ("heun", "bf16")])
def test_a_model_that_was_not_trained_for_it(configure, tmp_path, trained, sampler, precision):
    """It is pulled: the frames stand at the beginning, and those behind follow them through the model's gradient."""
    config = configure(tmp_path / "run", train={"steps": 2}, sample={"prompts": ()}, model={"self_conditioning": 0.5})
    assert run(config)
    overrides, videos = ["sample.num_steps=3", f"sample.sampler={sampler}", f"train.precision={precision}"], {}
    for weight in (1e-9, 9.0):
        opened = open_trained(tmp_path / "run", [*overrides, f"sample.reconstruction_guidance={weight}"])
        frames = read_first(opened.config, trained / "clip.mp4", 3)
        first = first_latent(opened.config, opened.step, frames)
        with torch.no_grad():
            (videos[weight],) = opened.draw(["a red circle"], 0, frames)
        decoded = opened.step.vae.decode(opened.step.vae.unwhiten(first).float())
        expected = ((decoded.clamp(-1, 1) + 1) * 127.5).round()[0].permute(1, 2, 3, 0)
        assert (videos[weight][:3].float() - expected).abs().max() <= 1
    assert not torch.equal(videos[1e-9][3:], videos[9.0][3:])
    assert all(p.grad is None for p in opened.model.parameters())


def test_a_unet_is_pulled(configure, tmp_path, trained):
    """Video diffusion models are where it comes from (2204.03458, section 3.1)."""
    unet = {
        **UNET_FAMILIES["vdm"], "channels": 8, "multipliers": (1, 2), "num_res_blocks": 1, "attention": (True, False),
        "head_dim": 4, "norm_groups": 4,
    }  # fmt: skip
    tree = configure(tmp_path / "run", unet=unet, sample={"prompts": ()}, diffusion={"path": "vp", "target": "v"})
    tree = tree.model_dump(exclude_unset=True) | {"train": tree.train.model_dump() | {"task": "unet", "steps": 2}}
    assert run(RunConfig.model_validate({name: value for name, value in tree.items() if name != "model"}))
    videos = []
    for weight in (1e-9, 9.0):
        opened = open_trained(
            tmp_path / "run", ["sample.num_steps=3", "sample.sampler=ddim", f"sample.reconstruction_guidance={weight}"]
        )
        frames = read_first(opened.config, trained / "clip.mp4", 3)
        videos += opened.draw(["a red circle"], 0, frames)
    assert torch.equal(videos[0][:3], videos[1][:3])
    assert not torch.equal(videos[0][3:], videos[1][3:])


def test_the_command(trained, capsys):
    given = ["--first", str(trained / "clip.mp4"), "--first-frames", "3", "--out", str(trained / "out")]
    assert main(["sample", str(trained / "run"), "--prompt", "a red circle", "sample.num_steps=1", *given]) == 0
    assert len(capsys.readouterr().out.split()) == 2
    assert main(["sample", str(trained / "run"), "--prompt", "a", "--first-frames", "3"]) == 1
    assert "--first-frames=3 has no effect without --first" in capsys.readouterr().err
    pulled = "sample.reconstruction_guidance=9"
    assert main(["sample", str(trained / "run"), "--prompt", "a", pulled]) == 1
    assert f"{pulled} has no effect without --first" in capsys.readouterr().err


def test_what_is_refused(trained, configure, tmp_path):
    config = open_trained(trained / "run").config
    for count in (2, 5):
        with pytest.raises(ConfigError, match=f"--first-frames={count} is not 1 \\+ a multiple of 2 below.*use 1 to 3"):
            read_first(config, trained / "clip.mp4", count)
    still = config.model_copy(update={"data": config.data.model_copy(update={"num_frames": 1})})
    with pytest.raises(ConfigError, match=r"begins a video, but data\.num_frames=1"):
        read_first(still, trained / "image.png", 1)
    with pytest.raises(ValueError, match="cannot begin a video"):
        read_first(config, trained / "image.png", 3)
    for name in ("not.mp4", "not.png", "none.jpg"):
        if name.startswith("not"):
            (tmp_path / name).write_text("neither")
        with pytest.raises(ValueError, match=f"{re.escape(name)} cannot begin a video"):
            read_first(config, tmp_path / name, 1)
    with pytest.raises(ConfigError, match="was not trained for it"):
        read_first(configure(tmp_path), trained / "image.png", 1)


def test_an_image_is_cut_in_its_middle(trained, tmp_path):
    config = open_trained(trained / "run").config
    wide = torch.zeros(64, 192, 3, dtype=torch.uint8)
    wide[:, 64:128] = 200
    Image.fromarray(wide.numpy()).save(tmp_path / "wide.png")
    frames = read_first(config, tmp_path / "wide.png", 1)
    assert frames.shape == (1, 32, 32, 3)
    assert (frames[0, :, 2:-2] == 200).all()


def test_nothing_given_changes_nothing(trained):
    opened = open_trained(trained / "run", ["sample.num_steps=2"])
    one = opened.draw(["a"], 1)[0]
    assert torch.equal(one, draw(opened.config, opened.step, opened.model, opened.text, ["a"], 1)[0])
