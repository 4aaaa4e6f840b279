"""An image U-Net of diffusers and ours are one function of the same weights; what is not known is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vidit.cli import main
from vidit.config import UNET_FAMILIES, RunConfig, Unet
from vidit.export.diffusers.store import export_diffusers
from vidit.export.diffusers.unet import imported_unet, their_name, unet_geometry
from vidit.model.context import EVERY_FRAME
from vidit.model.init import initialise
from vidit.model.unet.unet import VideoUnet
from vidit.model.windows import Grid
from vidit.train.run import run
from vidit.train.weights_folder import Weights

diffusers: Any = pytest.importorskip("diffusers")
TEXT = 12
SMALL: dict[str, Any] = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "norm_num_groups": 4, "cross_attention_dim": TEXT,
}  # fmt: skip
TWO: dict[str, Any] = {
    "block_out_channels": (8, 16), "layers_per_block": 1, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
GEOMETRIES: dict[str, dict[str, Any]] = {
    "sd 2": {**TWO, "attention_head_dim": (2, 4), "use_linear_projection": True},
    "sd 1": {**TWO, "attention_head_dim": 4, "layers_per_block": 2},
    "four levels": {
        "block_out_channels": (8, 16, 32, 32), "attention_head_dim": (1, 2, 4, 4), "use_linear_projection": True,
    },
}  # fmt: skip


def theirs(name: str) -> nn.Module:
    torch.manual_seed(0)
    module: nn.Module = diffusers.UNet2DConditionModel(**SMALL, **GEOMETRIES[name])
    with torch.no_grad():
        for p in module.parameters():
            p += 0.1 * torch.randn_like(p)
    return module.double()


def read(module: nn.Module) -> tuple[Unet, dict[str, Tensor]]:
    state = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    given = Weights({name: tuple(t.shape) for name, t in state.items()}, state.__getitem__)
    geometry, weights = imported_unet(dict(module.config), given)  # type: ignore[arg-type]
    return geometry.unet, {name: weights.get(name) for name in weights.shapes}


def built(c: Unet, weights: dict[str, Tensor]) -> VideoUnet:
    unet = VideoUnet(c, 4, (3, 8, 8), TEXT)
    initialise(unet, 0)
    unet = unet.double()
    unet.dtype = torch.float64
    _, unknown = unet.load_state_dict(weights, strict=False)
    assert unknown == []
    return unet


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("size", [(8, 8), (16, 8)])
def test_one_function_of_the_same_weights(name: str, size: tuple[int, int]) -> None:
    """Outputs and gradients; and of a video model made of it each frame is what theirs makes of it."""
    module = theirs(name)
    c, weights = read(module)
    assert list(c.faults()) == []
    image, video = built(c, weights), built(c.model_copy(update=UNET_FAMILIES["video-ldm"]), weights)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 3, *size, generator=generator, dtype=torch.float64)
    text = torch.randn(2, 5, TEXT, generator=generator, dtype=torch.float64)
    time, seen, grid = torch.tensor([37.0, 811.0]).double(), torch.full((2, 5), EVERY_FRAME), Grid(3, *size)
    out = image(x, grid, time, text, seen)
    frames = [module(x[:, :, frame], time, encoder_hidden_states=text).sample for frame in range(3)]  # type: ignore[union-attr]
    expected = torch.stack(frames, dim=2)
    # Their sinusoids of the time are in fp32.
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6 * float(expected.detach().abs().max()))
    assert torch.equal(video(x, grid, time, text, seen), out)
    out.square().sum().backward()
    expected.square().sum().backward()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    floor = 1e-9 * max(float(p.grad.norm()) for p in image.parameters() if p.grad is not None)  # of one place's logits
    for name, p in image.named_parameters():
        there = gradients[their_name(name)]
        assert p.grad is not None
        assert there is not None
        assert float((p.grad - there.view_as(p)).norm()) <= max(floor, 1e-5 * float(there.norm())), name


def test_a_folder_becomes_what_a_run_starts_from(
    configure: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Layers over time are trained upon a pipeline's U-Net, which stays as it is."""
    module = theirs("sd 2").float()
    module.save_pretrained(tmp_path / "pipeline" / "unet")  # type: ignore[operator]
    assert main(["import", str(tmp_path / "pipeline"), "--out", str(tmp_path / "weights")]) == 0
    assert "unet.json is the unet section for 4 latent channels and text of width 12" in capsys.readouterr().out
    given = Unet.model_validate_json((tmp_path / "weights" / "unet.json").read_text())
    unet = given.model_copy(update=UNET_FAMILIES["modelscope"]).model_dump()
    train = {"task": "unet", "init_from": str(tmp_path / "weights"), "trainable": ("*.temporal_*",), "steps": 2}
    tree = configure(tmp_path / "run", train=train, model={}, unet=unet).model_dump(exclude_unset=True)
    del tree["model"]
    tree["text"] |= {"width": TEXT, "num_heads": 2}
    config = RunConfig.model_validate(tree)
    assert run(config)
    assert main(["export", str(tmp_path / "run"), "--weights", "model", "--out", str(tmp_path / "out")]) == 0
    end, state = load_file(tmp_path / "out" / "model.safetensors"), module.state_dict()
    image = [name for name in end if name.startswith("unet.") and ".temporal_" not in name]
    assert len(image) == len(state)
    assert all(torch.equal(end[n].flatten(), state[their_name(n.removeprefix("unet."))].flatten()) for n in image)
    with pytest.raises(ValueError, match="holds a U-Net, which no class of diffusers expresses"):
        export_diffusers(tmp_path / "run", tmp_path / "theirs")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier' where only 'positional' is known"),
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep' where only None"),
        ({"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "down_block_types=.* where only CrossAttnDown"),
        ({"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}, "which do not mirror down_block_types"),
        ({"block_out_channels": [8, 12]}, r"block_out_channels=\[8, 12\], which are no multiples of the first"),
        ({"in_channels": 9}, "9 channels in and 4 out"),
        ({"layers_per_block": [1, 2]}, r"layers_per_block=\[1, 2\] where only one number"),
        ({"attention_head_dim": [2, 2, 3]}, "neither one number of heads nor heads of one size"),
    ],
)
def test_another_network_is_refused(changes: dict[str, Any], message: str) -> None:
    config = {**dict(theirs("sd 2").config), **changes}  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=message):
        unet_geometry(config)


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    theirs("sd 2").save_pretrained(tmp_path)  # type: ignore[operator]
    about = json.loads((tmp_path / "config.json").read_text())
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    weights = Weights({n: tuple(t.shape) for n, t in tensors.items()}, tensors.__getitem__)
    with pytest.raises(ValueError, match="lacks 'block_out_channels'"):
        imported_unet({n: value for n, value in about.items() if n != "block_out_channels"}, weights)
    geometry, found = imported_unet({**about, "cross_attention_dim": 13}, weights)
    assert geometry.text_width == 13
    with pytest.raises(ValueError, match=r"attn2\.to_k\.weight becomes \(8, 12\), but down\.0.*is \(8, 13\)"):
        found.get("down.0.cells.0.attention.cross.key.weight")
    tensors["extra"] = tensors.pop("conv_in.bias")
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"1 missing: conv_in\.bias; 1 unknown: extra"):
        main(["--traceback", "import", str(tmp_path), "--out", str(tmp_path / "out")])
