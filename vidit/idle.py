"""Options that have no effect: each acts only where others let it, and set elsewhere it is an error.

Whoever sets an option expects something of it. One that differs from its default and does not act is a typo
or a misunderstanding, and silence would hide it until the run is over. No torch.
"""

import json
from collections.abc import Callable, Iterator
from typing import NamedTuple

from vidit.config import RunConfig, Section
from vidit.overrides import flat


class Rule(NamedTuple):
    """Options, whole sections among them, with the condition under which they act, in code and in words."""

    options: tuple[str, ...]
    acts: Callable[[RunConfig], bool]
    needs: str


# An option is judged by the first rule that finds it idle.
RULES = (
    Rule(
        ("text", "model", "diffusion", "sample", "vae.weights", "vae.revision", "vae.kind",
         "data.cache_latents", "data.caption_dropout",
         "train.init_from", "train.trainable", "train.frozen",
         "train.num_time_bands", "train.sample_every", "parallel.sequence_kind", "parallel.ulysses",
         "parallel.sharded_norms", "parallel.schedule", "parallel.stages_per_rank"),
        lambda c: c.train.task != "vae", "train.task=dit or unet",
    ),
    Rule(("model", "parallel.sequence_kind", "parallel.ulysses", "parallel.sharded_norms", "parallel.schedule",
          "parallel.stages_per_rank"), lambda c: c.train.task == "dit", "train.task=dit"),
    Rule(("unet",), lambda c: c.train.task == "unet", "train.task=unet"),
    Rule(("unet.temporal_convs", "unet.temporal_conv_time", "unet.temporal_attention", "unet.temporal_position"),
         lambda c: c.unet.temporal != "none", "unet.temporal=identity or mixed"),
    Rule(("unet.temporal_conv_time",), lambda c: c.unet.temporal_convs > 1, "unet.temporal_convs above 1"),
    Rule(("unet.temporal_position",), lambda c: "self" in c.unet.temporal_attention, "self in unet.temporal_attention"),
    Rule(("unet.head_dim",), lambda c: c.unet.num_heads == 0, "unet.num_heads=0"),
    Rule(("vae.kind", "vae.revision"), lambda c: bool(c.vae.weights), "vae.weights"),
    Rule(("vae.strides",), lambda c: c.vae.is_borrowed, "a folder of diffusers as vae.weights"),
    Rule(("vae.half_weights", "vae.l1_weight", "vae.l2_weight", "vae.kl_weight"),
         lambda c: c.train.task == "vae" or bool(c.vae.weights), "train.task=vae"),
    Rule(("vae_train",), lambda c: c.train.task == "vae", "train.task=vae"),
    Rule(("vae_train.inflate", "vae_train.freeze_encoder"), lambda c: bool(c.vae_train.init), "vae_train.init"),
    Rule(("vae.kl_weight",), lambda c: not c.vae_train.freeze_encoder,
         "an encoder that is trained (vae_train.freeze_encoder=false)"),
    Rule(("vae_train.perceptual_weight", "vae_train.perceptual_files"), lambda c: c.vae_train.perceptual != "none",
         "vae_train.perceptual=lpips or features"),
    Rule(
        ("vae_train.adversarial_loss", "vae_train.adversarial_start", "vae_train.adaptive",
         "vae_train.discriminator_channels", "vae_train.discriminator_layers", "vae_train.discriminator_rate",
         "vae_train.discriminator_betas", "vae_train.r1_weight", "vae_train.lecam_weight", "vae_train.lecam_decay"),
        lambda c: c.vae_train.adversarial_weight > 0, "vae_train.adversarial_weight above 0",
    ),
    Rule(("vae_train.lecam_decay",), lambda c: c.vae_train.lecam_weight > 0, "vae_train.lecam_weight above 0"),
    Rule(("vae.norm_groups",), lambda c: c.vae.norm == "group", "vae.norm=group"),
    Rule(("vae.max_frames", "vae.tile"), lambda c: c.train.task != "vae" and c.parallel.vae_context == "none",
         "train.task=dit or unet, and parallel.vae_context=none"),
    Rule(("vae.max_frames",), lambda c: c.vae.kind in ("causal", "AutoencoderKL"),
         "a VAE that can be told: the video classes of diffusers code in batches of frames of their own"),
    Rule(("vae.tile_overlap", "parallel.vae_context"), lambda c: not c.vae.is_borrowed,
         "a VAE of this project: a class of diffusers is coded whole, or in its own tiles (vae.tile)"),
    Rule(("vae.tile_overlap",), lambda c: c.vae.tile > 0, "vae.tile"),
    Rule(("text",), lambda c: c.denoiser.reads_text,
         "a model that reads captions (model.cross_attention or pooled_text; the same of unet)"),
    Rule(("text.path", "text.revision"), lambda c: c.text.kind != "bytes",
         "a pretrained text.kind (t5, umt5, clip, llama)"),
    Rule(("text.template", "text.hidden_layer"), lambda c: c.text.kind == "llama", "text.kind=llama"),
    Rule(("text.width", "text.num_layers", "text.num_heads", "text.hash_buckets"),
         lambda c: c.text.kind == "bytes", "text.kind=bytes"),
    Rule(("text.second.path", "text.second.revision", "text.second.max_tokens"), lambda c: c.text.has_second,
         "text.second.kind=t5, umt5 or clip"),
    Rule(("text.second.kind",), lambda c: c.train.task == "dit", "train.task=dit: a U-Net reads one encoder"),
    Rule(("text.second.kind",), lambda c: c.model.pooled_text or c.model.interleaves_text,
         "model.pooled_text=true or model.cross_text=interleaved"),
    Rule(("model.cross_text",), lambda c: c.text.has_second, "a second encoder (text.second)"),
    Rule(("model.cross_keys", "model.cross_norm", "model.cross_text"),
         lambda c: c.model.cross_attention in ("per_frame", "all"), "model.cross_attention=per_frame or all"),
    Rule(("model.text_embedding", "model.num_refiner_layers", "model.text_padding"),
         lambda c: c.model.cross_attention != "none", "a model.cross_attention"),
    Rule(("model.position_scale",), lambda c: c.model.absolute_position in ("sincos", "space", "space_then_time"),
         "model.absolute_position=sincos, space or space_then_time"),
    Rule(("model.position_span",), lambda c: c.model.absolute_position in ("space", "space_then_time"),
         "model.absolute_position=space or space_then_time"),
    Rule(("model.motion_free", "sample.motion_guidance"), lambda c: c.model.temporal_attention,
         "model.temporal_attention=true"),
    Rule(("sample.motion_guidance",), lambda c: c.model.motion_free > 0, "a model that learned it (model.motion_free)"),
    Rule(("model.frame_times", "model.given_channels"), lambda c: bool(c.diffusion.given), "diffusion.given"),
    Rule(("diffusion.given",), lambda c: c.model.frame_times or c.model.given_channels,
         "model.frame_times=true or model.given_channels=true"),
    Rule(("model.pooled_embedding", "model.pooled_width"), lambda c: c.model.pooled_text, "model.pooled_text=true"),
    Rule(("model.rope_split", "model.rope_theta"), lambda c: c.model.relative_position == "rope",
         "model.relative_position=rope"),
    Rule(("model.mlp_norm_eps",), lambda c: c.model.num_double_layers > 0,
         "a block that is not single-stream (model.num_single_layers below num_layers)"),
    Rule(("model.adaln_rank",), lambda c: c.model.modulation == "projected", "model.modulation=projected"),
    Rule(("model.image_attention",), lambda c: any(c.model.window(n)[0] != 1 for n in range(c.model.num_layers)),
         "a window in model.windows that spans latent frames"),
    Rule(
        ("diffusion.vp_schedule", "diffusion.beta_start", "diffusion.beta_end", "diffusion.num_train_steps",
         "diffusion.zero_terminal_snr", "diffusion.snr_shift"),
        lambda c: c.diffusion.path == "vp", "diffusion.path=vp",
    ),
    Rule(("diffusion.beta_start", "diffusion.beta_end"), lambda c: c.diffusion.vp_schedule != "cosine",
         "diffusion.vp_schedule=linear or scaled_linear"),
    Rule(("diffusion.sigma_data", "diffusion.sigma_min", "diffusion.sigma_max"),
         lambda c: c.diffusion.path == "edm", "diffusion.path=edm"),
    Rule(("diffusion.density_mean", "diffusion.density_std"), lambda c: c.diffusion.density != "uniform",
         "diffusion.density=logit_normal or log_normal"),
    Rule(("diffusion.shift_value",), lambda c: c.diffusion.shift != "none", "a diffusion.shift"),
    Rule(("diffusion.min_snr_gamma",), lambda c: c.diffusion.weighting == "min_snr", "diffusion.weighting=min_snr"),
    Rule(("data.packed_tokens",), lambda c: c.train.task == "dit", "train.task=dit"),
    Rule(("data.packed_tokens", "data.longest_first"), lambda c: bool(c.data.buckets),
         "data.buckets (`vidit data shapes` lists those of a data set)"),
    Rule(("data.validation",), lambda c: c.data.num_validation > 0, "data.num_validation above 0"),
    Rule(("data.prefetch",), lambda c: c.data.num_workers > 0, "data.num_workers above 0"),
    Rule(("data.shuffle_buffer",), lambda c: c.data.streaming, "data.streaming=true"),
    Rule(("data.cache_dir", "data.stall_s", "data.patience_s"), lambda c: c.data.is_remote,
         "a URL as data.train or data.validation"),
    Rule(("data.cache_dir",), lambda c: not c.data.streaming or "://" in (c.data.validation or ""),
         "a data set that is read more than once (data.streaming=false, or a URL as data.validation)"),
    Rule(("data.cache_gib",), lambda c: bool(c.data.cache_dir), "data.cache_dir"),
    Rule(("train.muon_momentum",), lambda c: c.train.optimizer == "muon", "train.optimizer=muon"),
    Rule(("train.final_learning_rate",), lambda c: c.train.schedule == "cosine", "train.schedule=cosine"),
    Rule(("train.spike_factor", "train.spike_window"), lambda c: c.train.on_spike != "ignore",
         "train.on_spike=stop, skip or roll_back"),
    Rule(("train.roll_back_checkpoints",), lambda c: c.train.rolls_back,
         "train.on_nonfinite=roll_back or train.on_spike=roll_back"),
    Rule(("train.max_recoveries", "train.recovery_window"), lambda c: c.train.recovers,
         "a train.on_nonfinite or train.on_spike that skips or rolls back"),
    Rule(("launch.max_restarts",), lambda c: c.launch.local > 1, "launch.local above 1"),
    Rule(("parallel.hang_floor_s",), lambda c: c.parallel.hang_factor > 0, "a parallel.hang_factor above 0"),
    Rule(("parallel.sequence_kind", "parallel.vae_context"), lambda c: c.parallel.sequence > 1,
         "parallel.sequence above 1"),
    Rule(("parallel.ulysses",), lambda c: c.parallel.sequence_kind == "ulysses_ring",
         "parallel.sequence_kind=ulysses_ring"),
    Rule(("parallel.sharded_norms",), lambda c: c.parallel.tensor > 1, "parallel.tensor above 1"),
    Rule(("parallel.schedule",), lambda c: c.parallel.pipeline > 1, "parallel.pipeline above 1"),
    Rule(("parallel.stages_per_rank",), lambda c: c.parallel.schedule in ("interleaved", "zero_bubble"),
         "parallel.schedule=interleaved or zero_bubble"),
    Rule(("train.sample_every",), lambda c: bool(c.sample.prompts), "sample.prompts"),
    Rule(("sample.guidance_rescale",), lambda c: c.sample.guidance != 1, "a sample.guidance other than 1"),
    Rule(("sample.reconstruction_guidance",), lambda c: not (c.model.frame_times or c.model.given_channels),
         "a model that is not told what frames are given (frame_times=false, given_channels=false)"),
)  # fmt: skip


def idle_faults(c: RunConfig) -> Iterator[str]:
    """One line for each rule that is broken, with every option that breaks it."""
    given, default = flat(c), flat(RunConfig(name="default"))
    told: set[str] = set()
    for rule in RULES:
        if rule.acts(c):
            continue
        idle = [
            name for name in given if given[name] != default[name] and name not in told and _names(rule.options, name)
        ]
        told.update(idle)
        if idle:
            shown = ", ".join(f"{name}={_shown(given[name])}" for name in idle)
            verb, it = ("has", "it") if len(idle) == 1 else ("have", "them")
            yield f"{shown} {verb} no effect without {rule.needs}; leave {it} out or set that"


def _names(options: tuple[str, ...], name: str) -> bool:
    return name in options or name.partition(".")[0] in options


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=Section.model_dump)
