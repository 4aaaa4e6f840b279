"""Our denoiser and the real classes of diffusers are one function of the same weights, and the weights come back."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vidit.cli import main
from vidit.config import Model, RunConfig
from vidit.export.diffusers import from_diffusers, to_diffusers
from vidit.export.diffusers.convert import exported, family_of, imported
from vidit.export.diffusers.family import Geometry
from vidit.export.diffusers.store import import_diffusers
from vidit.model.dit import DiT, text_frames
from vidit.model.flops import parameter_count
from vidit.model.windows import Grid
from vidit.sample.run import sample_run
from vidit.train.run import run
from vidit.train.weights_folder import Weights

diffusers: Any = pytest.importorskip("diffusers")

get_3d_rotary_pos_embed: Any = pytest.importorskip("diffusers.models.embeddings").get_3d_rotary_pos_embed

ROWS, TEXT = 2, 10
UNKNOWN = ("sample_frames", "sample_height", "sample_width")
WAN = {"in_channels": 4, "out_channels": 4, "text_dim": TEXT}


HUNYUAN = "HunyuanVideoTransformer3DModel"
POOLED = 6


class Case(NamedTuple):
    """A class, its geometry, the latent's (T, H, W), text tokens."""

    cls: str
    geometry: dict[str, Any]
    latent: tuple[int, int, int]
    tokens: int = 7


def wan(layers: int, heads: int, dim: int, latent: tuple[int, int, int], **more: Any) -> Case:
    sizes = {"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": dim, "ffn_dim": 5 * dim}
    return Case("WanTransformer3DModel", {**WAN, **sizes, **more}, latent)


def cog(layers: int, heads: int, dim: int, latent: tuple[int, int, int], rope: bool = True, **more: Any) -> Case:
    sizes = {
        "num_layers": layers, "num_attention_heads": heads, "attention_head_dim": dim, "time_embed_dim": 24,
        "max_text_seq_length": 7, "sample_frames": 9, "sample_height": 8, "sample_width": 8,
        "use_rotary_positional_embeddings": rope, "in_channels": 4, "out_channels": 4, "text_embed_dim": TEXT,
    }  # fmt: skip
    return Case("CogVideoXTransformer3DModel", {**sizes, **more}, latent)


def latte(layers: int, heads: int, dim: int, latent: tuple[int, int, int], **more: Any) -> Case:
    sizes = {
        "num_layers": layers, "num_attention_heads": heads, "attention_head_dim": dim, "in_channels": 4,
        "out_channels": 4, "cross_attention_dim": heads * dim, "sample_size": 8, "patch_size": 2,
        "activation_fn": "gelu-approximate", "attention_bias": True, "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False, "norm_eps": 1e-6, "caption_channels": TEXT, "video_length": latent[0],
    }  # fmt: skip
    return Case("LatteTransformer3DModel", {**sizes, **more}, latent)


def hunyuan(layers: int, single: int, heads: int, dim: int, latent: tuple[int, int, int], **more: Any) -> Case:
    space = dim // 2 * 7 // 16 * 2
    sizes = {
        "num_layers": layers, "num_single_layers": single, "num_attention_heads": heads, "attention_head_dim": dim,
        "num_refiner_layers": 2, "in_channels": 4, "out_channels": 4, "text_embed_dim": TEXT,
        "pooled_projection_dim": POOLED, "rope_axes_dim": (dim - 2 * space, space, space), "guidance_embeds": True,
    }  # fmt: skip
    return Case(HUNYUAN, {**sizes, **more}, latent)


CASES = {
    "wan": wan(2, 2, 12, (3, 6, 10)),
    "wan, odd grid": wan(3, 3, 16, (5, 10, 6)),
    "wan, head dim no multiple of 6": wan(2, 4, 20, (1, 14, 2)),
    "wan, no norm before text": wan(1, 1, 24, (2, 4, 4), cross_attn_norm=False),
    "cogvideox": cog(2, 2, 16, (3, 8, 8)),
    "cogvideox, odd grid": cog(3, 3, 32, (5, 10, 6)),
    "cogvideox, sinusoids": cog(2, 2, 16, (3, 8, 8), rope=False),
    "cogvideox, sinusoids, odd grid": cog(2, 1, 48, (5, 6, 10), rope=False, spatial_interpolation_scale=1.5),
    "wan, frames in a patch": wan(1, 2, 12, (4, 6, 6), patch_size=(2, 2, 1)),
    "cogvideox 1.5": cog(2, 2, 16, (6, 10, 6), patch_size_t=2),
    "hunyuanvideo": hunyuan(2, 3, 2, 16, (3, 6, 10)),
    "hunyuanvideo, one of each, odd grid": hunyuan(1, 1, 3, 32, (5, 10, 6), num_refiner_layers=1, mlp_ratio=3.0),
    "hunyuanvideo, not distilled, frames in a patch": hunyuan(
        2, 1, 2, 16, (4, 4, 6), guidance_embeds=False, patch_size_t=2, rope_axes_dim=(4, 6, 6), rope_theta=100.0
    ),
    "hunyuanvideo, pooled as wide as text": hunyuan(1, 2, 2, 16, (3, 8, 8), pooled_projection_dim=TEXT),
    "latte": latte(2, 2, 16, (3, 8, 8)),
    "latte, odd grid": latte(1, 3, 16, (5, 6, 10)),
    "latte, one frame": latte(2, 2, 24, (1, 10, 6)),
    "latte, variance, scaled space": latte(1, 2, 16, (4, 12, 4), out_channels=8, sample_size=128),
}  # fmt: skip


