"""Any folder of captioned videos, packed by `vidit pack`, on one machine."""

from pathlib import Path

from vidit.config import Data, Diffusion, Model, RunConfig, Sample, Text, Train, Vae


def clips() -> RunConfig:
    """A small W.A.L.T. on clips of mixed size and rate, cut to 9 frames of 64x64 at 8 frames a second.

    Command:   vidit pack VIDEOS runs/clips/data && vidit train configs.clips
    Hardware:  2 CPU cores
    Time:      0.41 s a step, 90 seconds with packing and samples, on 2 cores with AMX (`benchmarks.real_clips`)
    Result:    on 20 clips, training loss 3.0 -> 1.2 in 200 steps; blurred scenes: the demo's VAE has seen shapes only
    """
    return RunConfig(
        name="clips",
        text=Text(kind="bytes", width=128, num_layers=1, num_heads=4, max_tokens=48, hash_buckets=4096),
        vae=Vae(weights=str(Path(__file__).parent / "weights" / "demo_vae")),
        model=Model.preset("demo", windows=((1, 0, 0), (0, 4, 4)), cross_keys="text"),
        diffusion=Diffusion(path="flow", target="flow", density="logit_normal"),
        data=Data(
            train="runs/clips/data", num_validation=4, num_frames=9, height=64, width=64, fps=8.0, random_crop=True
        ),
        train=Train(
            steps=200,
            global_batch=16,
            micro_batch=8,
            learning_rate=1e-3,
            warmup_steps=20,
            ema_decay=0.99,
            validate_every=100,
            checkpoint_every=100,
            sample_every=100,
        ),
        sample=Sample(
            num_steps=25,
            guidance=3.0,
            prompts=("A red tractor drives across a field.", "A person walks into a room."),
        ),
    )
