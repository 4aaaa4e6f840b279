"""Autoencoders: a small one that a laptop trains, and how the recipes of the field read here."""

from vidit.config import Data, RunConfig, Train, Vae, VaeTrain

FEATURES = "configs/weights/scene_features/model.safetensors"


def tiny16() -> RunConfig:
    """A 4x8x8 VAE with 16 channels on procedural clips of 9 frames of 64x64.

    Small batches: at this size a step of 4 clips teaches as much as one of 8. Wavelets in front do the work of a layer.

    Command:   vidit scenes runs/tiny16/data --clips 3000 --odds 1 1 1 && vidit train configs.vae:tiny16
    Hardware:  1 CPU core
    Time:      8 minutes, on a busy machine
    Result:    27.0 dB, SSIM 0.75 on unseen scenes (benchmarks/results/2026-11-27-vae-tiny16.json)
    """
    return RunConfig(
        name="tiny16",
        vae=Vae(
            fold="haar",
            patch=2,
            latent_channels=16,
            base_channels=16,
            multipliers=(1, 2, 4),
            num_res_blocks=(0, 1, 1),
            decoder_res_blocks=(1, 2, 2),
            spatial_down=(True, True),
            temporal_down=(True, True),
            l2_weight=1.0,
        ),
        data=Data(train="runs/tiny16/data", num_validation=32, num_frames=9, height=64, width=64, num_workers=0),
        train=Train(
            task="vae",
            steps=1500,
            global_batch=4,
            micro_batch=4,
            learning_rate=3e-3,
            warmup_steps=50,
            schedule="cosine",
            ema_decay=0.995,
            validate_every=250,
            checkpoint_every=250,
        ),
    )


def tiny16_adversarial() -> RunConfig:
    """`tiny16` goes on with a perceptual loss and a discriminator, at a lower rate.

    Command:   vidit train configs.vae:tiny16_adversarial
    Hardware:  1 CPU core
    Time:      3 minutes, on a busy machine
    Result:    sharper than `tiny16` for about the same PSNR (`benchmarks.vae_adversarial`)
    """
    start = tiny16()
    return start.model_copy(
        update={
            "name": "tiny16-adversarial",
            "vae_train": VaeTrain(
                init="runs/tiny16/vae",
                perceptual="features",
                perceptual_weight=0.2,
                perceptual_files=(FEATURES,),
                adversarial_weight=0.5,
                discriminator_channels=32,
                discriminator_rate=2.0,
                lecam_weight=1e-3,
            ),
            "train": start.train.model_copy(update={"steps": 300, "learning_rate": 5e-4, "schedule": "constant"}),
        }
    )