def theirs(case: Case, seed: int = 0) -> nn.Module:
    """Random weights, nothing left at the ones and zeros that a class begins with."""
    torch.manual_seed(seed)
    module: nn.Module = getattr(diffusers, case.cls)(**case.geometry)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(
                torch.randn_like(p) / max(4, p[0].numel()) ** 0.5
                + float("norm" in name and "weight" in name and p.ndim == 1)
            )
    return module.eval()


class Inputs(NamedTuple):
    x_BCTHW: Tensor
    time_B: Tensor
    text_BLE: Tensor
    mask_BL: Tensor
    pooled_BE: Tensor


def inputs(case: Case) -> Inputs:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, 4, *case.latent, generator=g)
    width = case.geometry.get("pooled_projection_dim", POOLED)
    text, pooled = (torch.randn(ROWS, *shape, generator=g) for shape in ((case.tokens, TEXT), (width,)))
    mask = torch.ones(ROWS, case.tokens, dtype=torch.bool)
    if case.cls == HUNYUAN:  # the others of these know no padding
        mask[0, 4:] = False
    return Inputs(x, torch.tensor([3.0, 871.0]), text, mask, pooled)


def call_theirs(module: Any, given: Inputs) -> Tensor:
    x, more, c = given.x_BCTHW, {}, module.config
    frames_first = type(module).__name__ == "CogVideoXTransformer3DModel"
    if frames_first:
        x = x.transpose(1, 2)
        sizes = (x.shape[-2] // c.patch_size, x.shape[-1] // c.patch_size)
        if c.use_rotary_positional_embeddings:
            frames = x.shape[1] // (c.patch_size_t or 1)
            rotary = get_3d_rotary_pos_embed(c.attention_head_dim, ((0, 0), sizes), sizes, frames)
            more["image_rotary_emb"] = rotary
    if type(module).__name__ == HUNYUAN:
        more = {"encoder_attention_mask": given.mask_BL, "pooled_projections": given.pooled_BE}
        more |= {"guidance": torch.full((ROWS,), 6000.0)} if c.guidance_embeds else {}
    out: Tensor = module(x, timestep=given.time_B, encoder_hidden_states=given.text_BLE, return_dict=False, **more)[0]
    # Of twice the channels the second half are a variance.
    return out.transpose(1, 2) if frames_first else out[:, : given.x_BCTHW.shape[1]]


def call_ours(dit: DiT, given: Inputs) -> Tensor:
    frames, height, width = given.x_BCTHW.shape[2:]
    grid = Grid(*(n // p for n, p in zip((frames, height, width), dit.config.patch, strict=True)))
    out: Tensor = dit(given.x_BCTHW, grid, given.time_B, given.text_BLE, text_frames(given.mask_BL), given.pooled_BE)
    return out


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


def test_outputs_and_gradients(case: Case) -> None:
    module, given = theirs(case), inputs(case)
    dit = from_diffusers(module)
    expected, out = call_theirs(module, given), call_ours(dit, given)
    assert 0.1 < float(expected.detach().std()) < 10
    assert float((out - expected).detach().abs().max()) <= 1e-5 * float(expected.detach().abs().max())
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (expected * weight).sum().backward()
    (out * weight).sum().backward()
    grads = {name: p.grad for name, p in module.named_parameters()}
    floor = 1e-6 * max(float(g.norm()) for g in grads.values() if g is not None)
    own = {name: p.grad for name, p in dit.named_parameters() if p.grad is not None}
    assert own.keys() == dict(dit.named_parameters()).keys()
    shapes = {name: tuple(grad.shape) for name, grad in own.items()}
    geometry = Geometry(dit.config, dit.channels, dit.text_width)
    converted = exported(geometry, Weights(shapes, own.__getitem__))[1]
    assert converted.shapes.keys() == grads.keys()
    for key, grad in grads.items():
        assert grad is not None, key
        # Nothing but rounding: a shift of all keys alike, and queries of a softmax over one key.
        nothing, ours = float(grad.norm()) <= floor, converted.get(key)
        error = float(ours.norm()) if nothing else float((ours - grad).norm())
        assert error <= (floor if nothing else 1e-4 * float(grad.norm())), key


def test_weights_come_back_bit_for_bit(case: Case) -> None:
    module = theirs(case)
    dit = from_diffusers(module)
    back = to_diffusers(dit, case.latent, case.tokens)
    assert type(back) is type(module)
    assert back.state_dict().keys() == module.state_dict().keys()
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in module.state_dict().items())
    # No weight depends on these: what is written is the size that the model is used at.
    wanted = {**module.config, **{key: back.config[key] for key in back.config if key in UNKNOWN}}
    assert {
        key: value for key, value in back.config.items() if key[0] != "_" and _plain(value) != _plain(wanted[key])
    } == {}
    again = from_diffusers(back)
    assert again.config == dit.config
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in dit.state_dict().items())


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def test_a_folder_is_read_as_the_module_is(case: Case, tmp_path: Path) -> None:
    module = theirs(case)
    module.save_pretrained(tmp_path, max_shard_size="20KB")  # type: ignore[operator]
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    one, other = from_diffusers(module), from_diffusers(tmp_path)
    assert one.config == other.config
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another norm": ({"qk_norm": "rms_norm"}, "qk_norm='rms_norm' where only 'rms_norm_across_heads' is known"),
    "image to video": ({"in_channels": 9}, "9 channels in and 4 out"),
}


