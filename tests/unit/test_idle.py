"""Options that have no effect: each is refused where it does not act, and accepted where it does."""

import pytest

from vidit.config import RunConfig
from vidit.idle import RULES, idle_faults
from vidit.overrides import apply_overrides, field_names

VAE, VP, EDM = "train.task=vae", "diffusion.path=vp", "diffusion.path=edm"
UNET = "train.task=unet"
JUDGED = "vae_train.adversarial_weight=1"
BLIND = "model.cross_attention=none"
BUCKETS = 'data.buckets=[{"num_frames":1,"height":8,"width":8}]'
TWO = ["text.kind=t5", "text.second.kind=clip"]
# option, others that leave it idle, others that let it act
CASES = [
    ("text.max_tokens=8", [VAE], []),
    ("model.num_layers=2", [VAE], []),
    ("model.num_layers=2", [UNET], []),
    ("parallel.sharded_norms=true", [UNET], ["parallel.tensor=2"]),
    ("train.init_from=x", [VAE], [UNET]),
    ('train.trainable=["*"]', [VAE], [UNET]),
    ('train.frozen=["*"]', [VAE], []),
    ("unet.channels=32", [], [UNET]),
    ("unet.temporal_convs=3", [UNET, "unet.temporal=none"], [UNET]),
    ("unet.temporal_conv_time=false", [UNET, "unet.temporal_convs=1"], [UNET]),
    ("unet.temporal_position=bias", [UNET, 'unet.temporal_attention=["mlp"]'], [UNET]),
    ("unet.head_dim=32", [UNET, "unet.num_heads=8"], [UNET]),
    ("text.num_layers=1", [UNET, "unet.cross_attention=false"], [UNET]),
    ("diffusion.path=vp", [VAE], [UNET]),
    ('sample.prompts=["a"]', [VAE], []),
    ("sample.num_steps=3", [VAE], []),
    ("vae.weights=x", [VAE], []),
    ("data.cache_latents=true", [VAE], []),
    ("data.caption_dropout=0.2", [VAE], []),
    ("train.num_time_bands=3", [VAE], []),
    ("vae.l2_weight=1", [], [VAE]),
    ("vae.half_weights=true", [], [VAE]),
    ("vae.kl_weight=0.1", [VAE, "vae_train.init=x", "vae_train.freeze_encoder=true"], [VAE]),
    ("vae_train.wavelet_weight=0.1", [], [VAE]),
    ("vae_train.init=x", [], [VAE]),
    ("vae_train.perceptual=lpips", [], [VAE]),
    ("vae_train.adversarial_weight=1", [], [VAE]),
    ("vae_train.inflate=true", [VAE], [VAE, "vae_train.init=x"]),
    ("vae_train.freeze_encoder=true", [VAE], [VAE, "vae_train.init=x"]),
    ("vae_train.perceptual_weight=2", [VAE], [VAE, "vae_train.perceptual=lpips"]),
    ('vae_train.perceptual_files=["x"]', [VAE], [VAE, "vae_train.perceptual=features"]),
    ("vae_train.adversarial_loss=non_saturating", [VAE], [VAE, JUDGED]),
    ("vae_train.adversarial_start=5", [VAE], [VAE, JUDGED]),
    ("vae_train.adaptive=false", [VAE], [VAE, JUDGED]),
    ("vae_train.discriminator_channels=8", [VAE], [VAE, JUDGED]),
    ("vae_train.discriminator_layers=2", [VAE], [VAE, JUDGED]),
    ("vae_train.discriminator_rate=2", [VAE], [VAE, JUDGED]),
    ("vae_train.discriminator_betas=[0, 0.9]", [VAE], [VAE, JUDGED]),
    ("vae_train.r1_weight=1", [VAE], [VAE, JUDGED]),
    ("vae_train.lecam_weight=1", [VAE], [VAE, JUDGED]),
    ("vae_train.lecam_decay=0.9", [VAE, JUDGED], [VAE, JUDGED, "vae_train.lecam_weight=1"]),
    ("vae.kind=AutoencoderKL", [], ["vae.weights=x"]),
    ("vae.strides=[4,8]", [], ["vae.weights=x", "vae.kind=AutoencoderKLWan"]),
    ("vae.max_frames=8", ["vae.weights=x", "vae.kind=AutoencoderKLWan"], ["vae.weights=x", "vae.kind=AutoencoderKL"]),
    ("vae.tile_overlap=8", ["vae.weights=x", "vae.kind=AutoencoderKL", "vae.tile=64"], ["vae.tile=64"]),
    ("vae.revision=x", [], ["vae.weights=x"]),
    ("vae.norm_groups=8", [], ["vae.norm=group"]),
    ("vae.max_frames=8", [VAE], []),
    ("vae.tile=64", ["parallel.sequence=2", "parallel.vae_context=time"], []),
    ("vae.tile_overlap=8", [], ["vae.tile=64"]),
    ("text.num_layers=1", [BLIND], [BLIND, "model.pooled_text=true"]),
    ("text.path=x", [], ["text.kind=t5"]),
    ("text.revision=x", [], ["text.kind=t5"]),
    ("text.width=32", ["text.kind=t5"], []),
    ("text.hash_buckets=32", ["text.kind=clip"], []),
    ('text.template="say {}"', ["text.kind=t5"], ["text.kind=llama"]),
    ("text.hidden_layer=-3", ["text.kind=t5"], ["text.kind=llama"]),
    ("text.second.path=x", [], [*TWO, "model.pooled_text=true"]),
    ("text.second.max_tokens=9", [], [*TWO, "model.pooled_text=true"]),
    ("text.second.kind=clip", ["text.kind=t5"], ["text.kind=t5", "model.pooled_text=true"]),
    (
        "text.second.kind=clip",
        ["text.kind=t5", "train.task=unet", "model.pooled_text=true"],
        ["model.pooled_text=true"],
    ),
    ("text.second.kind=umt5", ["text.kind=t5"], ["model.cross_text=interleaved"]),
    ("model.cross_text=interleaved", [], TWO),
    ("model.cross_keys=text", [BLIND, "model.pooled_text=true"], []),
    ("model.cross_norm=affine", [BLIND, "model.pooled_text=true"], []),
    ("model.text_padding=seen", [BLIND, "model.pooled_text=true"], []),
    ("model.text_embedding=linear", [BLIND, "model.pooled_text=true"], []),
    ("model.num_refiner_layers=2", [BLIND, "model.pooled_text=true"], ["model.text_embedding=linear"]),
    ("model.pooled_embedding=mlp", [], ["model.pooled_text=true"]),
    ("model.pooled_width=8", [], ["model.pooled_text=true"]),
    ("model.rope_theta=256", [], ["model.relative_position=rope"]),
    ("model.position_scale=[1,2,2]", [], ["model.absolute_position=sincos"]),
    ("model.position_span=4", [], ["model.absolute_position=space_then_time"]),
    ("model.position_span=4", [], ["model.absolute_position=space"]),
    ("model.motion_free=0.5", [], ["model.temporal_attention=true"]),
    ("sample.motion_guidance=1.2", [], ["model.temporal_attention=true", "model.motion_free=0.5"]),
    (
        "sample.motion_guidance=1.3",
        ["model.temporal_attention=true"],
        ["model.temporal_attention=true", "model.motion_free=0.5"],
    ),
    ("model.given_channels=true", [], ['diffusion.given=[{"kind":"random","share":0.5}]']),
    ("model.frame_times=true", [], ['diffusion.given=[{"kind":"random","share":0.5}]']),
    ('diffusion.given=[{"kind":"random","share":0.5}]', [], ["model.frame_times=true"]),
    ("model.rope_split=third", [], ["model.relative_position=rope"]),
    ("model.mlp_norm_eps=1e-5", ["model.num_layers=4", "model.num_single_layers=4"], []),
    ("model.adaln_rank=3", ["model.modulation=table"], []),
    ("model.image_attention=frame", ["model.windows=[[1,0,0]]"], ["model.windows=[[1,0,0]]", "model.full_ends=1"]),
    ("diffusion.vp_schedule=cosine", [], [VP]),
    ("diffusion.beta_start=0.001", [], [VP]),
    ("diffusion.beta_end=0.03", [VP, "diffusion.vp_schedule=cosine"], [VP, "diffusion.vp_schedule=scaled_linear"]),
    ("diffusion.num_train_steps=500", [EDM], [VP]),
    ("diffusion.zero_terminal_snr=false", [], [VP]),
    ("diffusion.snr_shift=3", [], [VP]),
    ("diffusion.sigma_data=0.5", [], [EDM]),
    ("diffusion.sigma_min=0.1", [], [EDM]),
    ("diffusion.sigma_max=70", [VP], [EDM]),
    ("diffusion.density_mean=1", ["diffusion.density=uniform"], []),
    ("diffusion.density_std=2", ["diffusion.density=uniform"], [EDM, "diffusion.density=log_normal"]),
    ("diffusion.shift_value=3", [], ["diffusion.shift=constant"]),
    ("diffusion.min_snr_gamma=3", [], ["diffusion.weighting=min_snr"]),
    ("data.packed_tokens=9", [VAE, BUCKETS], [BUCKETS]),
    ("data.packed_tokens=9", [], [BUCKETS]),
    ("data.longest_first=true", [], [BUCKETS]),
    ("data.validation=x", ["data.num_validation=0"], []),
    ("data.prefetch=8", ["data.num_workers=0"], []),
    ("data.prefetch=9", ["data.num_workers=0"], []),
    ("data.shuffle_buffer=9", [], ["data.streaming=true"]),
    ("data.cache_dir=x", ["data.train=a"], ["data.train=https://a/b"]),
    ("data.cache_dir=x", ["data.train=https://a/b.tar", "data.streaming=true"], ["data.train=https://a/b"]),
    ("data.stall_s=9", ["data.train=a.txt"], ["data.train=a.txt", "data.streaming=true"]),
    ("data.stall_s=2", ["data.train=a"], ["data.train=a", "data.validation=s3://a/b"]),
    ("data.patience_s=2", ["data.train=a"], ["data.train=gs://a/b"]),
    ("data.cache_gib=2", ["data.train=https://a/b"], ["data.train=https://a/b", "data.cache_dir=x"]),
    ("train.muon_momentum=0.9", [], ["train.optimizer=muon"]),
    ("train.final_learning_rate=0.1", [], ["train.schedule=cosine"]),
    ("parallel.sequence_kind=ring", [], ["parallel.sequence=2"]),
    ("parallel.vae_context=time", [], ["parallel.sequence=2"]),
    ("parallel.ulysses=2", ["parallel.sequence=4"], ["parallel.sequence=4", "parallel.sequence_kind=ulysses_ring"]),
    ("parallel.sharded_norms=true", [], ["parallel.tensor=2"]),
    ("parallel.schedule=gpipe", [], ["parallel.pipeline=2"]),
    ("parallel.stages_per_rank=2", ["parallel.pipeline=2"], ["parallel.pipeline=2", "parallel.schedule=interleaved"]),
    ("train.spike_factor=5", [], ["train.on_spike=stop"]),
    ("train.roll_back_checkpoints=2", ["train.on_nonfinite=skip"], ["train.on_spike=roll_back"]),
    ("train.max_recoveries=9", ["train.on_spike=stop"], ["train.on_nonfinite=skip"]),
    ("launch.max_restarts=3", [], ["launch.local=2"]),
    ("parallel.hang_floor_s=9", ["parallel.hang_factor=0"], []),
    ("train.sample_every=5", [], ['sample.prompts=["a"]']),
    ("sample.guidance_rescale=0.7", ["sample.guidance=1"], []),
    ("sample.reconstruction_guidance=9", ["model.frame_times=true"], []),
]


