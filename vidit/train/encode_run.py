"""`vidit encode`: the clips that a run trains on, encoded once, as a set of latents that runs can train on.

It takes the config of the run: its clips and rules, its cut, its VAE and its text encoder. Ranks only deal out shards
here, so the layout of the model does not matter, and neither does what the run does with the clips.
"""

import hashlib
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from parallel.exchange import own_rank, together
from parallel.ranks import start_ranks
from vidit.config import ConfigError, Launch, Parallel, RunConfig
from vidit.data.clip_list import Clips
from vidit.data.tar import LATENT_SUFFIX
from vidit.resolve import resolve
from vidit.text.encoder import build_text_encoder
from vidit.train.clips import every_clip, require_same_clips
from vidit.train.encode_clips import ClipEncoder, Storage
from vidit.train.encode_set import CLIPS_PER_SHARD, EncodeReport, encode_set
from vidit.train.fingerprint import digest
from vidit.train.precision import choose_device, choose_dtype
from vidit.train.stop import StoppedError, StopRequest
from vidit.vae.place import vae_folder
from vidit.vae.store import load_vae
from vidit.vae.stored import adopt_vae, find_vae
from vidit.whole_file import full_disk_explained


def checked(config: RunConfig) -> RunConfig:
    """The config with its VAE's geometry, checked but for what only training has. ConfigError with every fault."""
    config = adopt_vae(find_vae(config.model_copy(update={"parallel": Parallel(), "launch": Launch()})))
    resolve(config)
    faults = []
    if config.train.task == "vae":
        faults.append("train.task=vae trains on pixels; give the config of a DiT, whose VAE is trained")
    if config.data.mixture:
        paths = " ".join(source.path for source in config.data.mixture)
        faults.append(
            f"data.mixture holds several folders, and a set of latents is made of one; encode each of {paths} by "
            "itself, with data.mixture=[] data.train=FOLDER, and put the results in the mixture"
        )
    if drawn := config.data.drawn:
        faults.append(f"{drawn}: one cut of each clip is kept; leave it out")
    if faults:
        raise ConfigError(faults)
    return config


def encode_run(
    config: RunConfig,
    out: Path,
    storage: Storage = "fp16",
    clips_per_shard: int = CLIPS_PER_SHARD,
    overwrite: bool = False,
) -> EncodeReport:
    """Encode the training clips of a run into `out`; every rank must call this.

    Raises what `encode_set` raises, ConfigError for a config that cannot be encoded, RuntimeError when told to stop.
    """
    device, timeout_s = choose_device(config.train.device), config.parallel.timeout_s
    console = Console()
    with start_ranks(device.type, timeout_s) as ranks, ExitStack() as stack:
        stack.enter_context(full_disk_explained(out))
        stop = stack.enter_context(StopRequest())
        with together():
            config = checked(config)
            split = every_clip(config)
            if Clips.of(split.refs).folders_with(LATENT_SUFFIX):
                raise ConfigError([f"data.train={config.data.train} holds latents already; give a folder of videos"])
        buckets = hashlib.sha256(split.catalog.bucket.tobytes()).hexdigest()
        require_same_clips([digest(split.refs), buckets], "the dataset", config.data.train)
        with together():
            dtype = choose_dtype(config.train.precision, device)
            vae = load_vae(vae_folder(config.vae), ranks.device, dtype)
            text = None
            if config.denoiser.reads_text:
                text = build_text_encoder(config.text, dtype, config.model.interleaves_text)
            encoder = ClipEncoder(
                vae,
                config.vae,
                text if text is None or text.trainable else text.to(ranks.device),
                ranks.device,
                storage,
            )

        def say(line: str) -> None:
            if own_rank() == 0:
                console.print(line, highlight=False, soft_wrap=True)

        for line in split.selection:
            say(line)
        try:
            made = encode_set(config, split.catalog, out, encoder, say, stop.check_alone, clips_per_shard, overwrite)
        except StoppedError:
            raise RuntimeError("stopped before all was encoded; the same command goes on from there") from None
        skipped = [*split.dropped, *made.skipped]
        return EncodeReport(made.num_clips, made.num_shards, made.num_bytes, skipped, made.rounding, made.unchanged)


def print_report(report: EncodeReport, out: Path, storage: str) -> None:
    """What was made, and each clip that was left out with the reason."""
    console = Console()
    for key, reason in report.skipped:
        console.print(f"skipped clip {key}: {reason}", highlight=False, soft_wrap=True, markup=False)
    size_mib = report.num_bytes / 2**20
    line = f"{out}: {report.num_clips} clips in {report.num_shards} shards, {size_mib:.1f} MiB, "
    line += f"{len(report.skipped)} skipped"
    line += f"; {storage} moves latents by at most {report.rounding:.2g} of the posterior's std"
    console.print(line, highlight=False, soft_wrap=True, markup=False)
    if report.unchanged:
        console.print("the folder already held exactly this set; nothing was encoded", highlight=False)
