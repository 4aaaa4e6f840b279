"""On a CUDA device: the numbers of the CPU, flash-attn's within bf16, and a resume that is bit-equal."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vidit.config import Model, RunConfig
from vidit.model.attention import attend, flash_available
from vidit.model.dit import DiT, text_frames
from vidit.model.init import initialise
from vidit.model.windows import Grid
from vidit.train.run import run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

GRID = (3, 5, 6)


def denoise(device: str, dtype: torch.dtype, backend: str = "auto") -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Output and gradients of a small denoiser, fp32 on the CPU."""
    c = Model(
        num_layers=4, width=64, num_heads=4, mlp_width=128, windows=((1, 0, 0), (0, 0, 0)), relative_position="rope",
        cross_keys="text", self_conditioning=0.0, attention_backend=backend,
    )  # fmt: skip
    model = DiT(c, 4, GRID, 16)
    initialise(model, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # what starts at zero would hide the blocks
        for p in model.parameters():
            p += 0.02 * torch.randn(p.shape, generator=generator)
    model.dtype = dtype
    model.to(device)
    x, text = torch.randn(2, 4, *GRID, generator=generator), torch.randn(2, 7, 16, generator=generator)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 4:] = False
    time_B = torch.tensor([100.0, 700.0])
    grid = Grid(*GRID)
    out = model(x.to(device), grid, time_B.to(device), text.to(device), text_frames(mask).to(device))
    out.square().mean().backward()
    return out.detach().cpu(), {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
def test_device_agrees_with_cpu(dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    expected, expected_gradients = denoise("cpu", torch.float32)
    out, gradients = denoise("cuda", dtype)
    assert (out - expected).norm() <= bound * expected.norm()
    floor = 1e-3 * max(g.norm() for g in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).norm() <= 3 * bound * gradient.norm().clamp(min=floor), name


@pytest.mark.skipif(not flash_available(), reason="needs flash-attn")
def test_flash_agrees_with_sdpa() -> None:
    q, k, v = (torch.randn(2, 77, 4, 32, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    exact = attend(q.float(), k.float(), v.float(), None, "sdpa")
    flash = attend(q, k, v, None, "flash").float()
    sdpa = attend(q, k, v, None, "sdpa").float()
    assert (flash - exact).norm() <= 1.5 * (sdpa - exact).norm()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_is_bit_equal(precision: str, configure: Callable[..., RunConfig], tmp_path: Path) -> None:
    train = {"device": "cuda", "precision": precision, "steps": 6, "checkpoint_every": 3}
    whole = configure(tmp_path / "whole", train=train, sample={"prompts": ()})
    assert run(whole)
    parted = configure(tmp_path / "parted", train={**train, "steps": 3}, sample={"prompts": ()})
    assert run(parted)
    assert run(configure(tmp_path / "parted", train=train, sample={"prompts": ()}))

    def losses(config: RunConfig) -> list[tuple[int, float, float]]:
        rows = map(json.loads, (config.directory / "metrics.jsonl").read_text().splitlines())
        return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]

    assert losses(whole) == losses(parted)