def idle(*overrides):
    return list(idle_faults(apply_overrides(RunConfig(name="a"), overrides)))


def about(found, option):
    return [line for line in found if option.partition("=")[0] + "=" in line]


@pytest.mark.parametrize(("option", "off", "on"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_an_option_that_does_not_act_is_refused_and_one_that_acts_is_not(option, off, on):
    (line,) = about(idle(option, *off), option)
    assert " no effect without " in line
    assert about(idle(option, *on), option) == []


def test_every_rule_has_a_case():
    """So that a rule that never fires, or always does, is found."""
    covered = {option.partition("=")[0] for option, _, _ in CASES}
    for rule in RULES:
        fields = [n for n in field_names() if n in rule.options or n.partition(".")[0] in rule.options]
        assert len(fields) >= len(rule.options), f"{rule.options} names what does not exist"
        assert covered & set(fields), rule.options


def test_the_defaults_are_silent():
    assert idle() == []
    assert idle("train.task=vae") == []
    assert idle("train.task=unet") == []


def test_one_line_for_all_that_one_rule_refuses():
    (line,) = idle("diffusion.snr_shift=3", "diffusion.beta_end=0.03")
    assert line == (
        "diffusion.beta_end=0.03, diffusion.snr_shift=3.0 have no effect without diffusion.path=vp; leave them out or "
        "set that"
    )


def test_an_option_is_told_once():
    found = idle("text.path=x", "train.task=vae")
    assert len(found) == 1
    assert found[0].startswith("text.path=x has no effect without train.task=dit or unet; ")
