"""LPIPS as its paper writes it, on weights as they are published; the project's own features; files that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from vidit.vae.perceptual import MEAN, STD, VGG_STAGES, VGG_WIDTHS, load_perceptual


def vgg(scale: float = 1.0) -> dict[str, Tensor]:
    """VGG16's convolutions under torchvision's names, at random, with what else its file holds."""
    generator, tensors, channels = torch.Generator().manual_seed(1), {}, 3
    for numbers, width in zip(VGG_STAGES, VGG_WIDTHS, strict=True):
        for number in numbers:
            tensors[f"features.{number}.weight"] = scale * torch.randn(
                (width, channels, 3, 3), generator=generator
            ) * (2 / (9 * channels)) ** 0.5  # fmt: skip
            tensors[f"features.{number}.bias"] = 0.1 * torch.randn(width, generator=generator)
            channels = width
    return tensors | {"classifier.0.weight": torch.zeros(4, 4)}


def lin() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = [(1, width, 1, 1) for width in VGG_WIDTHS]
    return {f"lin{i}.model.1.weight": torch.rand(shape, generator=generator) for i, shape in enumerate(shapes)}


def videos(rows: int = 2, frames: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    one, other = (torch.rand((rows, 3, frames, 32, 48), generator=generator) * 2 - 1 for _ in range(2))
    return one, other


def written_out(a: Tensor, b: Tensor, tensors: dict[str, Tensor]) -> float:
    """Equation 1 of 1801.03924 for two pictures (3, H, W), layer by layer of VGG16 as torchvision numbers them."""
    kinds = ["c", "r", "c", "r", "m", "c", "r", "c", "r", "m", *"crcrcrm", *"crcrcrm", *"crcrcrm"]
    tapped = {3: 0, 8: 1, 15: 2, 22: 3, 29: 4}
    total, pictures = 0.0, []
    for picture in (a, b):
        h = (picture - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        features = {}
        for number, kind in enumerate(kinds):
            if kind == "c":
                h = F.conv2d(h, tensors[f"features.{number}.weight"], tensors[f"features.{number}.bias"], padding=1)
            h = h.relu() if kind == "r" else F.max_pool2d(h[None], 2)[0] if kind == "m" else h
            if number in tapped:
                features[tapped[number]] = h / h.norm(dim=0, keepdim=True)
        pictures.append(features)
    for layer in range(5):
        weight = tensors[f"lin{layer}.model.1.weight"][0]
        total += float((weight * (pictures[0][layer] - pictures[1][layer]).square()).sum(0).mean())
    return total


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_lpips_is_its_equation(tmp_path: Path, suffix: str) -> None:
    files = [tmp_path / f"vgg{suffix}", tmp_path / f"lpips{suffix}"]
    for file, tensors in zip(files, (vgg(), lin()), strict=True):
        save_file(tensors, file) if suffix == ".safetensors" else torch.save(tensors, file)
    lpips = load_perceptual("lpips", files)
    a, b = videos()
    found = lpips(a, b)
    for row in range(2):
        frames = [written_out(a[row, :, t], b[row, :, t], vgg() | lin()) for t in range(2)]
        assert float(found[row]) == pytest.approx(sum(frames) / 2, rel=1e-4)
    assert lpips(a, a).tolist() == [0, 0]
    x = a.clone().requires_grad_()
    lpips(x, b).sum().backward()
    assert bool(x.grad.any())
    assert not any(p.requires_grad for p in lpips.parameters())


def test_the_whole_model_of_lpips_is_one_file(tmp_path: Path) -> None:
    def sliced(name: str) -> str:
        number = int(name.split(".")[1])
        stage = 1 + sum(number > numbers[-1] for numbers in VGG_STAGES)
        return name.replace("features.", f"net.slice{stage}.")

    whole = {sliced(n): t for n, t in vgg().items() if n.startswith("features")} | lin()
    save_file(whole, tmp_path / "whole.safetensors")
    save_file(vgg() | lin(), tmp_path / "plain.safetensors")
    one, other = (load_perceptual("lpips", [tmp_path / f"{n}.safetensors"]) for n in ("whole", "plain"))
    a, b = videos()
    assert torch.equal(one(a, b), other(a, b))


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    save_file(vgg(), tmp_path / "vgg.safetensors")
    with pytest.raises(ValueError, match=r"5 of 31 tensors are missing or of another shape, lin\.0 first"):
        load_perceptual("lpips", [tmp_path / "vgg.safetensors"])
    with pytest.raises(ValueError, match="cannot read weights from"):
        load_perceptual("features", [tmp_path / "none.safetensors"])
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "vgg.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot read weights from"):
        load_perceptual("features", [tmp_path / "cut.safetensors"])


class Harm:
    """What a pickle may bring along."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("this must not run",)


def test_nothing_but_tensors_is_unpickled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"features.0.weight": Harm()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="is no file of tensors"):
        load_perceptual("lpips", [tmp_path / "bad.pth"])
    assert capsys.readouterr().out == ""
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list"):
        load_perceptual("lpips", [tmp_path / "list.pth"])
