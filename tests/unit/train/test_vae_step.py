"""The step of an autoencoder: each of the two networks learns what it is to, and a resume changes no bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from parallel import checkpoint
from vidit import keys
from vidit.config import ConfigError, RunConfig
from vidit.data.catalog import Catalog
from vidit.data.loader import Batch, MicroBatches
from vidit.data.shards import read_index
from vidit.evaluate.frechet import frechet_distance
from vidit.resolve import resolve
from vidit.train.run import run
from vidit.train.step import to_pixels
from vidit.train.task import Task, build_task
from vidit.train.validation import validate
from vidit.vae.adversarial import fooled_rows, told_apart_rows
from vidit.vae.losses import kl_rows, wavelet_rows
from vidit.vae.perceptual import SceneFeatures, load_perceptual
from vidit.vae.store import load_vae

Configure = Callable[..., RunConfig]
CPU = torch.device("cpu")
GAN: dict[str, Any] = {"adversarial_weight": 0.5, "discriminator_channels": 8, "discriminator_layers": 2}


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights of the small network, as they start."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("features") / "features.safetensors"
    save_file(SceneFeatures().state_dict(), path)
    return str(path)


def vae_config(configure: Configure, run_dir: Path | str = "", **changes: Any) -> RunConfig:
    """The tiny VAE run; keywords are of `vae_train`, but for sections."""
    sections = {name: changes.pop(name) for name in ("train", "data", "vae", "parallel") if name in changes}
    sections["train"] = {"task": "vae", "global_batch": 4, "micro_batch": 4, **sections.get("train", {})}
    return configure(run_dir, vae_train=changes, **sections)


def rig(config: RunConfig) -> tuple[Task, Callable[[int], Batch]]:
    """A task with every parameter off its initial value, and its micro-batches."""
    task = build_task(config, CPU)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in task.model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    batches = MicroBatches(config, Catalog.plain(read_index(config.data.train)), None, resolve(config).latent_frames)
    return task, batches.__getitem__


def learned(task: Task, batches: list[Batch]) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of the rows of a step, and its gradients."""
    task.model.zero_grad(set_to_none=True)
    rows = [row for losses in task.passes.forward_backward(batches) for row in losses.rows_B.tolist()]
    return rows, {n: p.grad.clone() for n, p in task.model.named_parameters() if p.grad is not None}


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], within: float = 1e-9) -> None:
    assert one.keys() == other.keys()
    floor = 1e-9 * max(float(g.norm()) for g in one.values())
    for name in one:
        assert float((one[name] - other[name]).norm()) <= within * float(one[name].norm()) + floor, name


@pytest.mark.parametrize("kind", ["hinge", "non_saturating"])
@pytest.mark.parametrize("adaptive", [True, False])
def test_gradients_are_those_of_two_losses_written_out(configure: Configure, kind: str, adaptive: bool) -> None:
    """The autoencoder's with the discriminator at rest, the discriminator's with the reconstruction at rest."""
    config = vae_config(
        configure, **GAN, adversarial_loss=kind, adaptive=adaptive, wavelet_weight=0.3, train={"precision": "fp64"},
        vae={"l1_weight": 0.7, "l2_weight": 0.3, "kl_weight": 1e-3},
    )  # fmt: skip
    task, batch = rig(config)
    rows, found = learned(task, [batch(1)])
    vae, judge = task.model["vae"], task.model["discriminator"]
    x = to_pixels(batch(1).clips.pixels, CPU).double()
    task.model.zero_grad(set_to_none=True)

    def decoded() -> tuple[Tensor, Any]:
        q = vae.encode(x)
        noise = keys.normal(tuple(q.mean.shape[1:]), config.train.seed, "train/posterior", batch(1).rows)
        return vae.decode(q.mean + (0.5 * q.log_variance).exp() * noise), q

    out, q = decoded()
    error = out - x
    pixel = 0.7 * error.abs().flatten(1).mean(1) + 0.3 * error.square().flatten(1).mean(1) + 0.3 * wavelet_rows(error)
    judged = fooled_rows(kind, judge(out))
    weights = []
    for row in range(4):
        norms = [
            torch.autograd.grad(loss[row], vae.decoder.last.weight, retain_graph=True)[0].norm()
            for loss in (pixel, judged)
        ]
        weights.append(0.5 * (norms[0] / (norms[1] + 1e-4)) if adaptive else torch.tensor(0.5))
    total = pixel + 1e-3 * kl_rows(q) + torch.stack(weights).detach() * judged
    assert rows == pytest.approx(total.tolist(), rel=1e-9)
    of_vae = torch.autograd.grad(total.mean(), list(vae.parameters()))
    of_judge = torch.autograd.grad(
        told_apart_rows(kind, judge(x), judge(decoded()[0].detach())).mean(), list(judge.parameters())
    )
    expected = {f"vae.{n}": g for (n, _), g in zip(vae.named_parameters(), of_vae, strict=True)}
    expected |= {f"discriminator.{n}": g for (n, _), g in zip(judge.named_parameters(), of_judge, strict=True)}
    assert_close(expected, found)
    assert all(bool(g.any()) for g in found.values())