@pytest.mark.parametrize("changes", [w[0] for w in WRONG.values()], ids=WRONG)
def test_geometries_that_are_unknown_here(changes: dict[str, Any], tmp_path: Path) -> None:
    (message,) = [told for given, told in WRONG.values() if given is changes]
    module = theirs(CASES["wan"])
    module.save_pretrained(tmp_path)  # type: ignore[operator]
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=re.escape(message)):
        from_diffusers(tmp_path)


def test_missing_and_unknown_keys_are_named(tmp_path: Path) -> None:
    module = theirs(CASES["wan"])
    module.save_pretrained(tmp_path)  # type: ignore[operator]
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["blocks.9.norm7.weight"] = tensors.pop("blocks.1.attn2.to_k.bias")
    save_file(tensors, path)
    told = "1 missing: blocks.1.attn2.to_k.bias; 1 unknown: blocks.9.norm7.weight"
    with pytest.raises(ValueError, match=re.escape(told)):
        from_diffusers(tmp_path)
    tensors["blocks.1.attn2.to_k.bias"] = tensors.pop("blocks.9.norm7.weight")
    tensors["blocks.0.ffn.net.2.weight"] = torch.zeros(24, 7)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=re.escape("blocks.0.mlp.down.weight is (24, 60) by the config.json")):
        from_diffusers(tmp_path)


