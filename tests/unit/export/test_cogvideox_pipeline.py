"""A CogVideoX of ours in the pipeline of diffusers: from the same noise and caption it draws the same video.

Everything in the pipeline is of the real classes, small and with random weights, and so is what our run borrows: the
text encoder and the VAE. Only the transformer is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor

from tests.text_models import save_text_models
from vidit import keys
from vidit.cli import main
from vidit.config import FAMILIES, RunConfig
from vidit.data.scene_pack import pack_scenes
from vidit.model.dit import DiT
from vidit.resolve import resolve
from vidit.sample.draw import draw_latents
from vidit.sample.run import TrainedRun, open_trained
from vidit.train.run import run
from vidit.vae.coding import decode_clip
from vidit.vae.stored import adopt_vae

diffusers: Any = pytest.importorskip("diffusers")
transformers: Any = pytest.importorskip("transformers")

FRAMES, HEIGHT, WIDTH = 9, 32, 48
FULL = "a red cube slides left"
STEPS = 10


class Pair(NamedTuple):
    """A run of ours and the pipeline that has its transformer."""

    trained: TrainedRun
    pipeline: Any
    noise: Tensor


@pytest.fixture(scope="module", params=["rope", "sinusoids"])
def pair(
    request: pytest.FixtureRequest, configure: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> Pair:
    folder = tmp_path_factory.mktemp("pipeline")
    text = save_text_models(folder / "text")["t5"]
    torch.manual_seed(3)
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4), norm_num_groups=2, latent_channels=4, layers_per_block=1, scaling_factor=0.7
    )
    vae.save_pretrained(folder / "vae")
    tokenizer = transformers.AutoTokenizer.from_pretrained(text)
    pack_scenes(folder / "clips", 4, "train", 0, num_frames=FRAMES, height=HEIGHT, width=WIDTH, workers=0)
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", snr_shift_scale=3.0
    )
    tokens = len(tokenizer(FULL).input_ids)
    config = RunConfig.model_validate(run_of(configure, folder, request.param, text, tokens))
    weights_of(config, folder / "weights")
    assert run(config)
    out = folder / "transformer"
    assert main(["export", config.run_dir, "--format", "diffusers", "--out", str(out)]) == 0
    pipeline = diffusers.CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.T5EncoderModel.from_pretrained(text),
        vae=vae.eval(),
        transformer=diffusers.CogVideoXTransformer3DModel.from_pretrained(out),
        scheduler=scheduler,
    )
    pipeline.set_progress_bar_config(disable=True)
    trained = open_trained(config.directory)
    r = resolve(trained.config)
    shape = (trained.config.vae.latent_channels, r.latent_frames, r.latent_height, r.latent_width)
    return Pair(trained, pipeline, keys.normal(shape, 0, "sample", [0]))


def run_of(
    configure: Callable[..., RunConfig], folder: Path, positions: str, text: Path, tokens: int
) -> dict[str, Any]:
    """A step of a small CogVideoX, its diffusion the scheduler's."""
    sinusoids = {"relative_position": "none", "absolute_position": "sincos"} if positions == "sinusoids" else {}
    model = {
        **FAMILIES["cogvideox"], **sinusoids, "num_layers": 2, "width": 64, "num_heads": 2, "mlp_width": 256,
        "time_frequencies": 64, "time_width": 24,
    }  # fmt: skip
    config = configure(
        folder / "run",
        vae={"weights": str(folder / "vae")},
        data={"train": str(folder / "clips"), "num_frames": FRAMES, "height": HEIGHT, "width": WIDTH,
              "num_validation": 0},
        train={"steps": 1, "init_from": str(folder / "weights"), "precision": "fp32"},
    ).model_dump()  # fmt: skip
    return {
        **config,
        "model": model,
        "text": {"kind": "t5", "path": str(text), "max_tokens": tokens},
        "diffusion": {
            "path": "vp", "target": "v", "vp_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
            "snr_shift": 3.0, "zero_terminal_snr": True,
        },
        "sample": {"sampler": "ddim", "num_steps": STEPS, "guidance": 6.0},
    }  # fmt: skip


