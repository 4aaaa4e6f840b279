"""The demo: text to video on procedural scenes, on two CPU cores."""

from pathlib import Path

from vidit.config import Data, Diffusion, Model, RunConfig, Sample, Text, Train, Vae

WEIGHTS = Path(__file__).parent / "weights" / "demo_vae"


def vae() -> RunConfig:
    """The demo's causal VAE, 4x8x8 and 16 channels.

    Its clips show one, two and three things equally often: more of the loss is then spent on edges.

    Command:   make demo-vae
    Hardware:  2 CPU cores
    """
    return RunConfig(
        name="demo-vae",
        vae=Vae(
            patch=2,
            latent_channels=16,
            base_channels=16,
            multipliers=(1, 2, 4),
            num_res_blocks=(0, 1, 1),
            decoder_res_blocks=(1, 2, 2),
            spatial_down=(True, True),
            temporal_down=(True, True),
            l2_weight=1.0,
            kl_weight=3e-5,
            half_weights=True,
        ),
        data=Data(train="runs/demo-vae/data", num_validation=64, num_frames=9, height=64, width=64, num_workers=1),
        train=Train(
            task="vae",
            steps=3000,
            global_batch=8,
            micro_batch=8,
            learning_rate=2e-3,
            warmup_steps=50,
            schedule="cosine",
            ema_decay=0.995,
            validate_every=500,
            checkpoint_every=500,
        ),
    )


def demo() -> RunConfig:
    """W.A.L.T. at toy size: colours, shapes and directions from captions.

    Command:   make demo
    Hardware:  2 CPU cores
    Time:      about 430 s of training on 2 cores of AVX2
    Result:    validation loss 0.50; of 64 captions colour 1.00, direction 0.31, shape 0.26 read right
    """
    return RunConfig(
        name="demo",
        text=Text(kind="bytes", width=128, num_layers=1, num_heads=4, max_tokens=32, hash_buckets=2048),
        vae=Vae(weights=str(WEIGHTS)),
        model=Model.preset("demo", patch=4, windows=((1, 0, 0), (0, 0, 0)), cross_keys="text"),
        diffusion=Diffusion(path="flow", target="flow", density="logit_normal", stratified=True),
        data=Data(
            train="runs/demo/data",
            num_validation=96,
            num_frames=9,
            height=64,
            width=64,
            cache_latents=True,
            caption_dropout=0.1,
        ),
        train=Train(
            steps=2600,
            global_batch=16,
            micro_batch=16,
            learning_rate=1.5e-3,
            warmup_steps=50,
            schedule="cosine",
            final_learning_rate=0.1,
            ema_decay=0.99,
            validate_every=200,
            checkpoint_every=650,
        ),
        sample=Sample(
            sampler="euler",
            num_steps=25,
            guidance=4.0,
            micro_batch=32,
            prompts=(
                "a red circle moves to the right",
                "a blue square slides down over a striped background",
                "a green star rotates",
                "a yellow triangle drifts up while a purple square gets bigger",
            ),
        ),
    )