def test_other_weights_and_classes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(ValueError, match=r"holds no \.safetensors file"):
        from_diffusers(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"class UNet2DModel is not known here; use one of WanTransformer3DModel"):
        from_diffusers(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        from_diffusers(tmp_path / "nowhere")


def test_a_model_that_no_class_expresses() -> None:
    c = Model.preset("wan-1.3B", qk_norm="head", num_layers=1)
    with torch.device("meta"):
        dit = DiT(c, 4, (1, 1, 1), TEXT)
    with pytest.raises(ValueError, match=r"the nearest fails by model\.qk_norm=head where wan has width"):
        to_diffusers(dit)


def test_blocks_that_read_two_encoders_in_turn_have_no_class() -> None:
    c = Model.preset("wan-1.3B", cross_text="interleaved", num_layers=2)
    with torch.device("meta"):
        dit = DiT(c, 4, (1, 1, 1), TEXT, TEXT)
    with pytest.raises(ValueError, match=r"the nearest fails by model\.cross_text=interleaved where wan has first$"):
        to_diffusers(dit)


# What the published checkpoints have in their config.json beside the defaults of the class.
PUBLISHED: dict[str, dict[str, Any]] = {
    "wan-1.3B": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "wan-14B": {},
    "cogvideox-2B": {},
    "cogvideox-1.5-5B": {
        "num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True, "patch_size_t": 2
    },
    "latte-1": {
        "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "num_layers": 28, "cross_attention_dim": 1152,
        "attention_bias": True, "sample_size": 64, "patch_size": 2, "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_single", "norm_elementwise_affine": False, "norm_eps": 1e-6, "caption_channels": 4096,
    },
    "hunyuanvideo": {},
    "cogvideox-5B": {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
}  # fmt: skip


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_are_the_published_geometries(preset: str) -> None:
    with torch.device("meta"):
        module = getattr(diffusers, family_of(Model.preset(preset)).cls)(**PUBLISHED[preset])
    geometry, weights = imported(module)
    assert geometry.model == Model.preset(preset)
    parameters = sum(p.numel() for p in module.parameters())
    assert sum(math.prod(shape) for shape in weights.shapes.values()) == parameters
    assert parameter_count(geometry.model, (1, 1, 1), geometry.channels, geometry.text_width) == parameters


def test_open_sora_2_has_the_parameters_of_flux() -> None:
    """No class is its own, and its parts are FLUX's, of which it began: one to one, the layers of each kind too."""
    with torch.device("meta"):
        flux = diffusers.FluxTransformer2DModel(guidance_embeds=False)
        dit = DiT(Model.preset("opensora-2"), 16, (1, 1, 1), 4096)
    kinds = (flux.transformer_blocks, flux.single_transformer_blocks)
    assert [len(kind) for kind in kinds] == [dit.config.num_double_layers, dit.config.num_single_layers]
    for blocks, own in zip(kinds, (dit.blocks["0"], dit.blocks["56"]), strict=True):
        assert sum(p.numel() for p in blocks[0].parameters()) == sum(p.numel() for p in own.parameters())
    assert sum(p.numel() for p in flux.parameters()) == sum(p.numel() for p in dit.parameters())


def test_rotation_over_axes_that_are_unknown_here() -> None:
    module = theirs(hunyuan(1, 1, 1, 16, (1, 2, 2), rope_axes_dim=(4, 4, 8)))
    with pytest.raises(
        ValueError, match=re.escape("rope_axes_dim=[4, 4, 8] of heads of 16 is none of those known here")
    ):
        from_diffusers(module)


@pytest.mark.parametrize(
    "name",
    [
        "wan",
        "cogvideox",
        "cogvideox, sinusoids",
        "latte",
        "latte, variance, scaled space",
        "hunyuanvideo, pooled as wide as text",
    ],
)
def test_import_train_sample_export(
    configure: Callable[..., RunConfig], tmp_path: Path, capsys: Any, name: str
) -> None:
    """A checkpoint of theirs begins a run, and what the run becomes is opened by `from_pretrained`."""
    module: Any = theirs(CASES[name])
    module.save_pretrained(tmp_path / "theirs" / "transformer")
    assert main(["import", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")]) == 0
    assert f"train.init_from={tmp_path / 'ours'}" in capsys.readouterr().out
    model = json.loads((tmp_path / "ours" / "model.json").read_text())
    assert Model(**model) == from_diffusers(module).config
    config = configure(
        tmp_path / "run",
        model={**model, "attention_backend": "sdpa"},
        text={"width": TEXT, "num_heads": 1, "num_layers": 0},
        train={"steps": 1, "learning_rate": 1e-30, "init_from": str(tmp_path / "ours"), "precision": "fp32"},
        sample={"prompts": ("a red square",), "num_steps": 2},
    )
    assert run(config)
    shutil.rmtree(tmp_path / "ours")  # a run that has a checkpoint reads it no more
    told = ["model.guidance=3", "sample.guidance=1"] if "hunyuan" in name else []
    assert list(sample_run(config.directory, ["a blue disc"], tmp_path / "drawn", 0, told))
    for weights in ("ema", "model"):
        out = str(tmp_path / weights)
        assert main(["export", config.run_dir, "--format", "diffusers", "--weights", weights, "--out", out]) == 0
        opened = type(module).from_pretrained(out)
        assert opened.state_dict().keys() == module.state_dict().keys()
        differ = [n for n, p in module.state_dict().items() if not torch.equal(p, opened.state_dict()[n])]
        assert differ == []
        if "sinusoids" in name:
            assert opened.config.max_text_seq_length == config.text.max_tokens
        if "latte" in name:
            assert opened.config.video_length == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 3}, "missing: dit.blocks.2."),
        ({"num_layers": 1}, "unknown: dit.blocks.1."),
        ({"mlp_width": 64}, "dit.blocks.0.mlp.up.weight is (60, 24)"),
    ],
)
def test_weights_of_another_geometry(
    configure: Callable[..., RunConfig], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    module = theirs(CASES["wan"])
    module.save_pretrained(tmp_path / "theirs")  # type: ignore[operator]
    geometry = import_diffusers(tmp_path / "theirs", tmp_path / "ours")
    config = configure(
        tmp_path / "run",
        model={**geometry.model.model_dump(), **changes},
        text={"width": TEXT, "num_heads": 1, "num_layers": 0},
        train={"steps": 1, "init_from": str(tmp_path / "ours")},
        sample={"prompts": ()},
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        run(config)
