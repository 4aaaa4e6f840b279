"""What each `vidit` command takes. Nothing is imported for it but argparse: every command parses."""

import argparse
from collections.abc import Callable

Parser = argparse.ArgumentParser


def whole(least: int) -> Callable[[str], int]:
    """A whole number of at least `least`, for argparse."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    number.__name__ = "whole number"  # as argparse names it for what is no number at all
    return number


def takes_run(p: Parser) -> None:
    p.add_argument("run")


def takes_config(p: Parser) -> None:
    p.add_argument("config", help="configs.demo, configs.demo:vae or a file.py:function")
    p.add_argument("overrides", nargs="*", metavar="section.key=value")


def takes_logs(p: Parser) -> None:
    p.add_argument("run")
    p.add_argument("--lines", type=whole(1), default=100, help="from the end of each file")
    p.add_argument("--follow", action="store_true", help="go on until the job is over")


def takes_pack(p: Parser) -> None:
    p.add_argument("source", help="a folder of videos, a .csv .tsv .jsonl or .parquet table, a .tar or folder of tars")
    p.add_argument("out", help="a new folder")
    p.add_argument("--captions", help="table for a folder of videos; default SOURCE/clips.jsonl, or a file beside each")
    p.add_argument("--file-column", help="of a table; default file")
    p.add_argument("--caption-column", help="of a table, or field of the .json in a tar; default caption")
    p.add_argument("--clips-per-shard", type=whole(1), default=1000)
    p.add_argument("--min-frames", type=whole(1), default=1)
    p.add_argument("--min-side", type=whole(1), default=16, help="pixels, as shown")
    p.add_argument("--allow-empty-captions", action="store_true")
    p.add_argument("--drop-duplicates", action="store_true", help="keep one of the files with the same bytes")
    p.add_argument("--workers", type=whole(0), default=2, help="processes that decode")
    p.add_argument("--overwrite", action="store_true", help="replace the data set in OUT")


def takes_encode(p: Parser) -> None:
    p.add_argument("config", help="of a run that trains on the clips: its data, VAE and text encoder count")
    p.add_argument("out", help="a new folder")
    p.add_argument("overrides", nargs="*", metavar="section.key=value")
    p.add_argument("--dtype", choices=("fp16", "bf16", "fp32"), default="fp16", help="of what is stored")
    p.add_argument("--clips-per-shard", type=whole(1), default=256)
    p.add_argument("--overwrite", action="store_true", help="replace what OUT holds")


def takes_score(p: Parser) -> None:
    p.add_argument("dataset")
    p.add_argument("--plugin", action="append", default=[], help="module:function, may be repeated")
    p.add_argument("--duplicate-bits", type=whole(0), help="how far hashes of copies may differ; default 12 of 192")
    p.add_argument("--workers", type=whole(0), default=2)


def takes_data_report(p: Parser) -> None:
    p.add_argument("dataset")
    p.add_argument("--select", action="append", default=[], metavar="RULE", help="may be given more than once")
    p.add_argument("--out", required=True, help="the page, such as report.html")


def takes_shapes(p: Parser) -> None:
    p.add_argument("config", help="of the run: its data, rate, VAE and patch count")
    p.add_argument("overrides", nargs="*", metavar="section.key=value")
    p.add_argument("--max-tokens", type=whole(1), required=True, help="of a clip; larger pictures are scaled down")
    p.add_argument("--max-frames", type=whole(0), default=0, help="of a clip; 0 = as many as it has")
    p.add_argument("--side", type=whole(0), default=0, help="pixels that sides are multiples of; 0 = those of a token")
    p.add_argument("--share", type=float, default=0.0, help="leave out shapes of fewer of the clips, such as 0.01")


def takes_scenes(p: Parser) -> None:
    p.add_argument("out")
    p.add_argument("--clips", type=whole(1), default=1000)
    p.add_argument("--split", choices=("train", "held_out"), default="train")
    p.add_argument("--seed", type=whole(0), default=0)
    p.add_argument("--frames", type=whole(1), default=9)
    p.add_argument(
        "--odds", type=float, nargs=3, default=(0.7, 0.22, 0.08), metavar="N", help="of one, two and three things"
    )
    p.add_argument("--size", type=whole(1), default=64)
    p.add_argument("--workers", type=whole(0), default=2)
    p.add_argument("--overwrite", action="store_true")


def takes_sample(p: Parser) -> None:
    p.add_argument("run")
    p.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the sampler, the size, the device")
    p.add_argument("--prompt", action="append", required=True, help="may be given more than once")
    p.add_argument("--out", help="folder; default RUN/samples")
    p.add_argument("--seed", type=whole(0), default=0)
    p.add_argument("--first", metavar="FILE", help="an image or video with which each begins")
    p.add_argument("--first-frames", type=whole(1), help="how many of its frames; default 1")


def takes_evaluate(p: Parser) -> None:
    p.add_argument("run")
    p.add_argument("--clips", type=whole(1), default=64)
    p.add_argument("--seed", type=whole(0), help="of what is drawn; default 0")
    p.add_argument("--data", help="of a VAE: clips to reconstruct, a packed folder; default those of its validation")
    p.add_argument("--features", help="of a VAE: weights for a Frechet distance (`python -m benchmarks.features`)")


def takes_export(p: Parser) -> None:
    p.add_argument("run", help="with --vae-program also the folder of a VAE")
    p.add_argument("--vae-program", action="store_true", help="write encode.pt2 and decode.pt2 of torch.export")
    p.add_argument("--out", required=True, help="a new folder")
    p.add_argument("--weights", choices=("ema", "model"), help="ema (default): the averages, as sampling uses")
    p.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    p.add_argument("--step", type=whole(0), help="of the checkpoint; default the newest")
    p.add_argument("--format", choices=("vidit", "diffusers"), help="diffusers: for from_pretrained; default vidit")


def takes_import(p: Parser) -> None:
    p.add_argument("source", help="a folder with config.json and safetensors files, or a pipeline's")
    p.add_argument("--out", required=True, help="a new folder")
    p.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
