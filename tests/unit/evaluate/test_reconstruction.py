"""`vidit evaluate` of a VAE run: the numbers are those of its clips, and what cannot be said is refused."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from vidit.cli import main
from vidit.config import RunConfig
from vidit.data.catalog import Catalog
from vidit.data.loader import MicroBatches
from vidit.data.shards import read_index
from vidit.evaluate.reconstruction import evaluate_vae, picture
from vidit.train.run import run
from vidit.train.step import to_pixels
from vidit.vae.perceptual import SceneFeatures, load_perceptual
from vidit.vae.store import load_vae

Configure = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "features.safetensors"
    save_file(SceneFeatures().state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def trained(configure: Configure, weights: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    config = configure(
        folder, train={"task": "vae", "steps": 2}, vae_train={"perceptual": "features", "perceptual_files": (weights,)}
    )
    assert run(config)
    return folder


def test_numbers_are_of_the_validation_clips(trained: Path, weights: str, configure: Configure) -> None:
    found = evaluate_vae(trained, 64, features=weights)
    config = RunConfig.model_validate_json((trained / "config.json").read_text())
    clips = MicroBatches(config, Catalog.plain(read_index(config.data.train)), None, 1)
    x = to_pixels(torch.stack([clips.decode(ref)[0] for ref in list(clips.refs)[-4:]]), torch.device("cpu"))
    vae = load_vae(trained / "vae", torch.device("cpu"), torch.float32)
    with torch.no_grad():
        out = vae.decode(vae.encode(x).mean).clamp(-1, 1)
    error = (x - out).square().flatten(1).mean(1)
    assert found["psnr_db"] == pytest.approx(float((10 * torch.log10(4 / error)).mean()), abs=1e-3)
    assert found["features"] == pytest.approx(float(load_perceptual("features", [weights])(x, out).mean()), abs=1e-4)
    assert (found["clips"], found["steps"], found["of"]) == (4, 2, "validation")
    assert found["frechet"] > 0
    assert 0 < found["ssim"] < 1
    assert found == json.loads((trained / "reconstruction.json").read_text())
    with Image.open(trained / "reconstruction.png") as image:
        assert image.size == (6 * 32 * 4, 4 * 32 * 4)


def test_other_clips_may_be_given(trained: Path, tiny_clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(trained), "--data", str(tiny_clips), "--clips", "6"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["clips"], found["of"]) == (6, str(tiny_clips))
    assert "frechet" not in found


@pytest.mark.parametrize(
    ("task", "arguments", "message"),
    [
        ("vae", ["--seed", "3"], "--seed=3 has no effect on a VAE"),
        ("dit", ["--features", "x"], "--features has no effect on a run that draws videos"),
        ("vae", [], "holds no trained VAE yet"),
    ],
)
def test_what_has_no_effect_is_refused(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str, arguments: list[str],
    message: str,
) -> None:  # fmt: skip
    (tmp_path / "config.json").write_text(configure(tmp_path, train={"task": task}).to_json())
    assert main(["evaluate", str(tmp_path), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_picture_of_pairs() -> None:
    clips = torch.linspace(-1, 1, 5).view(1, 1, 5, 1, 1).expand(2, 3, 5, 64, 64)
    with Image.open(io.BytesIO(picture(clips, -clips))) as image:
        assert image.size == (6 * 128, 2 * 128)
        row = [image.getpixel((64 + 128 * i, 64))[0] for i in range(6)]
    assert row == [0, 128, 255, 255, 128, 0]
