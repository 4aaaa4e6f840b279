"""How different two pictures look: the distance of a network's features, channel by channel of unit length.

`Lpips` is the metric of 1801.03924 (equation 1) on VGG16 (1409.1556): weights come from files, as torchvision and the
authors publish them, or as safetensors under the same names. `SceneFeatures` is a small network of this project for
where those are not at hand: it learned to name colours and shapes of procedural scenes (`benchmarks/features.py`).

Videos are judged frame by frame. Nothing is downloaded, and nothing unpickled but tensors.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

EPS = 1e-10

# VGG16's convolutions by their numbers in torchvision's `features`, in five stages; each but the first pools first.
VGG_STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
VGG_WIDTHS = (64, 128, 256, 512, 512)
# Of ImageNet's pixels in [-1, 1], as LPIPS has them.
MEAN = (-0.030, -0.088, -0.188)
STD = (0.458, 0.448, 0.450)
SCENE_WIDTHS = (16, 32, 64, 64)


class FeatureDistance(nn.Module):
    """A network in stages; `weights` are those of each stage's channels, in the sum over channels."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def stages(self, x_NCHW: Tensor) -> list[Tensor]:
        """Features of pictures (N, 3, H, W) in [-1, 1], finest first."""
        raise NotImplementedError

    def weights(self) -> list[Tensor]:
        """(1, C, 1, 1) for each stage."""
        raise NotImplementedError

    def forward(self, a_BCTHW: Tensor, b_BCTHW: Tensor) -> Tensor:
        """(B,): the distance of two videos in [-1, 1], in the mean over their frames."""
        frames = a_BCTHW.shape[2]
        a, b = (x.transpose(1, 2).flatten(0, 1) for x in (a_BCTHW, b_BCTHW))
        total = a.new_zeros(len(a))
        for one, other, weight in zip(self.stages(a), self.stages(b), self.weights(), strict=True):
            total = total + ((_unit(one) - _unit(other)).square() * weight).sum(1).mean((1, 2))
        return total.unflatten(0, (-1, frames)).mean(1)

    def scaled(self, x_NCHW: Tensor) -> Tensor:
        """Pictures as the network takes them."""
        return (x_NCHW - self.mean.to(x_NCHW)) / self.std.to(x_NCHW)


class Lpips(FeatureDistance):
    """LPIPS of VGG16. Pictures have at least 16 pixels a side."""

    def __init__(self) -> None:
        super().__init__(MEAN, STD)
        self.features = nn.ModuleDict()
        channels = 3
        for numbers, width in zip(VGG_STAGES, VGG_WIDTHS, strict=True):
            for number in numbers:
                self.features[str(number)] = nn.Conv2d(channels, width, 3, padding=1)
                channels = width
        self.lin = nn.ParameterList([nn.Parameter(torch.empty(1, width, 1, 1)) for width in VGG_WIDTHS])

    def stages(self, x_NCHW: Tensor) -> list[Tensor]:
        found, h = [], self.scaled(x_NCHW)
        for stage, numbers in enumerate(VGG_STAGES):
            if stage:
                h = F.max_pool2d(h, 2)
            for number in numbers:
                h = F.relu(self.features[str(number)](h))
            found.append(h)
        return found

    def weights(self) -> list[Tensor]:
        return list(self.lin)

    @staticmethod
    def own_name(name: str) -> str | None:
        """The name here of a tensor in a file of torchvision, of `lpips`, or of its whole model; None of no use."""
        if match := re.fullmatch(r"(?:net\.slice\d|features)\.(\d+)\.(weight|bias)", name):
            return f"features.{match[1]}.{match[2]}"
        if match := re.fullmatch(r"lin(\d)\.model\.1\.weight", name):
            return f"lin.{match[1]}"
        return None


class SceneFeatures(FeatureDistance):
    """Four convolutions of stride 2. `video_features` is what a Frechet distance is taken over."""

    def __init__(self) -> None:
        super().__init__((0.0,) * 3, (0.5,) * 3)
        widths = (3, *SCENE_WIDTHS)
        self.features = nn.ModuleList([nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths)])

    def stages(self, x_NCHW: Tensor) -> list[Tensor]:
        found, h = [], self.scaled(x_NCHW)
        for layer in self.features:
            h = F.relu(layer(h))
            found.append(h)
        return found

    def weights(self) -> list[Tensor]:
        return [self.mean.new_full((1, width, 1, 1), 1 / len(SCENE_WIDTHS)) for width in SCENE_WIDTHS]

    @torch.no_grad()
    def video_features(self, x_BCTHW: Tensor) -> Tensor:
        """(B, 2 x 64): what the frames of a video show, and how much of that changes from frame to frame."""
        frames = x_BCTHW.shape[2]
        last = self.stages(x_BCTHW.transpose(1, 2).flatten(0, 1))[-1].mean((2, 3)).unflatten(0, (-1, frames))
        change = last.diff(dim=1).abs().mean(1) if frames > 1 else torch.zeros_like(last[:, 0])
        return torch.cat((last.mean(1), change), dim=1)

    @staticmethod
    def own_name(name: str) -> str | None:
        """The name here of a tensor in a file."""
        return name if name.startswith("features.") else None


def load_perceptual(kind: Literal["lpips", "features"], files: Sequence[str | Path]) -> FeatureDistance:
    """A frozen network. ValueError where files cannot be read, or together do not hold its weights."""
    made = Lpips() if kind == "lpips" else SceneFeatures()
    found: dict[str, Tensor] = {}
    for file in files:
        named = ((made.own_name(name), tensor) for name, tensor in _tensors(Path(file)).items())
        found |= {name: tensor.float() for name, tensor in named if name is not None}
    expected = made.state_dict()
    wrong = [name for name, tensor in expected.items() if name not in found or found[name].shape != tensor.shape]
    if wrong:
        raise ValueError(
            f"{', '.join(map(str, files))} do not hold the weights of {kind}: {len(wrong)} of {len(expected)} tensors "
            f"are missing or of another shape, {wrong[0]} first; give "
            + ("VGG16's (features.0.weight, ...) and LPIPS's (lin0.model.1.weight, ...)" if kind == "lpips" else
               "the file that `python -m benchmarks.features` writes")
        )  # fmt: skip
    made.load_state_dict({name: found[name] for name in expected})
    return made.eval().requires_grad_(False)


def _tensors(path: Path) -> dict[str, Tensor]:
    """Of a safetensors file, or of one that torch has saved."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError) as error:
        raise ValueError(f"cannot read weights from {path}: {error}") from error
    except Exception as error:  # pickle's own errors have no common base
        raise ValueError(
            f"{path} is no file of tensors: {error}; give safetensors, or weights that torch saved"
        ) from error
    if not isinstance(saved, dict):
        raise ValueError(f"{path} holds a {type(saved).__name__}; give a file with a dict of tensors")
    return {name: tensor for name, tensor in saved.items() if isinstance(tensor, Tensor)}


def _unit(x_NCHW: Tensor) -> Tensor:
    """Features of unit length at each place."""
    return x_NCHW / (x_NCHW.square().sum(1, keepdim=True).sqrt() + EPS)
