"""The `vidit` command. Each subcommand imports what it needs when it is called, so `--help` is instant."""

import argparse
import importlib
import importlib.util
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import ValidationError

from vidit.config import ConfigError, RunConfig, apply_overrides, faults_of, resolve


def load_config(name: str, overrides: Sequence[str]) -> RunConfig:
    """`configs.demo`, `configs.demo:vae` or `path/to/file.py:function` with overrides applied.

    The function defaults to the module's last name. ValueError where module or function is not there.
    """
    module_name, _, function = name.partition(":")
    path = Path(module_name)
    if path.suffix == ".py":
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None or not path.is_file():
            raise ValueError(f"no config file {path}")
        module = importlib.util.module_from_spec(spec)
        with _faults_listed():
            spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise ValueError(f"no config module {module_name} ({error}); the shipped ones are configs.*") from error
    function = function or module.__name__.rpartition(".")[2]
    build = getattr(module, function, None)
    if not callable(build):
        legal = [
            n
            for n in vars(module)
            if not n.startswith("_") and getattr(vars(module)[n], "__module__", "") == module.__name__
        ]
        raise ValueError(f"{module_name} has no config {function!r}; it has {', '.join(legal)}")
    with _faults_listed():
        config = build()
    if not isinstance(config, RunConfig):
        raise ValueError(f"{name} returns {type(config).__name__}, not a RunConfig")
    try:
        return apply_overrides(config, overrides)
    except ConfigError as error:
        raise ConfigError([*error.faults, *_other_faults(config, overrides)]) from error


@contextmanager
def _faults_listed() -> Iterator[None]:
    """A section with a wrong field, in a config's own source, is a fault like one on the command line."""
    try:
        yield
    except ValidationError as error:
        raise ConfigError(faults_of(error)) from error


def _other_faults(config: RunConfig, overrides: Sequence[str]) -> Sequence[str]:
    """What is wrong with a config apart from the overrides that do not parse."""
    from vidit.vae.stored import adopt_vae

    for text in overrides:
        with suppress(ConfigError):
            config = apply_overrides(config, [text])
    try:
        resolve(adopt_vae(config))
    except ConfigError as error:
        return error.faults
    except ValueError as error:
        return (str(error),)
    return ()


def train(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    from vidit.train.run import run

    run(config)
    return 0


def config(arguments: argparse.Namespace) -> int:
    from vidit.describe import describe

    json.dump(describe(load_config(arguments.config, arguments.overrides)), sys.stdout, indent=1)
    print()
    return 0


def pack(arguments: argparse.Namespace) -> int:
    from vidit.data.pack import pack
    from vidit.data.pack_report import print_report

    report = pack(
        Path(arguments.source),
        Path(arguments.out),
        captions=Path(arguments.captions) if arguments.captions else None,
        min_frames=arguments.min_frames,
        min_side=arguments.min_side,
        allow_empty_captions=arguments.allow_empty_captions,
        overwrite=arguments.overwrite,
        workers=arguments.workers,
    )
    print_report(report)
    return 0


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
        workers=arguments.workers,
        overwrite=arguments.overwrite,
    )
    print(f"{arguments.out}: {arguments.clips} clips in {len(manifest['shards'])} shards")
    return 0


def sample(arguments: argparse.Namespace) -> int:
    from vidit.sample.run import sample_run

    for path in sample_run(
        Path(arguments.run), arguments.prompt, Path(arguments.out or Path(arguments.run) / "samples"),
        arguments.seed, arguments.overrides,
    ):  # fmt: skip
        print(path)
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    from vidit.evaluate.scenes import evaluate_scenes

    summary = evaluate_scenes(Path(arguments.run), arguments.clips, arguments.seed)
    print(json.dumps(summary, indent=1))
    return 0


def report(arguments: argparse.Namespace) -> int:
    from vidit.evaluate.report import write_report

    print(write_report(Path(arguments.run)))
    return 0


def parser() -> argparse.ArgumentParser:
    """Every command with its arguments."""
    top = argparse.ArgumentParser(prog="vidit", description="Train video diffusion transformers.")
    top.add_argument("--traceback", action="store_true", help="show where in the code an error comes from")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, call: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(call=call)
        return command

    def takes_config(command: argparse.ArgumentParser) -> None:
        command.add_argument("config", help="configs.demo, configs.demo:vae or a file.py:function")
        command.add_argument("overrides", nargs="*", metavar="section.key=value")

    takes_config(add("train", train, "train a run, or resume the one in its directory"))
    takes_config(add("config", config, "print a resolved run with every derived number, as JSON"))
    p = add("pack", pack, "check a folder of videos and write it as shards")
    p.add_argument("source")
    p.add_argument("out")
    p.add_argument("--captions", help="JSON lines with file and caption; default SOURCE/clips.jsonl")
    p.add_argument("--min-frames", type=int, default=1)
    p.add_argument("--min-side", type=int, default=16)
    p.add_argument("--allow-empty-captions", action="store_true")
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--overwrite", action="store_true")
    p = add("scenes", scenes, "write procedural captioned clips as shards")
    p.add_argument("out")
    p.add_argument("--clips", type=int, default=1000)
    p.add_argument("--split", choices=("train", "held_out"), default="train")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--frames", type=int, default=9)
    p.add_argument("--size", type=int, default=64)
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--overwrite", action="store_true")
    p = add("sample", sample, "draw videos from a run, as mp4 and gif")
    p.add_argument("run")
    p.add_argument("overrides", nargs="*", metavar="section.key=value", help="of sample.* and data.*")
    p.add_argument("--prompt", action="append", required=True, help="may be given more than once")
    p.add_argument("--out", help="folder; default RUN/samples")
    p.add_argument("--seed", type=int, default=0)
    p = add("evaluate", evaluate, "draw held-out and seen scenes from a run and read them back")
    p.add_argument("run")
    p.add_argument("--clips", type=int, default=64)
    p.add_argument("--seed", type=int, default=0)
    p = add("report", report, "write RUN/report.html")
    p.add_argument("run")
    return top


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
        ours = type(error).__module__.split(".")[0] in ("builtins", "vidit", "parallel")
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
