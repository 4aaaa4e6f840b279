"""The demo: text to video on procedural scenes, on two CPU cores."""

from pathlib import Path

from vidit.config import Data, RunConfig, Train, Vae

WEIGHTS = Path(__file__).parent / "weights" / "demo_vae"


def vae() -> RunConfig:
    """The demo's causal VAE, 4x8x8 and 8 channels.

    Command:  make demo-vae
    """
    return RunConfig(
        name="demo-vae",
        vae=Vae(
            patch=2,
            latent_channels=8,
            base_channels=24,
            multipliers=(1, 2, 2),
            num_res_blocks=(0, 1, 1),
            decoder_res_blocks=(1, 1, 2),
            spatial_down=(True, True),
            temporal_down=(True, True),
            l2_weight=1.0,
            kl_weight=1e-5,
            half_weights=True,
        ),
        data=Data(
            train="runs/demo-vae/data",
            num_validation=64,
            num_frames=9,
            height=64,
            width=64,
            image_rows=0,
            num_workers=1,
        ),
        train=Train(
            task="vae",
            steps=1600,
            global_batch=4,
            micro_batch=4,
            learning_rate=1e-3,
            warmup_steps=50,
            schedule="cosine",
            betas=(0.9, 0.99),
            ema_decay=0.995,
            validate_every=200,
            checkpoint_every=200,
        ),
    )
