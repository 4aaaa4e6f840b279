"""The demo: text to video on procedural scenes, on two CPU cores."""

from pathlib import Path

from vidit.config import Data, Diffusion, Model, RunConfig, Sample, Text, Train, Vae

WEIGHTS = Path(__file__).parent / "weights" / "demo_vae"


def vae() -> RunConfig:
    """The demo's causal VAE, 4x8x8 and 16 channels.

    Its clips show one, two and three things equally often: more of the loss is then spent on edges.

    Command:   make demo-vae
    Hardware:  2 CPU cores
    Time:      8 minutes on 2 cores with AMX
    Result:    28.1 dB on unseen scenes; the scorer reads 95 % of the shapes of its reconstructions (record.json)
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

    The density leans to pure noise (shift 6): only there does the caption decide where a thing goes.

    Command:   make demo
    Hardware:  2 CPU cores
    Time:      566 s of training on 2 cores with AMX, 10 min 14 s with the clips and the evaluation; 1 GiB
    Result:    validation loss 0.52; of 64 captions colour 0.99, direction 0.85, shape 0.50 (0.60 of the combinations
               seen in training, 0.40 of the others), count 0.94 read right
    """
    return RunConfig(
        name="demo",
        text=Text(kind="bytes", width=128, num_layers=1, num_heads=4, max_tokens=32, hash_buckets=2048),
        vae=Vae(weights=str(WEIGHTS)),
        model=Model.preset("demo", windows=((1, 0, 0), (0, 4, 4)), cross_keys="text"),
        diffusion=Diffusion(
            path="flow",
            target="flow",
            density="logit_normal",
            density_std=1.2,
            stratified=True,
            shift="constant",
            shift_value=6.0,
        ),
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
            steps=2200,
            global_batch=32,
            micro_batch=32,
            optimizer="muon",
            learning_rate=5e-3,
            warmup_steps=50,
            schedule="cosine",
            final_learning_rate=0.1,
            ema_decay=0.995,
            validate_every=275,
            checkpoint_every=550,
        ),
        sample=Sample(
            sampler="euler",
            num_steps=25,
            guidance=6.0,
            micro_batch=32,
            prompts=(
                "a red circle moves to the right",
                "a blue square slides down over a striped background",
                "a green star rotates",
                "a yellow triangle drifts up while a purple square gets bigger",
            ),
        ),
    )
