"""Models of ours in the pipelines of diffusers: from the same noise and caption they draw the same video.

Everything in a pipeline is of the real classes, small and with random weights, and so is what our run borrows: the text
encoder and the VAE. Only the transformer is ours.
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

from tests.text_models import save_text_models, tiny_model
from vidit import keys
from vidit.cli import main
from vidit.config import FAMILIES, RunConfig
from vidit.data.scene_pack import pack_scenes
from vidit.model.context import EVERY_FRAME
from vidit.model.dit import DiT
from vidit.resolve import resolve
from vidit.sample.draw import draw_latents
from vidit.sample.run import TrainedRun, open_trained
from vidit.train.run import run
from vidit.train.step import row_text
from vidit.vae.coding import decode_clip

diffusers: Any = pytest.importorskip("diffusers")
transformers: Any = pytest.importorskip("transformers")

FRAMES, HEIGHT, WIDTH, STEPS = 9, 32, 48, 10
FULL = "a red cube slides left"
LLAMA_TOKENS = 24
CLIP_TOKENS, CLIP_WIDTH = 24, 12
MODEL = {"num_layers": 2, "width": 64, "num_heads": 2, "mlp_width": 256}
VAE = {
    "block_out_channels": (4, 4, 4, 4), "norm_num_groups": 2, "latent_channels": 4, "layers_per_block": 1,
    "scaling_factor": 0.7,
}  # fmt: skip
COG = {**FAMILIES["cogvideox"], **MODEL, "time_frequencies": 64, "time_width": 24}
COG_DIFFUSION = {
    "path": "vp", "target": "v", "vp_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
    "snr_shift": 3.0, "zero_terminal_snr": True,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "cogvideox": COG,
    "cogvideox, sinusoids": {**COG, "relative_position": "none", "absolute_position": "sincos"},
    "hunyuanvideo": {**FAMILIES["hunyuanvideo"], **MODEL, "num_layers": 3, "num_single_layers": 1, "guidance": 4.0},
}
COGS = [name for name in MODELS if "cogvideox" in name]


class Pair(NamedTuple):
    """A run of ours and the pipeline that has its transformer."""

    trained: TrainedRun
    pipeline: Any
    noise: Tensor

    @property
    def llama(self) -> dict[str, Any]:
        """What the pipeline is told to take of its language model; how many tokens to cut it counts itself."""
        text = self.trained.config.text
        return {"prompt_template": {"template": text.template}, "max_sequence_length": text.max_tokens}

    @property
    def is_hunyuan(self) -> bool:
        return isinstance(self.pipeline, diffusers.HunyuanVideoPipeline)


@pytest.fixture(scope="module", params=MODELS)
def pair(
    request: pytest.FixtureRequest, configure: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> Pair:
    folder, hunyuan = tmp_path_factory.mktemp("pipeline"), request.param == "hunyuanvideo"
    texts = save_text_models(folder / "text")
    text = texts["llama" if hunyuan else "t5"]
    tiny_model("clip", CLIP_WIDTH).save_pretrained(texts["clip"])
    torch.manual_seed(3)
    vae = (diffusers.AutoencoderKLHunyuanVideo if hunyuan else diffusers.AutoencoderKLCogVideoX)(**VAE).eval()
    vae.save_pretrained(folder / "vae")
    pack_scenes(folder / "clips", 4, "train", 0, num_frames=FRAMES, height=HEIGHT, width=WIDTH, workers=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(text)
    base = configure(
        folder / "run",
        vae={"weights": str(folder / "vae")},
        data={
            "train": str(folder / "clips"), "num_frames": FRAMES, "height": HEIGHT, "width": WIDTH, "num_validation": 0
        },
        train={"steps": 1, "init_from": str(folder / "weights"), "precision": "fp32"},
    ).model_dump()  # fmt: skip
    config = RunConfig.model_validate(
        {
            **base,
            "model": MODELS[request.param],
            "text": {
                "path": str(text),
                **(two_encoders(texts["clip"]) if hunyuan else one_encoder(tokenizer)),
            },
            "diffusion": {"shift": "constant", "shift_value": 7.0} if hunyuan else COG_DIFFUSION,
            "sample": {"sampler": "euler" if hunyuan else "ddim", "num_steps": STEPS},
        }
    )
    weights_of(config, folder / "weights")
    assert run(config)
    out = folder / "transformer"
    assert main(["export", config.run_dir, "--format", "diffusers", "--out", str(out)]) == 0
    pipeline = (hunyuan_pipeline if hunyuan else cog_pipeline)(vae, out, text, tokenizer)
    pipeline.set_progress_bar_config(disable=True)
    trained = open_trained(config.directory)
    r = resolve(trained.config)
    shape = (trained.config.vae.latent_channels, r.latent_frames, r.latent_height, r.latent_width)
    return Pair(trained, pipeline, keys.normal(shape, 0, "sample", [0]))


def one_encoder(tokenizer: Any) -> dict[str, Any]:
    return {"kind": "t5", "max_tokens": len(tokenizer(FULL).input_ids)}


def two_encoders(clip: Path) -> dict[str, Any]:
    """HunyuanVideo's, by the template and the layer that its pipeline takes."""
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

    return {
        "kind": "llama", "max_tokens": LLAMA_TOKENS, "template": DEFAULT_PROMPT_TEMPLATE["template"],
        "hidden_layer": -3, "second": {"kind": "clip", "path": str(clip), "max_tokens": CLIP_TOKENS},
    }  # fmt: skip


