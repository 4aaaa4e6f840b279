"""Our denoiser and the real classes of diffusers are one function of the same weights, and the weights come back."""

from __future__ import annotations

from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from torch import Tensor, nn

from vidit.export.diffusers import from_diffusers, to_diffusers
from vidit.export.diffusers.convert import family_of
from vidit.model.attention import EVERY_FRAME
from vidit.model.dit import DiT
from vidit.model.windows import Grid

ROWS, TEXT = 2, 10
WAN = {"in_channels": 4, "out_channels": 4, "text_dim": TEXT}


class Case(NamedTuple):
    """A class, its geometry, the latent's (T, H, W), text tokens."""

    cls: str
    geometry: dict[str, Any]
    latent: tuple[int, int, int]
    tokens: int = 7


def wan(layers: int, heads: int, dim: int, latent: tuple[int, int, int], **more: Any) -> Case:
    sizes = {"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": dim, "ffn_dim": 5 * dim}
    return Case("WanTransformer3DModel", {**WAN, **sizes, **more}, latent)


CASES = {
    "wan": wan(2, 2, 12, (3, 6, 10)),
    "wan, odd grid": wan(3, 3, 16, (5, 10, 6)),
    "wan, head dim no multiple of 6": wan(2, 4, 20, (1, 14, 2)),
    "wan, no norm before text": wan(1, 1, 24, (2, 4, 4), cross_attn_norm=False),
}  # fmt: skip


def theirs(case: Case, seed: int = 0) -> nn.Module:
    """Random weights, nothing left at the ones and zeros that a class begins with."""
    torch.manual_seed(seed)
    module: nn.Module = getattr(diffusers, case.cls)(**case.geometry)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(
                torch.randn_like(p) / max(4, p[0].numel()) ** 0.5 + (1.0 if "norm" in name and "weight" in name else 0)
            )
    return module.eval()


class Inputs(NamedTuple):
    x_BCTHW: Tensor
    time_B: Tensor
    text_BLE: Tensor


def inputs(case: Case) -> Inputs:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, 4, *case.latent, generator=g)
    return Inputs(x, torch.tensor([3.0, 871.0]), torch.randn(ROWS, case.tokens, TEXT, generator=g))


def call_theirs(module: nn.Module, given: Inputs) -> Tensor:
    out: Tensor = module(given.x_BCTHW, timestep=given.time_B, encoder_hidden_states=given.text_BLE, return_dict=False)[
        0
    ]
    return out


def call_ours(dit: DiT, given: Inputs) -> Tensor:
    frames, height, width = given.x_BCTHW.shape[2:]
    grid = Grid(frames, height // dit.config.patch, width // dit.config.patch)
    seen = torch.full(given.text_BLE.shape[:2], EVERY_FRAME)
    out: Tensor = dit(given.x_BCTHW, grid, given.time_B, given.text_BLE, seen)
    return out


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


def test_outputs_and_gradients(case: Case) -> None:
    module, given = theirs(case), inputs(case)
    dit = from_diffusers(module)
    expected, out = call_theirs(module, given), call_ours(dit, given)
    assert 0.1 < float(expected.std()) < 10
    assert float((out - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (expected * weight).sum().backward()
    (out * weight).sum().backward()
    grads = {name: p.grad for name, p in module.named_parameters()}
    floor = 1e-6 * max(float(g.norm()) for g in grads.values() if g is not None)
    family, met = family_of(dit.config), set()
    for name, p in dit.named_parameters():
        place = family.place(name)
        assert p.grad is not None, name
        for key, ours in zip(place.names, place.form.theirs(p.grad, dit.config), strict=True):
            grad = grads[key]
            assert grad is not None, key
            assert float((ours - grad).norm()) <= 1e-4 * max(float(grad.norm()), floor), key
            met.add(key)
    assert met == grads.keys()


def test_weights_come_back_bit_for_bit(case: Case) -> None:
    module = theirs(case)
    dit = from_diffusers(module)
    back = to_diffusers(dit)
    assert type(back) is type(module)
    assert back.state_dict().keys() == module.state_dict().keys()
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in module.state_dict().items())
    wanted = {**module.config}
    assert {
        key: value for key, value in back.config.items() if key[0] != "_" and _plain(value) != _plain(wanted[key])
    } == {}
    again = from_diffusers(back)
    assert again.config == dit.config
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in dit.state_dict().items())


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def test_a_folder_is_read_as_the_module_is(case: Case, tmp_path: Any) -> None:
    module = theirs(case)
    module.save_pretrained(tmp_path, max_shard_size="20KB")  # type: ignore[operator]
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    one, other = from_diffusers(module), from_diffusers(tmp_path)
    assert one.config == other.config
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())
