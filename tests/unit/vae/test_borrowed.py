"""VAEs of diffusers behind the interface of ours, with small random models of the real classes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vidit.config import ConfigError, Data, Parallel, RunConfig, Vae
from vidit.resolve import faults
from vidit.vae.autoencoder import Autoencoder
from vidit.vae.coding import decode_clip, encode_clip
from vidit.vae.place import vae_folder
from vidit.vae.store import load_vae
from vidit.vae.stored import adopt_vae, is_same_vae, vae_config

diffusers: Any = pytest.importorskip("diffusers")
CPU, COMMIT = torch.device("cpu"), "0123456789" * 4
WIDTHS: dict[str, Any] = {"block_out_channels": (4, 4, 4, 4), "norm_num_groups": 2, "latent_channels": 4}
WAN: dict[str, Any] = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
WAN |= {"latents_mean": [-0.7, 0.2, 0.1, 1.5], "latents_std": [2.8, 1.4, 2.3, 0.5]}
IMAGE: dict[str, Any] = {
    "block_out_channels": (4, 4), "norm_num_groups": 2, "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "image": ("AutoencoderKL", IMAGE | {"scaling_factor": 0.3611, "shift_factor": 0.1159}),
    "cogvideox": ("AutoencoderKLCogVideoX", WIDTHS | {"layers_per_block": 1, "scaling_factor": 0.7}),
    "hunyuan": ("AutoencoderKLHunyuanVideo", WIDTHS | {"layers_per_block": 1}),
    "wan": ("AutoencoderKLWan", WAN),
    "wan-2.2": ("AutoencoderKLWan", WAN | {
        "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16,
    }),
}  # fmt: skip
GEOMETRY = {
    "image": (1, 2), "cogvideox": (4, 8), "hunyuan": (4, 8), "wan": (4, 8), "wan-2.2": (4, 16)
}  # fmt: skip
# Counts that are odd in frames, in latent frames, or longer than the batches of the class.
FRAMES = {"image": (1, 2, 5, 19), "cogvideox": (1, 9, 25), "hunyuan": (1, 5, 21), "wan": (1, 5, 13), "wan-2.2": (1, 9)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, (kind, settings) in MODELS.items():
        torch.manual_seed(3)
        made[name] = tmp_path_factory.mktemp("vaes") / name
        getattr(diffusers, kind)(**settings).save_pretrained(made[name])
    return made


def real(folder: Path) -> Any:
    kind = json.loads((folder / "config.json").read_text())["_class_name"]
    return getattr(diffusers, kind).from_pretrained(folder, low_cpu_mem_usage=False).eval()


def pixels(frames: int, size: int = 32, clips: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.rand(clips, 3, frames, size, size, generator=generator) * 2 - 1


def over_frames(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.stack([call(x[:, :, t]) for t in range(x.shape[2])], dim=2)


def pipeline_latents(model: Any, z: Tensor) -> Tensor:
    """As pipeline_flux_img2img, pipeline_cogvideox_video2video, pipeline_hunyuan_video (inverted) and
    pipeline_wan_video2video write it.
    """
    c = model.config
    if isinstance(model, diffusers.AutoencoderKLWan):
        mean = torch.tensor(c.latents_mean).view(1, c.z_dim, 1, 1, 1)
        return (z - mean) * (1.0 / torch.tensor(c.latents_std).view(1, c.z_dim, 1, 1, 1))
    if isinstance(model, diffusers.AutoencoderKL):
        return (z - c.shift_factor) * c.scaling_factor
    return z * c.scaling_factor


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "frames"), [(name, frames) for name, counts in FRAMES.items() for frames in counts])
@torch.no_grad()
def test_the_numbers_are_those_of_the_class(folders: dict[str, Path], name: str, frames: int) -> None:
    # In fp64, for attention rounds otherwise where its input lies otherwise in memory.
    vae, model, x = load_vae(folders[name], CPU, torch.float64), real(folders[name]).double(), pixels(frames).double()
    c = vae.config
    assert (c.temporal_stride, c.spatial_stride, c.latent_channels) == (*GEOMETRY[name], 4)
    found = encode_clip(vae, x, c)
    if name == "image":
        mean, logvar = (
            over_frames(lambda f, n=n: getattr(model.encode(f).latent_dist, n), x) for n in ("mean", "logvar")
        )
        decoded = over_frames(lambda f: model.decode(f).sample, mean)
    else:
        mean, logvar = model.encode(x).latent_dist.mean, model.encode(x).latent_dist.logvar
        decoded = model.decode(mean).sample
    t, s = GEOMETRY[name]
    assert found.mean.shape == (2, 4, 1 + (frames - 1) // t, 32 // s, 32 // s)
    assert decoded.shape == x.shape
    same(found.mean, mean)
    same(found.log_variance, logvar)
    same(decode_clip(vae, mean, c), decoded)
    same(vae.whiten(mean), pipeline_latents(model, mean))
    same(vae.unwhiten(vae.whiten(mean)), mean)


@torch.no_grad()
def test_per_channel_statistics_of_an_image_vae(tmp_path: Path) -> None:
    """As pipeline_stable_diffusion_xl_img2img has it."""
    mean, std = [0.1, -0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    settings = IMAGE | {"scaling_factor": 0.5, "latents_mean": mean, "latents_std": std}
    diffusers.AutoencoderKL(**settings).save_pretrained(tmp_path)
    vae, z = load_vae(tmp_path, CPU, torch.float32), torch.randn(2, 4, 3, 2, 2)
    shape = (1, 4, 1, 1, 1)
    same(vae.whiten(z), (z - torch.tensor(mean).view(shape)) * 0.5 / torch.tensor(std).view(shape))


def test_frames_at_once_change_nothing(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    vae = load_vae(folders["image"], CPU, torch.float32)
    model, seen = vae.get_submodule("model"), []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda x: (seen.append(len(x)), encode(x))[1])
    whole = encode_clip(vae, pixels(9), vae.config).mean
    same(encode_clip(vae, pixels(9), vae.config.model_copy(update={"max_frames": 4})).mean, whole)
    assert seen == [16, 2, 4, 4, 4, 4, 2]


@pytest.mark.parametrize("name", MODELS)
def test_tiles(folders: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller parts go through the layers, and what comes out has the size of the whole and is near it."""
    vae = load_vae(folders[name], CPU, torch.float32)
    side = 4 * vae.config.spatial_stride
    x, seen, tiled = pixels(9, 2 * side, 1), [], vae.config.model_copy(update={"tile": side})
    whole = encode_clip(vae, x, vae.config).mean
    encoder: Any = vae.get_submodule("model.encoder")
    hook = encoder.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[-1]))
    parts = encode_clip(vae, x, tiled).mean
    hook.remove()
    assert max(seen) <= side
    assert len(seen) > 1
    assert parts.shape == whole.shape
    assert not torch.equal(parts, whole)
    assert decode_clip(vae, whole, tiled).shape == x.shape
    same(encode_clip(vae, x, vae.config).mean, whole)


