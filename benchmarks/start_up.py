"""How long is it from `vidit train ... launch.local=2` to the end of the first step, and what is it made of?

    python -m benchmarks.start_up [--rounds 5] [--other CLONE]

Starts a small model on two ranks, for one step, again and again; with --other a checkout of another version in turn
with this one, so that both see the same machine. `launcher` is the time from the command to the process of rank 0, the
other parts are those of goodput.jsonl. Medians; prints a table and writes it to benchmarks/results/.
"""

import argparse
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks.chaos import TINY, command
from benchmarks.record import write_result
from vidit.data.scene_pack import pack_scenes
from vidit.train.goodput import GOODPUT
from vidit.whole_file import read_rows

HERE = Path(__file__).parents[1]


def start(source: Path, words: list[str], run_dir: Path) -> dict[str, float]:
    """Seconds of each part of one start of the code in `source`. CalledProcessError where it fails."""
    began = time.time()
    subprocess.run(words, check=True, cwd=source, env={**os.environ, "PYTHONPATH": str(source)}, capture_output=True)
    row = read_rows(run_dir / GOODPUT)[-1]
    parts = {"launcher": row["start"] - began, **row["startup"]}
    return {**parts, "all": sum(parts.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--other", type=Path, metavar="CLONE", help="a checkout of another version of this project")
    arguments = parser.parse_args()
    sources = {"this": HERE} | ({"other": arguments.other.resolve()} if arguments.other else {})
    times: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in sources}
    with TemporaryDirectory() as folder:
        clips = Path(folder) / "clips"
        pack_scenes(clips, 16, "train", 0, num_frames=5, height=32, width=32, workers=0)
        for number in range(arguments.rounds + 1):
            for name, source in sources.items():
                run_dir = Path(folder) / f"{name}-{number}"
                words = command("configs.demo", run_dir, [f"data.train={clips}", *TINY, "train.steps=1"])
                parts = start(source, words, run_dir)
                for part, seconds in parts.items() if number else ():  # the first warms up
                    times[name][part].append(seconds)
    medians = {name: {part: round(median(s), 2) for part, s in parts.items()} for name, parts in times.items()}
    for part in medians["this"]:
        sys.stdout.write(f"{part:28}" + "".join(f"{medians[name].get(part, 0.0):8.2f}" for name in sources) + "\n")
    raw = {name: {part: [round(s, 3) for s in seconds] for part, seconds in p.items()} for name, p in times.items()}
    sys.stdout.write(f"{write_result('start-up', {'rounds': arguments.rounds, 'median_s': medians, 'raw_s': raw})}\n")


if __name__ == "__main__":
    main()
