"""The `vidit` command. Each subcommand imports what it needs when it is called, so `--help` is instant."""

import argparse
import json
import logging
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from vidit import options
from vidit.config import RunConfig
from vidit.config_source import load_config
from vidit.options import Parser

Call = Callable[[argparse.Namespace], int]
DATA = "look at a data set, or at what a run was given of it"


def train(arguments: argparse.Namespace) -> int:
    from launch import local
    from launch.marker import Marker, failures_noted
    from launch.rank import own_place, rank_process
    from launch.restart import Restarts
    from launch.srun import own_node

    config = load_config(arguments.config, arguments.overrides)
    logs, ranks = config.directory / "logs", config.launch.local
    place = own_place(ranks)
    if place is None and ranks > 1:
        node = own_node()
        _check(config, ranks * node.count, ranks)
        if node.count > 1 and config.launch.max_restarts:
            raise ValueError(
                f"launch.max_restarts={config.launch.max_restarts} starts the ranks of one machine again, and this run "
                f"has {node.count}: leave it out, and let the job start again (`vidit submit --restarts`)"
            )
        command = ["-m", "vidit.cli", "train", arguments.config, *arguments.overrides]
        restarts = Restarts(config.launch.max_restarts, config.directory / "checkpoints")
        return local.run(command, ranks, logs, arguments.traceback, node, restarts)
    if place is not None:
        place.check(config.launch.local)
    with rank_process(place, logs) if place else nullcontext(), failures_noted(config.directory):
        from vidit.train.goodput import process_began
        from vidit.train.run import run

        run(config, Marker(config.directory), process_began())
    return 0


def _check(config: RunConfig, num_ranks: int, ranks_per_node: int) -> RunConfig:
    """Raise what is wrong with a config once, before ranks are started; the config with its layout written out."""
    from vidit.train.layout import with_layout
    from vidit.vae.stored import adopt_vae, find_vae

    return with_layout(adopt_vae(find_vae(config), num_ranks), num_ranks, ranks_per_node)


def config(arguments: argparse.Namespace) -> int:
    from vidit.describe import describe

    json.dump(describe(load_config(arguments.config, arguments.overrides)), sys.stdout, indent=1)
    print()
    return 0


def submit(arguments: argparse.Namespace) -> int:
    from launch.commands import submit

    def load(more: Sequence[str]) -> RunConfig:
        return load_config(arguments.config, [*arguments.overrides, *more])

    print(submit(arguments, load, _check))
    return 0


def status(arguments: argparse.Namespace) -> int:
    from launch.commands import status

    print(status(Path(arguments.run)))
    return 0


def logs(arguments: argparse.Namespace) -> int:
    from launch.commands import logs

    for text in logs(Path(arguments.run), arguments.lines, arguments.follow):
        print(text, end="", flush=True)
    return 0


def cancel(arguments: argparse.Namespace) -> int:
    from launch.commands import cancel

    print(cancel(Path(arguments.run)))
    return 0


def pack(arguments: argparse.Namespace) -> int:
    from vidit.data.pack import pack
    from vidit.data.pack_progress import progress
    from vidit.data.pack_report import print_report

    with progress() as watch:
        report = pack(
            Path(arguments.source),
            Path(arguments.out),
            captions=Path(arguments.captions) if arguments.captions else None,
            file_column=arguments.file_column,
            caption_column=arguments.caption_column,
            clips_per_shard=arguments.clips_per_shard,
            min_frames=arguments.min_frames,
            min_side=arguments.min_side,
            allow_empty_captions=arguments.allow_empty_captions,
            drop_duplicates=arguments.drop_duplicates,
            overwrite=arguments.overwrite,
            workers=arguments.workers,
            watch=watch,
        )
    print_report(report)
    return 0


def encode(arguments: argparse.Namespace) -> int:
    from launch import local
    from launch.rank import own_place, rank_process

    config, out = load_config(arguments.config, arguments.overrides), Path(arguments.out)
    logs, place = out.with_name(f"{out.name}-logs"), own_place()
    if place is None and config.launch.local > 1:
        options = ["--dtype", arguments.dtype, "--clips-per-shard", str(arguments.clips_per_shard)]
        options += ["--overwrite"] if arguments.overwrite else []
        command = ["-m", "vidit.cli", "encode", arguments.config, arguments.out, *options, *arguments.overrides]
        return local.run(command, config.launch.local, logs, arguments.traceback)
    if place is not None:
        place.check(config.launch.local)
    with rank_process(place, logs) if place else nullcontext():
        from vidit.train.encode_run import encode_run, print_report

        report = encode_run(config, out, arguments.dtype, arguments.clips_per_shard, arguments.overwrite)
        if place is None or place.rank == 0:
            print_report(report, out, arguments.dtype)
    return 0