def weights_of(config: RunConfig, folder: Path) -> None:
    """Random weights to begin with: a model that has just begun draws next to nothing."""
    with torch.device("meta"):
        dit = DiT(config.model, 4, (1, 1, 1), 16)
    torch.manual_seed(1)
    folder.mkdir()
    weights = {
        f"dit.{name}": torch.randn(p.shape) / max(4, p[0].numel()) ** 0.5
        + float("norm" in name and name.endswith("weight"))
        for name, p in dit.named_parameters()
    }
    save_file(weights, folder / "model.safetensors")
    assert adopt_vae(config).vae.latent_channels == 4


def ours(pair: Pair, prompt: str, guidance: float) -> Tensor:
    """Whitened latents (1, C, T, H, W)."""
    t = pair.trained
    sampled = t.config.sample.model_copy(update={"guidance": guidance})
    config = t.config.model_copy(update={"sample": sampled})
    return draw_latents(config, t.step, t.model, t.text, [prompt], pair.noise)


def theirs(pair: Pair, guidance: float, output_type: str = "latent", **text: Any) -> Any:
    found = pair.pipeline(
        height=HEIGHT, width=WIDTH, num_frames=FRAMES, num_inference_steps=STEPS, guidance_scale=guidance,
        latents=pair.noise.transpose(1, 2), output_type=output_type,
        max_sequence_length=pair.trained.config.text.max_tokens, **text,
    )  # fmt: skip
    return found.frames


def same(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert 0.1 < float(expected.std()) < 10
    assert float((found - expected).abs().max()) <= 1e-4


def embeddings(pair: Pair, prompt: str) -> Tensor:
    text = pair.trained.text
    features: Tensor = text(text.tokenize([prompt])).features_BLD
    return features


@pytest.mark.parametrize("guidance", [1.0, 6.0])
def test_the_same_latents(pair: Pair, guidance: float) -> None:
    """Given our features of the caption and of the empty one, with the zeros that fill them."""
    prompt = "two cats"
    given = {"prompt_embeds": embeddings(pair, prompt), "negative_prompt_embeds": embeddings(pair, "")}
    assert not given["prompt_embeds"][0, -1].any(), "the caption is filled up"
    found = ours(pair, prompt, guidance)
    same(found, theirs(pair, guidance, **given).transpose(1, 2))
    assert float((ours(pair, FULL, guidance) - found).abs().max()) > 1e-2, "the caption matters"


def test_the_same_video_of_a_prompt(pair: Pair) -> None:
    """Text in, pixels out, without an embedding given: a caption that leaves no padding for T5 to see."""
    expected = torch.from_numpy(theirs(pair, 1.0, "np", prompt=FULL))
    step = pair.trained.step
    pixels = decode_clip(step.vae, step.vae.unwhiten(ours(pair, FULL, 1.0)), pair.trained.config.vae)
    found = rearrange((pixels / 2 + 0.5).clamp(0, 1), "b c t h w -> b t h w c")
    assert found.shape == expected.shape == (1, FRAMES, HEIGHT, WIDTH, 3)
    assert float(expected.std()) > 0.01
    assert float((found - expected).abs().max()) <= 1e-4


def test_what_differs_is_padding_that_t5_sees(pair: Pair) -> None:
    """The empty caption is nearly all padding: the pipeline's T5 attends to it, ours does not and gives zeros there."""
    tokens = pair.trained.text.tokenize([""])
    encoder = pair.pipeline.text_encoder
    with torch.no_grad():
        given = pair.pipeline.encode_prompt("", "", max_sequence_length=tokens.ids.shape[1])[0]
        seen = encoder(tokens.ids).last_hidden_state
        masked = encoder(tokens.ids, attention_mask=tokens.mask_BL.long()).last_hidden_state
    torch.testing.assert_close(given, seen)
    torch.testing.assert_close(embeddings(pair, ""), masked * tokens.mask_BL.unsqueeze(-1))
    assert float((seen - masked)[tokens.mask_BL].abs().max()) > 1e-3