@pytest.mark.parametrize("image_rows", [0, 1])
def test_rows_do_not_depend_on_the_micro_batch(configure: Configure, features: str, image_rows: int) -> None:
    """Every term at once, adaptive weight included: a step of 4 rows in one micro-batch, and in two of 2."""
    recipe = {**GAN, "perceptual": "features", "perceptual_files": (features,), "r1_weight": 0.1, "lecam_weight": 0.1}
    found = []
    for micro in (4, 2):
        data = {"image_rows": image_rows * micro // 2}
        train = {"precision": "fp64", "micro_batch": micro}
        task, batch = rig(vae_config(configure, **recipe, train=train, data=data))
        task.model["discriminator"].averages.copy_(torch.tensor([0.3, -0.2, 0.5]))
        found.append(learned(task, [batch(n) for n in range(4 // micro, 8 // micro)]))
    if not image_rows:  # with images the clips of a step are other ones
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-9)
        assert_close(found[0][1], found[1][1])
    assert all(len(rows) == 4 for rows, _ in found)
    assert all(bool(g.isfinite().all()) and bool(g.any()) for _, grads in found for g in grads.values())


def test_the_discriminator_waits_for_its_step(configure: Configure) -> None:
    config = vae_config(configure, **GAN, adversarial_start=2)
    task, batch = rig(config)
    for step in (1, 2):
        task.model.zero_grad(set_to_none=True)
        (losses,) = task.passes.forward_backward([batch(step)])
        assert ("discriminator" in losses.parts) == (step == 2)
        assert (task.model["discriminator"].last.weight.grad is not None) == (step == 2)


def test_validation_is_of_reconstruction_alone(configure: Configure, features: str) -> None:
    recipe = {**GAN, "perceptual": "features", "perceptual_files": (features,)}
    with_judge, batch = rig(vae_config(configure, **recipe))
    without, _ = rig(vae_config(configure, perceptual="features", perceptual_files=(features,)))
    without.model["vae"].load_state_dict(with_judge.model["vae"].state_dict())
    found = [t.step(t.model, batch(0), "validation") for t in (with_judge, without)]
    assert torch.equal(found[0].rows_B, found[1].rows_B)
    assert found[0].parts == found[1].parts
    assert list(found[0].parts) == ["l1", "kl", "psnr", "ssim", "perceptual"]


def test_validation_has_the_frechet_distance_of_all_its_clips(configure: Configure, features: str) -> None:
    task, batch = rig(vae_config(configure, perceptual="features", perceptual_files=(features,)))
    batches = [batch(n) for n in range(3)]
    values = validate(task.model, task.step, batches, 1, lambda: None)
    seen = [task.step(task.model, one, "validation").features for one in batches]
    clips, made = (torch.cat([pair[side] for pair in seen]) for side in (0, 1))
    assert clips.shape == (12, 128)
    assert values["frechet"] == pytest.approx(frechet_distance(clips, made), rel=1e-6)
    assert task.step(task.model, batch(0), "train").features is None
    plain, batch = rig(vae_config(configure))
    assert "frechet" not in validate(plain.model, plain.step, batches, 1, lambda: None)


def test_perceptual_distance_is_in_the_loss(configure: Configure, features: str) -> None:
    recipe = {"perceptual": "features", "perceptual_files": (features,), "perceptual_weight": 3.0}
    task, batch = rig(vae_config(configure, **recipe))
    plain, _ = rig(vae_config(configure))
    plain.model["vae"].load_state_dict(task.model["vae"].state_dict())
    one, other = (t.step(t.model, batch(0), "train") for t in (task, plain))
    assert one.parts["perceptual"] > 0
    assert float((one.rows_B - other.rows_B).detach().mean()) == pytest.approx(3 * one.parts["perceptual"], rel=1e-4)
    assert set(task.model) == {"vae"}, "a frozen network is no part of the trained model"
    assert load_perceptual("features", [features]).features[0].weight.requires_grad is False


def test_bf16_computes_every_term_near_fp32(configure: Configure, features: str) -> None:
    recipe = {**GAN, "perceptual": "features", "perceptual_files": (features,), "r1_weight": 0.1, "lecam_weight": 0.1}
    parts = []
    for precision in ("fp32", "bf16"):
        task, batch = rig(vae_config(configure, **recipe, train={"precision": precision}))
        (losses,) = task.passes.forward_backward([batch(1)])
        assert losses.rows_B.dtype == torch.float32
        assert all(p.grad.dtype == torch.float32 for p in task.model.parameters())
        parts.append(losses.parts)
    for name, value in parts[0].items():
        assert parts[1][name] == pytest.approx(value, rel=0.1, abs=0.02), name


def test_networks_are_clipped_apart(configure: Configure) -> None:
    """The discriminator's gradient, however large, leaves the autoencoder its own."""
    task, _ = rig(vae_config(configure, **GAN))
    names = {id(p): n for n, p in task.model.named_parameters()}
    groups = [{names[id(p)].partition(".")[0] for p in group} for group in task.networks]
    assert groups == [{"vae"}, {"discriminator"}]


ODD: dict[str, Any] = {"patch": 1, "spatial_down": (False,)}
RECIPE: dict[str, Any] = {
    **GAN, "adversarial_start": 2, "lecam_weight": 0.01, "r1_weight": 0.1, "discriminator_rate": 0.5,
}  # fmt: skip


def outcome(run_dir: Path, step: int = 6) -> dict[str, Any]:
    newest = checkpoint.folder_of(run_dir / "checkpoints", step)
    found: dict[str, Any] = {n: t.tolist() for path in newest.glob("*.safetensors") for n, t in load_file(path).items()}
    return found | {"metrics": (run_dir / "metrics.jsonl").read_bytes()}


def test_a_resume_has_the_discriminator_its_moments_and_averages(configure: Configure, tmp_path: Path) -> None:
    whole, parts = (vae_config(configure, tmp_path / name, **RECIPE) for name in ("whole", "parts"))
    assert run(whole)
    shorter = parts.model_copy(update={"train": parts.train.model_copy(update={"steps": 3})})
    assert run(shorter)
    assert run(parts)
    one, other = outcome(tmp_path / "whole"), outcome(tmp_path / "parts")
    one_rows, other_rows = (
        [row for row in map(json.loads, found.pop("metrics").splitlines()) if "loss" in row] for found in (one, other)
    )
    assert one == other
    assert one_rows == other_rows
    assert any(name.startswith("exp_avg_sq.discriminator.") for name in one)
    assert any(one["model.discriminator.averages"])
    assert not any(name.startswith("ema.discriminator") for name in one), "nobody uses its average"
    assert "adversarial" not in one_rows[1]
    assert {"adversarial", "discriminator", "r1", "lecam", "logits_real"} <= one_rows[2].keys()
    vae = load_vae(tmp_path / "whole" / "vae", CPU, torch.float32)
    assert not any("discriminator" in name for name in vae.state_dict())


def test_its_learning_rate_is_its_own(configure: Configure, tmp_path: Path) -> None:
    """One step of Adam moves every weight by about its rate."""
    config = vae_config(configure, tmp_path, **GAN, discriminator_rate=0.25, train={"steps": 1, "learning_rate": 1e-3})
    start = build_task(config, CPU).model.state_dict()
    assert run(config)
    now = outcome(tmp_path, 1)
    moved = {}
    for network, layer in (("vae", "decoder.last.weight"), ("discriminator", "last.weight")):
        name = f"{network}.{layer}"
        moved[network] = float((torch.tensor(now[f"model.{name}"]) - start[name]).abs().median())
    assert moved["vae"] == pytest.approx(1e-3, rel=0.05)
    assert moved["discriminator"] == pytest.approx(0.25e-3, rel=0.05)


def test_a_frozen_encoder_keeps_its_weights_and_statistics(configure: Configure, tmp_path: Path) -> None:
    assert run(vae_config(configure, tmp_path / "first", train={"steps": 2}))
    config = vae_config(
        configure, tmp_path / "second", **GAN, init=str(tmp_path / "first" / "vae"), freeze_encoder=True,
        train={"steps": 3},
    )  # fmt: skip
    assert run(config)
    before, after = (load_vae(tmp_path / n / "vae", CPU, torch.float32).state_dict() for n in ("first", "second"))
    for name in before:
        same = torch.equal(before[name], after[name])
        assert same == (not name.startswith("decoder")), name


def test_a_run_starts_from_the_weights_that_it_is_given(configure: Configure, tmp_path: Path) -> None:
    assert run(vae_config(configure, tmp_path / "first", train={"steps": 2}))
    config = vae_config(configure, tmp_path / "second", init=str(tmp_path / "first" / "vae"))
    started = build_task(config, CPU).model["vae"].state_dict()
    given = load_vae(tmp_path / "first" / "vae", CPU, torch.float32).state_dict()
    assert all(torch.equal(started[name], given[name]) for name in given)
    assert run(config)
    longer = config.model_copy(update={"train": config.train.model_copy(update={"steps": 8})})
    (tmp_path / "first" / "vae" / "model.safetensors").unlink()
    assert run(longer), "a run that goes on needs no start"


def test_buckets_of_images_and_clips(configure: Configure, features: str, tmp_path: Path) -> None:
    buckets = [{"num_frames": n, "height": 32, "width": 32, "keep": keep, "rows": 2} for n, keep in ((1, 1), (5, 0.5))]
    recipe = {**RECIPE, "perceptual": "features", "perceptual_files": (features,), "wavelet_weight": 0.1}
    config = vae_config(configure, tmp_path, **recipe, data={"buckets": buckets}, train={"micro_batch": 2})
    assert run(config)
    rows = [row for row in map(json.loads, (tmp_path / "metrics.jsonl").open()) if "loss" in row]
    assert len(rows) == 6
    assert all(row["discriminator"] > 0 for row in rows[2:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adversarial_weight": 1.0, "adversarial_start": 6}, "not before the end, train.steps=6"),
        ({"r1_weight": 1.0}, "r1_weight=1.0 has no effect without vae_train.adversarial_weight above 0"),
        ({"perceptual": "lpips"}, "needs weights; give their files"),
        ({"freeze_encoder": True}, "has no effect without vae_train.init"),
        ({"adversarial_weight": 1.0, "parallel": {"sequence": 2, "vae_context": "time"}}, "judges whole ones"),
        (
            {"wavelet_weight": 0.1, "vae": ODD, "data": {"height": 33, "width": 33}},
            "frames of 33x33 are not",
        ),
        ({"init": "x", "freeze_encoder": True, "vae": {"kl_weight": 0.1}}, "an encoder that is trained"),
    ],
)
def test_what_makes_no_sense_is_refused(configure: Configure, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(vae_config(configure, **change), 2)