@pytest.mark.parametrize("name", MODELS)
def test_a_wrong_count_of_frames(folders: dict[str, Path], name: str) -> None:
    vae = load_vae(folders[name], CPU, torch.float32)
    if name == "image":
        assert encode_clip(vae, pixels(2), vae.config).mean.shape[2] == 2
        return
    unit = 8 if name == "cogvideox" else 4
    with pytest.raises(ValueError, match=f"frames must be 1 \\+ a multiple of {unit}"):
        vae.encode(pixels(1 + unit // 2))
    data = Data(train="x", num_frames=1 + unit // 2, height=64, width=64)
    assert any(
        f"data.num_frames={1 + unit // 2} is not" in f and "use 1 or" in f for f in found(folders[name], data=data)
    )


def run(folder: Path | str, vae: Any = (), **changes: Any) -> RunConfig:
    return RunConfig(name="a", vae=Vae(weights=str(folder), **dict(vae)), **({"data": Data(train="x")} | changes))


def found(folder: Path, vae: Any = (), **changes: Any) -> list[str]:
    try:
        return list(faults(adopt_vae(run(folder, vae, **changes))))
    except ConfigError as error:
        return list(error.faults)


def test_the_geometry_is_adopted(folders: dict[str, Path]) -> None:
    adopted = adopt_vae(run(folders["wan-2.2"], {"tile": 64}))
    c = adopted.vae
    assert (c.kind, c.strides, c.latent_channels, c.tile) == ("AutoencoderKLWan", (4, 16), 4, 64)
    assert adopt_vae(adopted) == adopted
    read_back = RunConfig.model_validate_json(adopted.to_json())
    assert adopt_vae(read_back) == read_back == adopted


@pytest.mark.parametrize(
    ("vae", "changes", "says"),
    [
        ({"latent_channels": 9}, {}, "vae.latent_channels=9, but"),
        ({"base_channels": 64}, {}, "vae.base_channels=64 has no effect on"),
        ({"kl_weight": 0.5}, {}, "vae.kl_weight=0.5 has no effect on"),
        ({"kind": "AutoencoderKL"}, {}, "vae.kind='AutoencoderKL', but"),
        ({"max_frames": 8}, {}, "vae.max_frames=8 has no effect"),
        ({"tile": 64, "tile_overlap": 8}, {}, "vae.tile_overlap=8 has no effect"),
        ({"tile": 40}, {}, "vae.tile=40 is not divisible by 32"),
        ({"revision": COMMIT}, {}, "has no effect on the local folder"),
        ({}, {"parallel": Parallel(sequence=2, vae_context="time")}, "parallel.vae_context=time has no effect"),
        (
            {},
            {"data": Data(train="x", num_frames=9, image_rows=1, cache_latents=True)},
            "that of AutoencoderKLCogVideoX has seen other frames",
        ),
    ],
)
def test_what_it_cannot_do_is_refused(folders: dict[str, Path], vae: Any, changes: Any, says: str) -> None:
    assert any(says in fault for fault in found(folders["cogvideox"], vae, **changes))


def test_training_one_is_refused(folders: dict[str, Path]) -> None:
    config = RunConfig.model_validate(
        {"name": "a", "vae": {"weights": str(folders["wan"]), "kind": "AutoencoderKLWan"}, "train": {"task": "vae"}}
    )
    (fault,) = (fault for fault in faults(config) if "vae.kind" in fault)
    assert "vae.weights" in fault
    assert "no effect without train.task=dit" in fault


def test_folders_that_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["wan"], tmp_path, dirs_exist_ok=True)
    config, weights = tmp_path / "config.json", tmp_path / "diffusion_pytorch_model.safetensors"
    facts = json.loads(config.read_text())
    for changed, says in (
        ({"_class_name": "AutoencoderKLMochi"}, "is of class 'AutoencoderKLMochi'; as vae.weights use one of Auto"),
        ({"temperal_downsample": [False, False, True]}, "temporal stride of 2, and AutoencoderKLWan codes 4"),
        ({"in_channels": 4}, "codes in_channels=4, and RGB takes 3"),
    ):
        config.write_text(json.dumps(facts | changed))
        with pytest.raises(ValueError, match=says):
            vae_config(tmp_path)
    config.write_text(json.dumps({name: value for name, value in facts.items() if name != "z_dim"}))
    with pytest.raises(ValueError, match="lacks 'z_dim'"):
        vae_config(tmp_path)
    config.write_text(json.dumps(facts | {"latents_mean": [0.0] * 3}))
    with pytest.raises(ValueError, match="3 numbers of latents_mean for 4 latent channels"):
        load_vae(tmp_path, CPU, torch.float32)
    config.write_text(json.dumps(facts | {"num_res_blocks": 2}))
    with pytest.raises(ValueError, match=r"lacks .* weights of AutoencoderKLWan"):
        load_vae(tmp_path, CPU, torch.float32)
    config.write_text(json.dumps(facts))
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cannot be read as a AutoencoderKLWan"):
        load_vae(tmp_path, CPU, torch.float32)
    weights.rename(tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has no diffusion_pytorch_model.safetensors, but .*bin; no other format"):
        load_vae(tmp_path, CPU, torch.float32)


def test_statistics_that_nobody_reads(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["cogvideox"], tmp_path, dirs_exist_ok=True)
    facts = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(facts | {"shift_factor": 0.1}))
    with pytest.raises(ValueError, match="which no pipeline of it reads"):
        load_vae(tmp_path, CPU, torch.float32)


def test_a_pipeline_and_a_hub_name(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(folders["wan"], tmp_path / "pipeline" / "vae")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    assert adopt_vae(run(tmp_path / "pipeline")).vae.strides == (4, 8)
    # The hub's own cache on disk, as a download leaves it; nothing is asked of the network.
    snapshot = tmp_path / "hub" / "models--someone--wan" / "snapshots" / COMMIT
    shutil.copytree(folders["wan"], snapshot / "vae")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub = run("someone/wan", {"revision": COMMIT})
    adopted = adopt_vae(hub)
    assert (adopted.vae.weights, adopted.vae.revision, adopted.vae.strides) == ("someone/wan", COMMIT, (4, 8))
    assert is_same_vae(vae_folder(hub.vae), folders["wan"])
    for name, revision, says in (
        ("someone/wan", "main", "vae.revision=main can move"),
        ("someone/other", COMMIT, r"someone/other at vae.revision=.* cannot be fetched"),
    ):
        with pytest.raises(ConfigError, match=says):
            adopt_vae(run(name, {"revision": revision}))
    with pytest.raises(ConfigError, match=r"or a hub name with vae.revision"):
        adopt_vae(run("someone/wan"))


def test_in_bf16(folders: dict[str, Path]) -> None:
    vae: Autoencoder = load_vae(folders["wan"], CPU, torch.bfloat16)
    found = vae.encode(pixels(5))
    assert (vae.dtype, found.mean.dtype, vae.decode(found.mean).dtype) == (torch.bfloat16, torch.float32, torch.float32)


@pytest.mark.parametrize(
    ("name", "entry", "value", "what"),
    [
        ("cogvideox", "scaling_factor", None, "a number above 0"),
        ("cogvideox", "temporal_compression_ratio", "4", "a whole number above 0"),
        ("hunyuan", "latent_channels", None, "a whole number above 0"),
        ("hunyuan", "spatial_compression_ratio", None, "a whole number above 0"),
        ("wan", "temperal_downsample", None, "a list of true or false"),
        ("wan", "dim_mult", [1, "2"], "a list of whole numbers above 0"),
    ],
)
def test_a_damaged_entry_is_told(
    name: str, entry: str, value: Any, what: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders[name], tmp_path, dirs_exist_ok=True)
    facts = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**facts, entry: value}))
    with pytest.raises(ValueError, match=rf"has {entry}={re.escape(repr(value))}, and it is {what}; copy the file"):
        vae_config(tmp_path)
