"""A DiT of images, conditioned on classes, and ours without them: the model of the null label, and videos from it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vidit.cli import main
from vidit.config import FAMILIES, Diffusion, Model, RunConfig
from vidit.diffusion.objective import build_objective
from vidit.diffusion.paths import build_path
from vidit.diffusion.samplers import sample
from vidit.export.diffusers import from_diffusers, to_diffusers
from vidit.export.diffusers.convert import imported
from vidit.export.diffusers.dit import DIT
from vidit.model.dit import DiT, text_frames
from vidit.model.init import initialise
from vidit.model.windows import Grid
from vidit.text.encoder import build_text_encoder
from vidit.train.initial import new_parts
from vidit.train.parallelize import build_dit
from vidit.train.run import run
from vidit.vae.stored import adopt_vae

diffusers: Any = pytest.importorskip("diffusers")

LABELS = 5
SIZES = {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 24, "num_embeds_ada_norm": LABELS,
         "sample_size": 8, "in_channels": 4, "out_channels": 8}  # fmt: skip
# Changes of the geometry, and the side of the latent.
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "variance": ({}, 8),
    "odd grid, not the size of training": ({"num_layers": 2, "attention_head_dim": 16, "norm_eps": 0.01}, 10),
    "no variance, exact gelu, one token": ({"out_channels": 4, "activation_fn": "gelu", "norm_eps": 1e-6}, 2),
    "patches of 4, odd grid": ({"patch_size": 4, "sample_size": 16, "in_channels": 3, "out_channels": 3}, 12),
}
CLASS = {"time_spacing": "closed", "mlp_norm_eps": 1e-5}
NAMES = {
    "time.up": "timestep_embedder.linear_1",
    "time.out": "timestep_embedder.linear_2",
}


@torch.no_grad()
def theirs(changes: dict[str, Any]) -> Any:
    """Random weights, the embedding of time and label the same in all blocks, as in what is converted from DiT."""
    torch.manual_seed(0)
    module = diffusers.DiTTransformer2DModel(**{**SIZES, **changes})
    for p in module.parameters():
        p.copy_(torch.randn_like(p) / max(4, p[0].numel()) ** 0.5)
    for block in module.transformer_blocks:
        block.norm1.emb.load_state_dict(module.transformer_blocks[0].norm1.emb.state_dict())
    return module.eval()


def call_ours(dit: DiT, x_BCTHW: Tensor, time_B: Tensor) -> Tensor:
    grid = Grid(*(n // p for n, p in zip(x_BCTHW.shape[2:], dit.config.patch, strict=True)))
    rows = len(x_BCTHW)
    out: Tensor = dit(x_BCTHW, grid, time_B, torch.zeros(rows, 1, 0), text_frames(torch.ones(rows, 1).bool()))
    return out


@pytest.mark.parametrize(("changes", "side"), CASES.values(), ids=CASES)
def test_outputs_and_gradients_are_those_of_the_null_label(changes: dict[str, Any], side: int) -> None:
    module = theirs(changes)
    dit = from_diffusers(module)
    x = torch.randn(2, module.config.in_channels, side, side, generator=torch.Generator().manual_seed(1))
    time = torch.tensor([3.0, 871.0])
    expected = module(x, timestep=time, class_labels=torch.full((2,), LABELS)).sample[:, : x.shape[1]]
    out = call_ours(dit, x[:, :, None], time)[:, :, 0]
    assert 0.1 < float(expected.detach().std()) < 10
    assert float((out - expected).detach().abs().max()) <= 1e-5 * float(expected.detach().abs().max())
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (expected * weight).sum().backward()
    (out * weight).sum().backward()
    geometry, _ = imported(module)
    grads = {name: p.grad for name, p in module.named_parameters()}
    own = {name: p.grad for name, p in dit.named_parameters()}
    assert all(grad is not None for grad in (*own.values(), *grads.values()))
    # Ours gets what the copies there get together; the null label's row, and no other, what the bias gets.
    for ours, name in NAMES.items():
        for last in ("weight", "bias"):
            key = f"transformer_blocks.{{}}.norm1.emb.{name}.{last}"
            total = sum(grads.pop(key.format(n)) for n in range(module.config.num_layers))
            close(own.pop(f"embed.conditioning.{ours}.{last}"), total)
    tables = [n for n in grads if "class_embedder" in n]
    assert all(not grads[n][:LABELS].any() and grads.pop(n)[LABELS].any() for n in tables)
    floor = 1e-6 * max(float(g.norm()) for g in grads.values())
    places = {name: place for name, place in family_places(dit).items() if name in own}
    assert {n for place in places.values() for n in place.names} == grads.keys()
    for name, place in places.items():
        close(own[name], place.form.ours([grads[n] for n in place.names], geometry.model), floor)


def family_places(dit: DiT) -> dict[str, Any]:
    return DIT.places(dit.state_dict(), dit.config)


def close(ours: Tensor, wanted: Tensor, floor: float = 0.0) -> None:
    """To 1e-4, or both nothing but rounding: a shift of all keys alike, queries of a softmax over one key."""
    if float(wanted.norm()) <= floor:
        assert float(ours.norm()) <= floor
    else:
        assert float((ours - wanted).norm()) <= 1e-4 * float(wanted.norm())


def test_copies_are_bit_for_bit_and_one_bias_has_the_label() -> None:
    module = theirs({})
    given, dit = module.state_dict(), from_diffusers(module)
    own = dit.state_dict()
    folded = "embed.conditioning.time.out.bias"
    for name, place in family_places(dit).items():
        if name != folded:
            wanted = given[place.names[0]].flatten()
            assert torch.equal(own[name].flatten().sort().values, wanted.sort().values), name
    emb = "transformer_blocks.0.norm1.emb."
    null = given[emb + "class_embedder.embedding_table.weight"][LABELS]
    assert torch.equal(own[folded], given[emb + "timestep_embedder.linear_2.bias"] + null)


@torch.no_grad()
def test_the_sum_with_the_null_label_is_not_rounded_to_bf16() -> None:
    stored = theirs({}).bfloat16()
    dit, module = from_diffusers(stored), theirs({})
    module.load_state_dict(stored.state_dict())
    emb = module.transformer_blocks[0].norm1.emb
    wanted = emb.timestep_embedder.linear_2.bias + emb.class_embedder.embedding_table.weight[LABELS]
    bias = dit.state_dict()["embed.conditioning.time.out.bias"]
    assert torch.equal(bias, wanted)
    assert not torch.equal(bias, wanted.bfloat16().float())
    x, time = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([3.0, 871.0])
    expected = module(x, timestep=time, class_labels=torch.full((2,), LABELS)).sample[:, :4]
    out = call_ours(dit, x[:, :, None], time)[:, :, 0]
    assert float((out - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sample_size", None, "has sample_size=None, and it is a whole number above 0"),
        ("sample_size", [8, 8], "has sample_size=[8, 8], and it is a whole number above 0"),
        ("patch_size", None, "has patch_size=None, and it is a whole number above 0"),
        ("norm_eps", None, "has norm_eps=None, and it is a number above 0"),
        ("num_layers", 0, "has num_layers=0, and it is a whole number above 0"),
        ("out_channels", "8", "4 channels in and 8 out"),
        (
            "num_embeds_ada_norm",
            7,
            "has num_embeds_ada_norm=7, and transformer_blocks.0.norm1.emb.class_embedder.embed",
        ),
    ],
)
def test_a_damaged_config_is_told_by_its_field(tmp_path: Path, name: str, value: Any, message: str) -> None:
    theirs({}).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(ValueError, match=re.escape(message)):
        from_diffusers(tmp_path)


def test_what_is_written_has_no_labels_and_is_read_bit_for_bit(tmp_path: Path) -> None:
    dit = from_diffusers(theirs({}))
    module: Any = to_diffusers(dit)
    assert type(module) is diffusers.DiTTransformer2DModel
    x, time = torch.randn(2, 4, 8, 8), torch.tensor([5.0, 600.0])
    by_label = [module.eval()(x, timestep=time, class_labels=torch.full((2,), n)).sample for n in (0, 1)]
    assert torch.equal(*by_label)
    torch.testing.assert_close(by_label[0][:, :4], call_ours(dit, x[:, :, None], time)[:, :, 0], rtol=0, atol=1e-5)
    module.save_pretrained(tmp_path)
    again = from_diffusers(tmp_path)
    assert again.config == dit.config
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in dit.state_dict().items())


def test_an_older_file_says_another_class_and_holds_the_positions(tmp_path: Path) -> None:
    module = theirs({})
    module.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | {"_class_name": "Transformer2DModel", "num_vector_embeds": None}
    del config["norm_eps"]  # as it was before the class had it
    path.write_text(json.dumps(config))
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(load_file(weights) | {"pos_embed.pos_embed": module.pos_embed.pos_embed}, weights)
    assert from_diffusers(tmp_path).config == from_diffusers(module).config
    path.write_text(json.dumps(config | {"norm_type": "ada_norm_single", "caption_channels": 8}))
    told = "norm_type='ada_norm_single' where only 'ada_norm_zero' is known; caption_channels=8 where only None is"
    with pytest.raises(ValueError, match=re.escape(told)):
        from_diffusers(tmp_path)


@pytest.mark.parametrize(
    ("name", "row"), [("class_embedder.embedding_table", LABELS), ("timestep_embedder.linear_1", 0)]
)
def test_blocks_that_embed_in_their_own_way_are_refused(name: str, row: int) -> None:
    module = theirs({})
    with torch.no_grad():
        module.get_submodule(f"transformer_blocks.2.norm1.emb.{name}").weight[row, 0] += 1e-6
    told = "of 3 blocks of this DiTTransformer2DModel, 1 embed time and label otherwise than block 0 (2); a model"
    with pytest.raises(ValueError, match=re.escape(told)):
        from_diffusers(module)


def test_other_labels_may_differ() -> None:
    module = theirs({})
    with torch.no_grad():
        module.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight[0] += 1
    from_diffusers(module)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time_spacing": "open"}, "model.time_spacing=open where dit has closed"),
        ({"position_span": 0}, "model.position_span=0 where it has the size of training"),
        ({"temporal_attention": True}, "model.temporal_attention=True where dit has False"),
    ],
)
def test_what_the_class_does_not_express(changes: dict[str, Any], message: str) -> None:
    c = Model.preset("dit-XL-2", num_layers=1, position_span=4, **CLASS)
    with torch.device("meta"):
        dit = DiT(c.model_copy(update=changes), 4, (1, 1, 1), 0)
    with pytest.raises(ValueError, match=re.escape(message)):
        to_diffusers(dit)


def test_the_bare_preset_is_told_what_the_class_needs_and_fits_with_that() -> None:
    sizes = {"num_layers": 2, "width": 32, "num_heads": 2, "mlp_width": 128}
    cure = r"model\.time_spacing=closed and model\.position_span=<tokens along a side of the grid>"
    for given in ({}, {"time_spacing": "closed"}):
        with pytest.raises(ValueError, match=cure):
            to_diffusers(DiT(Model.preset("dit-XL-2", **sizes, **given), 4, (1, 4, 4), 0))
    dit = DiT(Model.preset("dit-XL-2", **sizes, time_spacing="closed", position_span=4), 4, (1, 4, 4), 0)
    initialise(dit, 0)
    with torch.no_grad():  # what begins at zero would hide the rest
        for p in dit.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1)
    module: Any = to_diffusers(dit)
    x, time = torch.randn(2, 4, 8, 8), torch.tensor([5.0, 600.0])
    out = module.eval()(x, timestep=time, class_labels=torch.zeros(2, dtype=torch.long)).sample[:, :4]
    torch.testing.assert_close(out, call_ours(dit, x[:, :, None], time)[:, :, 0], rtol=0, atol=1e-5)


def test_the_preset_is_the_published_geometry() -> None:
    with torch.device("meta"):
        module = diffusers.DiTTransformer2DModel(out_channels=8)
    geometry, weights = imported(module)
    assert geometry.model == Model.preset("dit-XL-2", position_span=16, **CLASS)
    # Each further block has an embedding of time and of 1001 labels; the first one's labels go as well.
    time, labels = (256 + 1 + 1152 + 1) * 1152, 1001 * 1152
    parameters = sum(p.numel() for p in module.parameters())
    assert sum(math.prod(shape) for shape in weights.shapes.values()) == parameters - 27 * time - 28 * labels


def test_a_video_model_begins_as_the_image_model_of_each_frame(
    configure: Callable[..., RunConfig], tmp_path: Path, capsys: Any
) -> None:
    """Attention through time and to text are new, and what is imported gives each frame what it gives an image."""
    theirs({}).save_pretrained(tmp_path / "theirs")
    assert main(["import", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")]) == 0
    said = capsys.readouterr().out
    assert "the null label's vector" in said
    assert "for 4 latent channels and reads no text" in said
    images = Model.model_validate_json((tmp_path / "ours" / "model.json").read_text())
    more = {"temporal_attention": True, "relative_position": "rope", "rope_split": "time", "motion_free": 0.3}
    more |= {"cross_attention": "all", "cross_keys": "text", "pooled_text": True, "attention_backend": "sdpa"}
    config = configure(
        tmp_path / "run",
        model={**images.model_dump(), **more},
        diffusion={"path": "vp", "target": "eps", "zero_terminal_snr": False},
        train={"steps": 1, "init_from": str(tmp_path / "ours")},
        sample={"prompts": ()},
    )
    assert set(more) <= set(FAMILIES["gentron"]) | {"motion_free", "attention_backend"}
    config = adopt_vae(config, 1)
    text = build_text_encoder(config.text, torch.float32)
    task = build_dit(config, text, torch.device("cpu"), torch.float32)
    names = [name for name, _ in task.named_parameters()]
    said = "; ".join(new_parts(config, names))
    for part in ("attention through time", "attention to text", "text embedding", "pooled caption"):
        assert f"has no {part}: new is dit." in said
    video: Any = task.get_submodule("dit")
    g = torch.Generator().manual_seed(0)
    x, time = torch.randn(2, 4, 3, 6, 10, generator=g), torch.tensor([4.0, 700.0])
    width = video.text_width
    words, pooled = torch.randn(2, 5, width, generator=g), torch.randn(2, width, generator=g)
    grid = Grid(3, 3, 5)
    out = video(x, grid, time, words, text_frames(torch.ones(2, 5).bool()), pooled)
    alone = from_diffusers(tmp_path / "theirs")
    for frame in range(3):
        wanted = call_ours(alone, x[:, :, frame : frame + 1], time)
        torch.testing.assert_close(out[:, :, frame : frame + 1], wanted, rtol=0, atol=1e-5)
    (out.square().mean()).backward()
    learning = {n.split(".")[2] for n, p in video.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"temporal", "cross", "attn", "pooled"} <= learning
    assert run(config)


@torch.no_grad()
def test_steps_of_its_scheduler_are_those_of_ours() -> None:
    """DDIM by the diffusion that the page gives DiT, from one noise, against the class's model and scheduler."""
    module = theirs({"out_channels": 4})
    dit, c = from_diffusers(module), Diffusion(path="vp", target="eps", zero_terminal_snr=False)
    path, objective = build_path(c), build_objective(c)
    noise = torch.randn(2, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    times = path.sampling_times(10)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return objective.denoised(call_ours(dit, x, path.time_embedding_input(t)), x, t)

    found = sample("ddim", denoise, path, noise, times)[:, :, 0]
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(10)
    x = path.start(noise, times[0])[:, :, 0]
    for t in scheduler.timesteps:
        eps = module(x, timestep=t.expand(2), class_labels=torch.full((2,), LABELS)).sample
        x = scheduler.step(eps, t, x).prev_sample
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4 * float(x.abs().max()))