def score(arguments: argparse.Namespace) -> int:
    with _extra_explained("curate", "cv2", "scenedetect"):
        from vidit.data.curation.score_report import print_scored, progress_bar
        from vidit.data.curation.score_set import DISTANCE, score_set

        bits = DISTANCE if arguments.duplicate_bits is None else arguments.duplicate_bits
        folder = Path(arguments.dataset)
        with progress_bar() as progress:
            report = score_set(
                folder, arguments.plugin, max_distance=bits, workers=arguments.workers, progress=progress
            )
        print_scored(folder, report)
    return 0


def data_audit(arguments: argparse.Namespace) -> int:
    from vidit.train.audit import audit

    found = audit(Path(arguments.run))
    for line in found.lines():
        print(line)
    return 1 if found.fault else 0


def data_shapes(arguments: argparse.Namespace) -> int:
    from vidit.train.shapes import Limits, shapes_of_run
    from vidit.vae.stored import adopt_vae

    config = adopt_vae(load_config(arguments.config, arguments.overrides))
    limits = Limits(arguments.max_tokens, arguments.max_frames, arguments.side, arguments.share)
    found = shapes_of_run(config, limits)
    print(shlex.join(found.overrides()))
    for remark in found.remarks():
        print(remark, file=sys.stderr)
    return 0


def data_report(arguments: argparse.Namespace) -> int:
    from vidit.data.curation.report import write_data_report

    for verdict in write_data_report(Path(arguments.dataset), arguments.select, Path(arguments.out)).verdicts:
        print(verdict.line())
    print(arguments.out)
    return 0


