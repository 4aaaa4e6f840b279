"""A U-Net in two stages on procedural scenes: an image model, and a video model upon it (Align-your-Latents, SVD)."""

from collections.abc import Mapping
from pathlib import Path

from vidit.config import UNET_FAMILIES, Data, Diffusion, RunConfig, Sample, Text, Train, Unet, Vae

WEIGHTS = "runs/unet-images/weights"


def images() -> RunConfig:
    """Stage 1: single frames, at the noise of a first stage.

    Command:   vidit scenes runs/unet/data --clips 1500 && vidit train configs.unet:images
    Hardware:  1 CPU core with AMX
    Time:      3 minutes of the core, 12 on one that nine processes shared
    Result:    validation loss 0.796 at step 100, 0.544 at step 600
    """
    return _stage("unet-images", Unet.preset("demo", temporal="none"), num_frames=1, density_mean=0.0, train={})


def video() -> RunConfig:
    """Stage 2: layers over time upon the image model, which is frozen; the noise is higher, as SVD has it for video.

    Command:   vidit export runs/unet-images --out runs/unet-images/weights && vidit train configs.unet:video
    Hardware:  1 CPU core with AMX
    Time:      2 minutes of the core, 10 on one that nine processes shared
    Result:    validation loss 0.690 before the first step, which is the image model's, and 0.641 at step 150; the 303
               tensors of the image model are as they were
    """
    unet = Unet.preset("demo", **UNET_FAMILIES["video-ldm"])
    train = {"init_from": WEIGHTS, "trainable": ("unet.*.temporal_*",)}
    return _stage("unet-video", unet, num_frames=9, density_mean=1.0, train=train)


def _stage(name: str, unet: Unet, num_frames: int, density_mean: float, train: Mapping[str, object]) -> RunConfig:
    batch = 32 if num_frames == 1 else 16
    steps = 600 if num_frames == 1 else 150
    return RunConfig(
        name=name,
        text=Text(kind="bytes", width=128, num_layers=1, num_heads=4, max_tokens=32, hash_buckets=2048),
        vae=Vae(weights=str(Path(__file__).parent / "weights" / "demo_vae")),
        unet=unet,
        diffusion=Diffusion(path="edm", target="edm", density="log_normal", density_mean=density_mean, density_std=1.4),
        data=Data(
            train="runs/unet/data", num_validation=32, num_frames=num_frames, height=64, width=64, cache_latents=True
        ),
        train=Train.model_validate(
            {
                "task": "unet",
                "steps": steps,
                "global_batch": batch,
                "micro_batch": batch,
                "learning_rate": 1e-3,
                "warmup_steps": 50,
                "ema_decay": 0.99,
                "validate_every": 50,
                "checkpoint_every": 50,
                **train,
            }
        ),
        sample=Sample(
            sampler="heun", num_steps=18, guidance=3.0, prompts=("a red circle moves right", "a green star rotates")
        ),
    )
