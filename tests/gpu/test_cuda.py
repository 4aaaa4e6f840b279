"""On a CUDA device: the numbers of the CPU, flash-attn's within bf16, whole runs, and a resume that is bit-equal."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vidit.config import Model, RunConfig, Vae
from vidit.model.core import WindowCore, attend, flash_installed, takes_lengths
from vidit.model.dit import DiT, text_frames
from vidit.model.init import initialise
from vidit.model.packed import packed
from vidit.model.windows import Grid
from vidit.train.metrics import read_metrics
from vidit.train.peak import peak_flops
from vidit.train.precision import deterministic
from vidit.train.run import run
from vidit.vae.autoencoder import CausalVae

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

GRID = (3, 5, 6)
TINY_VAE = {
    "latent_channels": 4, "patch": 2, "base_channels": 8, "multipliers": (1, 2), "num_res_blocks": (1, 1),
    "decoder_res_blocks": (1, 1), "spatial_down": (True,), "temporal_down": (True,),
}  # fmt: skip


def denoise(device: str, dtype: torch.dtype, backend: str = "sdpa") -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
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
def test_device_agrees_with_cpu(dtype: torch.dtype, bound: float, whole_fp32: None) -> None:
    expected, expected_gradients = denoise("cpu", torch.float32)
    out, gradients = denoise("cuda", dtype)
    assert (out - expected).norm() <= bound * expected.norm()
    floor = 1e-3 * max(g.norm() for g in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).norm() <= 3 * bound * gradient.norm().clamp(min=floor), name


@pytest.mark.parametrize(
    "backend",
    ["sdpa", pytest.param("flash", marks=pytest.mark.skipif(not flash_installed(), reason="needs flash-attn"))],
)
def test_one_call_for_a_packed_row_agrees_with_calls_clip_by_clip(backend: str) -> None:
    grid = packed(((3, 5, 3), (1, 4, 6), (1, 4, 6), (2, 4, 4)))
    q, k, v = (torch.randn(1, grid.num_tokens, 4, 64, device="cuda", requires_grad=True) for _ in range(3))
    exact = WindowCore((0, 0, 0), "sdpa")(q, k, v, grid)
    wanted = torch.autograd.grad(exact.sin().sum(), (q, k, v))
    half = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    assert takes_lengths(half[0], backend)
    out = WindowCore((0, 0, 0), backend)(*half, grid)
    found = torch.autograd.grad(out.float().sin().sum(), half)
    for one, other in zip((out, *found), (exact, *wanted), strict=True):
        assert (one.float() - other).norm() <= 0.02 * other.norm()


@pytest.mark.parametrize(
    "backend",
    ["sdpa", pytest.param("flash", marks=pytest.mark.skipif(not flash_installed(), reason="needs flash-attn"))],
)
@pytest.mark.parametrize("clips", [1, 3])
def test_gradients_of_long_sequences_are_the_same_every_time(clips: int, backend: str) -> None:
    grid = packed(((4, 16, 32),) * (clips - 1) + ((5, 32, 32),)) if clips > 1 else Grid(5, 32, 32)
    inputs = [
        torch.randn(1, grid.num_tokens, 8, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    ]
    with deterministic(True):
        outs = [WindowCore((0, 0, 0), backend)(*inputs, grid) for _ in range(4)]
        found = [torch.autograd.grad(out.float().sin().sum(), inputs) for out in outs]
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.skipif(not flash_installed(), reason="needs flash-attn")
def test_flash_agrees_with_sdpa() -> None:
    q, k, v = (torch.randn(2, 77, 4, 32, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    exact = attend(q.float(), k.float(), v.float(), None, "sdpa")
    flash = attend(q, k, v, None, "flash").float()
    sdpa = attend(q, k, v, None, "sdpa").float()
    assert (flash - exact).norm() <= 1.5 * (sdpa - exact).norm()


def test_vae_agrees_with_cpu(whole_fp32: None) -> None:
    vae = CausalVae(Vae(**TINY_VAE))
    initialise(vae, 0)
    x = torch.randn(2, 3, 5, 16, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z = vae.encode(x).mean
        expected = (z, vae.decode(z))
        vae.to("cuda")
        found = (vae.encode(x.cuda()).mean, vae.decode(z.cuda()))
    for one, other in zip(found, expected, strict=True):
        assert (one.cpu() - other).norm() <= 1e-5 * other.norm()


def test_peak_is_that_of_the_matrix_units() -> None:
    cuda = torch.device("cuda")
    assert peak_flops(cuda, torch.bfloat16) > 2 * peak_flops(cuda, torch.float32)


def test_run_to_the_end(configure: Callable[..., RunConfig], tmp_path: Path) -> None:
    """With cached latents, validation, recomputation and samples."""
    train = {"device": "cuda", "steps": 4, "activation_checkpointing": "selective"}
    config = configure(tmp_path / "run", train=train, data={"cache_latents": True})
    assert run(config)
    rows = read_metrics(config.directory)
    assert any("validation" in row for row in rows)
    assert list((config.directory / "samples").rglob("*.mp4"))


@pytest.mark.parametrize("task", ["dit", "vae"])
def test_compiled_losses_are_those_of_the_eager_run(
    task: str, configure: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """One kind of block and one shape: compilation takes most of the time."""
    model = {"model": {"num_layers": 1, "windows": ((1, 0, 0),)}, "sample": {"prompts": ()}} if task == "dit" else {}
    losses = []
    for on in (False, True):
        train = {
            "task": task,
            "device": "cuda",
            "steps": 4,
            "compile": on,
            "activation_checkpointing": "full" if on else "none",
        }
        config = configure(tmp_path / str(on), train=train, data={"num_validation": 0}, **model)
        assert run(config)
        losses.append([row["loss"] for row in read_metrics(config.directory) if "loss" in row])
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


BUCKETS = tuple({"num_frames": t, "height": 32, "width": w} for t, w in ((1, 32), (5, 32), (5, 64)))
RUNS: dict[str, dict[str, Any]] = {
    "fp32": {"train": {"precision": "fp32"}},
    "bf16": {"train": {"precision": "bf16"}},
    "muon": {"train": {"precision": "bf16", "optimizer": "muon"}},
    "packed rows": {
        "model": {
            "windows": ((0, 0, 0),), "relative_position": "rope", "image_attention": "frame", "cross_attention": "all"
        },
        "data": {"buckets": BUCKETS, "packed_tokens": 160, "num_validation": 0},
        "train": {"precision": "bf16", "micro_batch": 1, "global_batch": 3},
    },
    "a vae and its discriminator": {
        "vae_train": {
            "adversarial_weight": 0.5, "adversarial_start": 1, "discriminator_channels": 8, "discriminator_layers": 2,
            "r1_weight": 0.1, "wavelet_weight": 0.1,
        },
        "train": {"task": "vae", "precision": "fp32"},
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", RUNS)
def test_resume_is_bit_equal(
    kind: str, configure: Callable[..., RunConfig], mixed_clips: Callable[..., Path], tmp_path: Path
) -> None:
    def build(folder: str, steps: int) -> RunConfig:
        sections = {name: dict(fields) for name, fields in RUNS[kind].items()}
        sections["train"] |= {"device": "cuda", "steps": steps, "checkpoint_every": 3, "deterministic": True}
        if kind == "packed rows":
            sections["data"]["train"] = str(mixed_clips([(b["num_frames"], b["height"], b["width"]) for b in BUCKETS]))
        if "vae_train" not in sections:
            sections["sample"] = {"prompts": ()}
        return configure(tmp_path / folder, **sections)

    whole = build("whole", 6)
    assert run(whole)
    assert run(build("parted", 3))
    parted = build("parted", 6)
    assert run(parted)

    def losses(config: RunConfig) -> list[tuple[int, float, float]]:
        rows = map(json.loads, (config.directory / "metrics.jsonl").read_text().splitlines())
        return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]

    assert len(losses(whole)) == 6
    assert losses(whole) == losses(parted)
