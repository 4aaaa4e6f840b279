"""How long does a run on millions of clips take to its first batch, and what do the clips cost in memory?

    python -m benchmarks.loader_resume make FOLDER --clips 2000000 [--rows]
    python -m benchmarks.loader_resume measure FOLDER --clip 1000000

``make`` writes a synthetic data set: one real tar of 1000 small H.264 clips under as many names (hard links) as there
are shards, and an index in which every clip has a key of its own. The keys are not ASCII, since the names of such
members are not compared with the tar's header, which has the keys of the first shard. ``--rows`` writes the rows too.
``measure`` starts on it as a training run does, in a fresh process, and prints the parts as JSON.
"""

import argparse
import io
import json
import os
import tarfile
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from vidit.config import Data, RunConfig, Train
from vidit.data.clip_list import Clips
from vidit.data.encode import encode_mp4
from vidit.data.loader import MicroBatches, batches
from vidit.data.shards import build_index
from vidit.train.clips import read_splits
from vidit.train.encoding import encodings_of
from vidit.train.fingerprint import order_of

PER_SHARD = 1000
FRAMES, SIDE, MICRO_BATCH = 9, 64, 8


def key_of(number: int) -> str:
    return f"clip-é-{number:08d}"


def make(folder: Path, num_clips: int, rows: bool) -> None:
    """Write the data set. ValueError for a number of clips that is no multiple of a shard's."""
    from vidit.data.column_file import write_columns
    from vidit.data.columns import Columns
    from vidit.data.manifest import COLUMNS, index_path, sha256_of, write_manifest
    from vidit.data.texts import Texts

    if num_clips % PER_SHARD:
        raise ValueError(f"--clips {num_clips} is no multiple of {PER_SHARD}, the clips of a shard")
    folder.mkdir(parents=True)
    shards = [folder / f"shard-{number:06d}.tar" for number in range(num_clips // PER_SHARD)]
    _write_tar(shards[0])
    for shard in shards[1:]:
        shard.hardlink_to(shards[0])
    refs = build_index(shards[0])
    one = Clips.of(refs).parts[0].table.columns
    arrays = {name: np.concatenate([array] * len(shards)) for name, array in one.arrays.items()}
    content = shards[0].read_bytes()
    for member in ("video", "json"):
        spans = zip(one.arrays[f"{member}_offset"].tolist(), one.arrays[f"{member}_size"].tolist(), strict=True)
        crcs = [zlib.crc32(content[start : start + size]) for start, size in spans]
        arrays[f"{member}_crc32"] = np.array(crcs * len(shards), np.int64)
    keys = Texts.of([key_of(number) for number in range(num_clips)])
    columns = Columns(keys, arrays, one.suffixes)
    listed = write_columns(folder / COLUMNS, columns)
    row = {"num_bytes": len(content), "sha256": sha256_of(shards[0]), "num_clips": PER_SHARD}
    listing = []
    for number, shard in enumerate(shards):
        index_bytes = 0
        if rows:
            text = "".join(_rows(columns, number))
            index_bytes = index_path(shard).write_bytes(text.encode())
        listing.append({"name": shard.name, **row, "index_bytes": index_bytes})
    write_manifest(folder, listing, False, listed)


def _write_tar(path: Path) -> None:
    generator = np.random.default_rng(0)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(PER_SHARD):
            video = encode_mp4(generator.integers(0, 256, (FRAMES, SIDE, SIDE, 3), dtype=np.uint8), 8)
            facts = {"caption": f"clip {number}", "num_frames": FRAMES, "fps": 8.0, "width": SIDE, "height": SIDE}
            for suffix, content in (("json", json.dumps(facts).encode()), ("mp4", video)):
                info = tarfile.TarInfo(f"{key_of(number)}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def _rows(columns: Any, shard: int) -> Iterator[str]:
    for number in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
        row = {name: value for name, value in columns.row(number).items() if value is not None}
        yield json.dumps(row, ensure_ascii=False) + "\n"


def measure(folder: Path, clip: int, workers: int, select: Sequence[str] = ()) -> dict[str, Any]:
    """Seconds of each part of a start at a clip, bytes of memory a clip, bytes that a worker is sent."""
    seconds: dict[str, float] = {}
    processor_s: dict[str, float] = {}
    load = os.getloadavg()[0]
    config = RunConfig(
        name="resume",
        data=Data(
            train=str(folder),
            num_validation=0,
            select=tuple(select),
            num_frames=FRAMES,
            height=SIDE,
            width=SIDE,
            num_workers=workers,
            prefetch=2,
        ),
        train=Train(global_batch=MICRO_BATCH, micro_batch=MICRO_BATCH),
    )
    process = psutil.Process()
    before = process.memory_full_info()
    with _timed(seconds, processor_s, "read the data set"):
        train, held = read_splits(config)
    with _timed(seconds, processor_s, "latents among it"):
        assert not encodings_of(Clips.chained([train.refs, held.refs]))
    with _timed(seconds, processor_s, "order of clips"):
        order_of(train.refs, ())
    assert not len(train.dropped)
    dataset = MicroBatches(config, train.catalog, tokenizer=None, images_per_row=0)
    after = process.memory_full_info()
    start = clip // MICRO_BATCH
    with _timed(seconds, processor_s, "first batch"):
        batch = next(iter(batches(dataset, start, start + 1)))
    assert not batch.skipped, batch.skipped
    sent = len(ForkingPickler.dumps(dataset))
    return {
        "clips": len(train.refs),
        "resumed at clip": clip,
        "workers": workers,
        "seconds": {**seconds, "all": sum(seconds.values())},
        "processor_s": {**processor_s, "all": sum(processor_s.values())},
        "load_before": load,
        "rss_bytes_per_clip": (after.rss - before.rss) / len(train.refs),
        "of them private": (after.uss - before.uss) / len(train.refs),
        "rss_mib": process.memory_info().rss / 2**20,
        "pickled_bytes": sent,
        "fingerprint": train.fingerprint["sha256"],
        "keys": batch.keys,
    }


@contextmanager
def _timed(seconds: dict[str, float], processor_s: dict[str, float], part: str) -> Iterator[None]:
    start, processor = time.perf_counter(), time.process_time()
    yield
    seconds[part], processor_s[part] = time.perf_counter() - start, time.process_time() - processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "measure"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clips", type=int, default=2_000_000)
    parser.add_argument("--rows", action="store_true", help="write the rows beside each tar too")
    parser.add_argument("--clip", type=int, default=1_000_000, help="where the run is resumed (%(default)s)")
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    if options.what == "make":
        make(options.folder, options.clips, options.rows)
    else:
        print(json.dumps(measure(options.folder, options.clip, options.workers)))


if __name__ == "__main__":
    main()