@contextmanager
def _extra_explained(extra: str, *modules: str) -> Iterator[None]:
    """A package that only an extra installs and that is not there, as an error that names the cure."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in modules:
            raise
        raise RuntimeError(f"{error.name} is not installed; run `pip install -e '.[{extra}]'` in the clone") from error


def scenes(arguments: argparse.Namespace) -> int:
    from vidit.data.scene_pack import pack_scenes

    manifest = pack_scenes(
        Path(arguments.out),
        arguments.clips,
        arguments.split,
        arguments.seed,
        num_frames=arguments.frames,
        height=arguments.size,
        width=arguments.size,
        count_odds=arguments.odds,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
    )
    print(f"{arguments.out}: {arguments.clips} clips in {len(manifest['shards'])} shards")
    return 0


def sample(arguments: argparse.Namespace) -> int:
    from vidit.sample.run import sample_run

    first, count = arguments.first, arguments.first_frames
    pulls = [text for text in arguments.overrides if text.startswith("sample.reconstruction_guidance=")]
    if pulls and not first:
        raise ValueError(f"{pulls[0]} has no effect without --first; give a file, or leave it out")
    if count and not first:
        raise ValueError(f"--first-frames={count} has no effect without --first; give a file, or leave it out")
    for path in sample_run(
        Path(arguments.run), arguments.prompt, Path(arguments.out or Path(arguments.run) / "samples"),
        arguments.seed, arguments.overrides, Path(first) if first else None, count or 1,
    ):  # fmt: skip
        print(path)
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    from vidit.train.rundir import read_config

    run = Path(arguments.run)
    if read_config(run).train.task == "vae":
        from vidit.evaluate.reconstruction import evaluate_vae

        if arguments.seed is not None:
            raise ValueError(f"--seed={arguments.seed} has no effect on a VAE, which draws nothing; leave it out")
        summary = evaluate_vae(run, arguments.clips, arguments.data, arguments.features)
    else:
        from vidit.evaluate.scenes import evaluate_scenes

        for name in ("data", "features"):
            if getattr(arguments, name):
                raise ValueError(f"--{name} has no effect on a run that draws videos; it is for those of a VAE")
        summary = evaluate_scenes(run, arguments.clips, arguments.seed or 0)
    print(json.dumps(summary, indent=1))
    return 0


def goodput(arguments: argparse.Namespace) -> int:
    from vidit.train.goodput import read_goodput

    for line in read_goodput(Path(arguments.run)).table():
        print(line)
    return 0


def report(arguments: argparse.Namespace) -> int:
    from vidit.evaluate.report import write_report

    print(write_report(Path(arguments.run)))
    return 0


def export(arguments: argparse.Namespace) -> int:
    source, out = Path(arguments.run), Path(arguments.out)
    if arguments.vae_program:
        for name in ("weights", "step", "format"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"--{name} has no effect with --vae-program, which takes the run's VAE; leave it out")
        from vidit.export.programs import export_vae

        files = export_vae(source, out, arguments.dtype)
    elif arguments.format == "diffusers":
        from vidit.export.diffusers.store import export_diffusers

        files = export_diffusers(source, out, arguments.weights or "ema", arguments.dtype, arguments.step)
    else:
        from vidit.export.weights import export_weights

        files = export_weights(source, out, arguments.weights or "ema", arguments.dtype, arguments.step)
    for path in files:
        print(path)
    return 0


def import_(arguments: argparse.Namespace) -> int:
    from vidit.export.diffusers.family import Geometry
    from vidit.export.diffusers.store import import_diffusers, section_of

    out = Path(arguments.out)
    g = import_diffusers(Path(arguments.source), out, arguments.dtype)
    name = section_of(g)
    text = f"and text of width {g.text_width}" if g.text_width else "and reads no text"
    print(f"{out}: {name}.json is the {name} section for {g.channels} latent channels {text}")
    if isinstance(g, Geometry) and g.said:
        print(g.said)
    print(f"train.init_from={out}")
    return 0


def parser() -> argparse.ArgumentParser:
    """Every command with its arguments."""
    top = argparse.ArgumentParser(prog="vidit", description="Train video diffusion transformers.")
    top.add_argument("--traceback", action="store_true", help="show where in the code an error comes from")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, call: Call, text: str, *takes: Callable[[Parser], None]) -> None:
        _add(commands, name, call, text, takes)

    add("train", train, "train a run, or resume the one in its directory", options.takes_config)
    text = "print a resolved run with every derived number, as JSON"
    add("config", config, text, options.takes_config)
    with suppress(ModuleNotFoundError):  # what one device needs works without the package launch
        from launch.options import takes_job_options

        text = "run it as a job: on this machine, or on a cluster"
        add("submit", submit, text, takes_job_options, options.takes_config)
        add("status", status, "how the last submitted job of a run is", options.takes_run)
        add("logs", logs, "the output of the last submitted job of a run", options.takes_logs)
        add("cancel", cancel, "ask the last submitted job of a run to save and leave", options.takes_run)
    text = "check videos and write them as shards; the same command again goes on after a kill"
    add("pack", pack, text, options.takes_pack)
    text = "encode a run's clips and captions once, as a data set; the same command goes on"
    add("encode", encode, text, options.takes_encode)
    add("score", score, "score every clip of a data set for curation, beside its shards", options.takes_score)
    views = commands.add_parser("data", help=DATA, description=DATA).add_subparsers(
        dest="view", required=True, metavar="VIEW"
    )
    text = "write one page about a scored data set: histograms, what rules drop, clips around each limit"
    _add(views, "report", data_report, text, [options.takes_data_report])
    text = "list the shapes of a run's clips under a limit of tokens, as data.buckets to train on"
    _add(views, "shapes", data_shapes, text, [options.takes_shapes])
    text = "say of every clip of a run whether it was delivered, skipped with a reason, or not yet reached"
    _add(views, "audit", data_audit, text, [options.takes_run])
    add("scenes", scenes, "write procedural captioned clips as shards", options.takes_scenes)
    add("sample", sample, "draw videos from a run, as mp4 and gif", options.takes_sample)
    text = "draw held-out and seen scenes from a run and read them back; of a VAE, how well it reconstructs"
    add("evaluate", evaluate, text, options.takes_evaluate)
    add("report", report, "write RUN/report.html", options.takes_run)
    add("goodput", goodput, "say where the time of a run went, over all of its starts", options.takes_run)
    text = "write a run's full weights as safetensors files, or its VAE as programs"
    add("export", export, text, options.takes_export)
    text = "write the weights of a model of diffusers as what a run can begin with"
    add("import", import_, text, options.takes_import)
    return top


def _add(commands: Any, name: str, call: Call, text: str, takes: Iterable[Callable[[Parser], None]]) -> None:
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(call=call)
    for take in takes:
        take(command)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; overrides may stand before, between and after options, which argparse alone does not take."""
    top = parser()
    arguments, rest = top.parse_known_args(argv)
    if hasattr(arguments, "overrides"):
        arguments.overrides += [text for text in rest if not text.startswith("-")]
        rest = [text for text in rest if text.startswith("-")]
    if rest:
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0 on success, 1 after an error, which is printed as one message, 130 after Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    arguments = parse(argv)
    try:
        return int(arguments.call(arguments))
    except (ValueError, RuntimeError, OSError) as error:
        ours = type(error).__module__.split(".")[0] in ("builtins", "vidit", "parallel", "launch")
        if arguments.traceback or not ours:
            raise
        print(f"vidit: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if arguments.traceback:
            raise
        print("vidit: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