def weights_of(config: RunConfig, folder: Path) -> None:
    """Random weights to begin with: a model that has just begun draws next to nothing."""
    with torch.device("meta"):
        second = CLIP_WIDTH if config.text.has_second else 0
        dit = DiT(config.model, VAE["latent_channels"], (1, 1, 1), 16, second)
    torch.manual_seed(1)
    folder.mkdir()
    weights = {
        f"dit.{name}": torch.randn(p.shape) / max(4, p[0].numel()) ** 0.5
        + float("norm" in name and name.endswith("weight"))
        for name, p in dit.named_parameters()
    }
    save_file(weights, folder / "model.safetensors")


def cog_pipeline(vae: Any, transformer: Path, text: Path, tokenizer: Any) -> Any:
    return diffusers.CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.T5EncoderModel.from_pretrained(text),
        vae=vae,
        transformer=diffusers.CogVideoXTransformer3DModel.from_pretrained(transformer),
        scheduler=diffusers.CogVideoXDDIMScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", snr_shift_scale=3
        ),
    )


def hunyuan_pipeline(vae: Any, transformer: Path, text: Path, tokenizer: Any) -> Any:
    clip, tokenizer.pad_token = text.parent / "clip", tokenizer.eos_token
    return diffusers.HunyuanVideoPipeline(
        text_encoder=transformers.LlamaModel.from_pretrained(text),
        tokenizer=tokenizer,
        text_encoder_2=transformers.CLIPTextModel.from_pretrained(clip),
        tokenizer_2=transformers.CLIPTokenizer.from_pretrained(clip),
        vae=vae,
        transformer=diffusers.HunyuanVideoTransformer3DModel.from_pretrained(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


def ours(pair: Pair, prompt: str, guidance: float) -> Tensor:
    """Whitened latents (1, C, T, H, W)."""
    t = pair.trained
    sampled = t.config.sample.model_copy(update={"guidance": guidance})
    config = t.config.model_copy(update={"sample": sampled})
    return draw_latents(config, t.step, t.model, t.text, [prompt], pair.noise)


def theirs(pair: Pair, guidance: float, output_type: str = "latent", **text: Any) -> Tensor:
    """Latents (1, C, T, H, W), or pixels (1, T, H, W, 3) in [0, 1]."""
    if pair.is_hunyuan:  # what it calls guidance_scale is what a distilled model is told
        sizes = {"true_cfg_scale": guidance, "guidance_scale": pair.trained.config.model.guidance}
    else:
        sizes = {"guidance_scale": guidance, "max_sequence_length": pair.trained.config.text.max_tokens}
    noise = pair.noise if pair.is_hunyuan else pair.noise.transpose(1, 2)
    found = pair.pipeline(
        height=HEIGHT, width=WIDTH, num_frames=FRAMES, num_inference_steps=STEPS, latents=noise.clone(),
        output_type=output_type, **sizes, **text,
    ).frames  # fmt: skip
    if output_type == "np":
        return torch.from_numpy(found)
    latents: Tensor = found if pair.is_hunyuan else found.transpose(1, 2)
    return latents


def features(pair: Pair, prompt: str, negative: str) -> dict[str, Tensor]:
    """Of both captions by our encoder, as the pipeline takes them; zeros fill them."""
    given, text = {}, pair.trained.text
    for prefix, caption in (("", prompt), ("negative_", negative)):
        found = row_text(text(text.tokenize([caption])), 1, 1)
        given[f"{prefix}prompt_embeds"] = found.features_BLE
        if pair.is_hunyuan:  # the pooled caption by their CLIP, from the words
            given[f"{prefix}pooled_prompt_embeds"] = clip_of(pair, caption)
            given[f"{prefix}prompt_attention_mask"] = (found.frame_BL == EVERY_FRAME).long()
    return given


def clip_of(pair: Pair, caption: str) -> Tensor:
    """The pooled caption by their CLIP, which has fewer positions here than the pipeline asks for by itself."""
    pooled: Tensor = pair.pipeline._get_clip_prompt_embeds(caption, max_sequence_length=CLIP_TOKENS)
    return pooled


def same(found: Tensor, expected: Tensor, least: float = 0.1) -> None:
    assert found.shape == expected.shape
    assert least < float(expected.std()) < 10
    assert float((found - expected).abs().max()) <= 1e-4


def pixels(pair: Pair, latents: Tensor) -> Tensor:
    """(1, T, H, W, 3) in [0, 1]."""
    step = pair.trained.step
    decoded = decode_clip(step.vae, step.vae.unwhiten(latents), pair.trained.config.vae)
    return rearrange((decoded / 2 + 0.5).clamp(0, 1), "b c t h w -> b t h w c")


@pytest.mark.parametrize("guidance", [1.0, 6.0])
def test_the_same_latents_and_video(pair: Pair, guidance: float) -> None:
    given = features(pair, "two cats", "")
    assert not given["prompt_embeds"][0, -1].any(), "the caption is filled up"
    found = ours(pair, "two cats", guidance)
    same(found, theirs(pair, guidance, **given))
    same(pixels(pair, found), theirs(pair, guidance, "np", **given), least=0.01)
    assert float((ours(pair, FULL, guidance) - found).abs().max()) > 1e-2, "the caption matters"


@pytest.mark.parametrize("pair", COGS, indirect=True)
def test_text_in_pixels_out(pair: Pair) -> None:
    """Without an embedding given: a caption that leaves no padding for T5 to see."""
    same(pixels(pair, ours(pair, FULL, 1.0)), theirs(pair, 1.0, "np", prompt=FULL), least=0.01)


@pytest.mark.parametrize("pair", ["hunyuanvideo"], indirect=True)
def test_words_by_their_language_model(pair: Pair) -> None:
    """Template, layer and cut are the pipeline's; the empty caption and padding, whose features it keeps, included."""
    given = {"prompt": "two cats", "pooled_prompt_embeds": clip_of(pair, "two cats"), **pair.llama}
    empty = {"negative_prompt": "", "negative_pooled_prompt_embeds": clip_of(pair, "")}
    same(ours(pair, "two cats", 6.0), theirs(pair, 6.0, **given, **empty))


@pytest.mark.parametrize("pair", COGS, indirect=True)
def test_what_differs_is_padding_that_t5_sees(pair: Pair) -> None:
    """The empty caption is nearly all padding: the pipeline lets T5 attend to it, ours gives zeros there."""
    tokens = pair.trained.text.tokenize([""])
    encoder = pair.pipeline.text_encoder
    with torch.no_grad():
        given = pair.pipeline.encode_prompt("", "", max_sequence_length=tokens.ids.shape[1])[0]
        seen = encoder(tokens.ids).last_hidden_state
        masked = encoder(tokens.ids, attention_mask=tokens.mask_BL.long()).last_hidden_state
    torch.testing.assert_close(given, seen)
    torch.testing.assert_close(features(pair, "", "")["prompt_embeds"], masked * tokens.mask_BL.unsqueeze(-1))
    assert float((seen - masked)[tokens.mask_BL].abs().max()) > 1e-3
