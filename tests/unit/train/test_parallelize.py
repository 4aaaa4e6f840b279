"""Activation checkpointing and compilation change how a step is computed: never a name, a weight or a loss."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.text_models import save_text_models
from vidit.config import RunConfig
from vidit.model.windows import Grid
from vidit.text.encoder import build_text_encoder
from vidit.train.parallelize import build_dit, build_vae
from vidit.train.recompute import KEPT
from vidit.vae.stored import adopt_vae

Configure = Callable[..., RunConfig]
CPU, FP32 = torch.device("cpu"), torch.float32


def built(config: RunConfig) -> nn.ModuleDict:
    if config.train.task == "vae":
        return build_vae(config, CPU, FP32)
    return build_dit(adopt_vae(config), build_text_encoder(config.text), CPU, FP32)


def loss_and_gradients(model: nn.ModuleDict) -> tuple[Tensor, dict[str, Tensor]]:
    """Of inputs that are always the same, with every gate open."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    if "vae" in model:
        loss = model["vae"].encode(torch.randn(1, 3, 5, 16, 16, generator=generator)).mean.square().mean()
    else:
        x, text = torch.randn(2, 4, 3, 8, 8, generator=generator), torch.randn(2, 5, 32, generator=generator)
        frame = torch.full((2, 5), -1)
        out = model["dit"](x, Grid(3, 4, 4), torch.tensor([100.0, 700.0]), text, frame, text.mean(1))
        loss = out.square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_a_pooled_caption_of_another_width_of_a_second_encoder(configure: Configure, tmp_path: Path) -> None:
    """As wide as the first one's; the message names whose it is."""
    texts = save_text_models(tmp_path)
    tree = configure(model={"pooled_width": 7}).model_dump(exclude_unset=True, exclude={"text"})
    second = {"kind": "clip", "path": str(texts["clip"]), "max_tokens": 9}
    text = {"kind": "t5", "path": str(texts["t5"]), "second": second}
    with pytest.raises(
        ValueError, match=r"pooled_width=7, but text\.second\.kind=clip gives pooled captions of 16; use"
    ):
        built(RunConfig.model_validate({**tree, "text": text}))


def test_a_pooled_caption_of_another_width(configure: Configure) -> None:
    model = {"pooled_text": True, "pooled_width": 7}
    with pytest.raises(
        ValueError, match=r"model\.pooled_width=7, but text\.kind=bytes gives pooled captions of 32; use"
    ):
        built(configure(model=model))


@pytest.mark.parametrize("kept", ["full", "selective"])
@pytest.mark.parametrize("task", ["dit", "vae"])
def test_activation_checkpointing_changes_no_bit(configure: Configure, task: str, kept: str) -> None:
    plain, recomputing = (
        built(configure(train={"task": task, "activation_checkpointing": on})) for on in ("none", kept)
    )
    one, other = plain.state_dict(), recomputing.state_dict()
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [type(m) for m in plain.modules()] == [type(m) for m in recomputing.modules()]
    held = [_kept(model) for model in (plain, recomputing)]
    assert held[1] < (0.7 if kept == "full" else 0.9) * held[0], "activations are dropped"
    (loss, gradients), (again, recomputed) = loss_and_gradients(plain), loss_and_gradients(recomputing)
    assert torch.equal(loss, again)
    assert gradients.keys() == recomputed.keys()
    assert all(torch.equal(gradients[name], recomputed[name]) for name in gradients)


def _kept(model: nn.ModuleDict) -> int:
    """Numbers that autograd keeps for the backward pass."""
    counted = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal counted
        counted += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_and_gradients(model)
    model.zero_grad(set_to_none=True)
    return counted


def test_flash_on_a_cpu_is_refused(configure: Configure) -> None:
    config = configure(model={"relative_position": "rope", "cross_keys": "text", "attention_backend": "flash"})
    with pytest.raises(RuntimeError, match=r"attention_backend=flash needs flash-attn.* device is cpu.*=sdpa"):
        built(config)


def test_attention_to_clips_of_several_lengths_is_kept() -> None:
    """The operator of the kernel that packed rows take on CUDA."""
    importlib.import_module("torch.nn.attention.varlen")
    assert str(torch.ops.torch_attn._varlen_attn.default.overloadpacket) in KEPT
