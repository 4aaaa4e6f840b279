"""A set of latents from a set of videos, by all ranks: dealt out, resumable, whole or not there.

Shards are made in rounds, one a rank, and rank 0 notes in a journal which are whole: a rank waits for the others no
longer than a shard takes, and a kill loses the shards of one round. Everything lies beside OUT until the last shard is
there (`vidit/data/staging.py`). A set that was made of other clips or with other settings is never mixed with this one:
both values of what differs are named.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from parallel.exchange import any_rank, exchange, from_first, num_ranks, own_rank, together
from vidit.config import RunConfig
from vidit.data.catalog import Catalog, Dropped
from vidit.data.encoded import ENCODED, encoded_facts
from vidit.data.manifest import ENCODE_REPORT, MANIFEST, is_ours
from vidit.data.pack_progress import LOG_EVERY_S
from vidit.data.shard_writer import end_set
from vidit.data.shards import index_path
from vidit.data.staging import Stage, stage_of, staged
from vidit.train.encode_clips import ClipEncoder
from vidit.train.encode_shards import Check, Made, Shard, make_shards, shards_of
from vidit.train.encoding import Facts, differences, text_facts, vae_facts
from vidit.train.fingerprint import digest
from vidit.train.stop import StoppedError
from vidit.whole_file import read_rows, write_whole

Say = Callable[[str], None]
CLIPS_PER_SHARD = 256


@dataclass(frozen=True)
class EncodeReport:
    """What became of the clips; `rounding` is in units of the posterior's std. `unchanged`: the set was there."""

    num_clips: int
    num_shards: int
    num_bytes: int
    skipped: Dropped
    rounding: float
    unchanged: bool = False

    def to_json(self) -> str:
        content = {name: value for name, value in asdict(self).items() if name != "unchanged"}
        return json.dumps(content, indent=1) + "\n"


def encode_set(
    config: RunConfig,
    catalog: Catalog,
    out: Path,
    encoder: ClipEncoder,
    say: Say,
    check: Check,
    clips_per_shard: int = CLIPS_PER_SHARD,
    overwrite: bool = False,
) -> EncodeReport:
    """Encode every clip of a catalog into `out`; every rank must call this.

    Raises ValueError where `out` holds something else, unless `overwrite`, and where no clip can be used; StoppedError
    when `check` raised that on any rank: the same call goes on from there.
    """
    shards = shards_of(catalog, config, clips_per_shard)
    facts = from_first(lambda: _facts(config, catalog, encoder, shards, clips_per_shard))
    if report := from_first(lambda: _is_there(out, facts, overwrite)):
        return EncodeReport(**report, unchanged=True)
    with ExitStack() as stack:
        stage: list[Stage] = []

        def begin() -> tuple[str, list[Any]]:
            stage.append(stack.enter_context(staged(out, overwrite, resume=True, leave_on_sigterm=False)))
            return str(stage[0].folder), _begun(stage[0], facts)

        folder, done = from_first(begin)
        made = [Made(*one) for one in done]
        if made:
            say(f"{len(made)} of {len(shards)} shards are there already")
        made += _make(config, catalog, encoder, shards, made, Path(folder), say, check)
        return EncodeReport(**from_first(lambda: _publish(stage[0], catalog, encoder, facts, made)))


def _facts(
    config: RunConfig, catalog: Catalog, encoder: ClipEncoder, shards: Sequence[Shard], clips_per_shard: int
) -> Facts:
    """What decides the bytes of the set."""
    refs = catalog.refs
    hashed = hashlib.sha256(digest(refs).encode() + catalog.bucket.tobytes())
    for ref in refs:
        # Without a hash of the shard or a CRC only its time tells that a clip was replaced by one of its size.
        unknown = ref.video_crc32 is None and isinstance(ref.shard_path, Path)
        changed = ref.shard_path.stat().st_mtime_ns if unknown and isinstance(ref.shard_path, Path) else 0
        hashed.update(f"{ref.video_crc32} {ref.json_crc32} {changed}\n".encode())
    shapes = dict.fromkeys((shard.shape.num_frames, shard.shape.height, shard.shape.width) for shard in shards)
    return {
        "vae": vae_facts(config, encoder.vae),
        "text": text_facts(config, encoder.text),
        "fps": config.data.fps,
        "shapes": [list(shape) for shape in shapes],
        "storage": encoder.storage,
        "computed_in": str(encoder.vae.dtype).removeprefix("torch."),
        "clips_per_shard": clips_per_shard,
        "source": {"folder": config.data.train, "sha256": hashed.hexdigest()},
    }


def _is_there(out: Path, facts: Facts, overwrite: bool) -> dict[str, Any] | None:
    """The report of a set that `out` holds already, whole; None where it is to be made.

    ValueError for another set, or a damaged one, that is not to be replaced.
    """
    held = sorted(path.name for path in out.iterdir() if is_ours(path.name)) if out.is_dir() else []
    if not held:
        return None
    before, shards = _held(out)
    if before and not differences(before, facts):
        lost = [row["name"] for row in shards if not _is_whole(out, row)]
        if not lost and (out / ENCODE_REPORT).is_file():
            return dict(json.loads((out / ENCODE_REPORT).read_text()))
        # Where a process died while it moved the set here, the rest is still beside it.
        if not overwrite and not stage_of(out).is_dir():
            raise ValueError(f"{out} is damaged: {(lost or [ENCODE_REPORT])[0]} is not whole; use --overwrite")
    elif not overwrite:
        if not before:
            raise ValueError(
                f"{out} holds {held[0]} of a data set that is no latents, or whose {MANIFEST} is damaged; write "
                "elsewhere, or replace it with --overwrite"
            )
        _require_alike(str(out), before, facts)
    return None


def _held(out: Path) -> tuple[Facts, list[dict[str, Any]]]:
    """What the set in `out` was made with, and its shards; nothing of a set that is not ours, or whose manifest is
    damaged.
    """
    try:
        manifest = json.loads((out / MANIFEST).read_text())
        facts = {name: value for name, value in manifest[ENCODED].items() if name != "empty_caption"}
        return facts, [{"name": str(row["name"]), "num_bytes": int(row["num_bytes"])} for row in manifest["shards"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}, []


def _require_alike(place: str, before: Facts, facts: Facts) -> None:
    differing = differences(before, facts)
    if differing:
        raise ValueError(
            f"{place} was encoded with other settings; {'; '.join(differing)}. Write elsewhere, or replace it with "
            "--overwrite"
        )


def _begun(stage: Stage, facts: Facts) -> list[list[Any]]:
    """What an earlier process has made, and a journal that goes on. ValueError for what it made with other settings."""
    rows = [row for row in read_rows(stage.journal) if isinstance(row, dict)]
    if rows and "made" in rows[0]:
        rows = []  # without its first line a journal says nothing
    if rows and differences(rows[0], facts):
        if not stage.overwrite:
            _require_alike(str(stage.folder.parent), rows[0], facts)
        stage.discard()
        stage.folder.mkdir()
        rows = []
    known = {row["made"][0]: row["made"] for row in rows[1:] if "made" in row}
    whole = [made for made in known.values() if _is_whole(stage.folder, made[1])]
    kept = [facts, *({"made": made} for made in whole)]
    write_whole(stage.journal, "".join(json.dumps(row) + "\n" for row in kept))
    return whole


def _is_whole(folder: Path, row: dict[str, Any] | None) -> bool:
    if row is None:
        return True
    path = folder / row["name"]
    return path.is_file() and index_path(path).is_file() and path.stat().st_size == row["num_bytes"]


def _make(
    config: RunConfig, catalog: Catalog, encoder: ClipEncoder, shards: Sequence[Shard], before: Sequence[Made],
    folder: Path, say: Say, check: Check,
) -> list[Made]:  # fmt: skip
    """The shards that are missing, each by one rank; notes them round by round."""
    known = {made.number for made in before}
    missing = [shard for shard in shards if shard.number not in known]
    work, own = folder.parent / f"work-{own_rank()}", missing[own_rank() :: num_ranks()]
    mine = make_shards(config, catalog.refs, encoder, own, folder, work, check)
    progress = Progress(say, sum(len(shard.clips) for shard in missing))
    found: list[Made] = []
    for first in range(0, len(missing), num_ranks()):
        made, stopped = None, False
        with together():
            try:
                made = next(mine, None)
            except StoppedError:
                stopped = True
        told = [Made(*one) for one in exchange(made) if one is not None]
        from_first(lambda told=told: _note(folder.parent / "journal.jsonl", told))  # type: ignore[misc]
        if any_rank(stopped):
            shutil.rmtree(work, ignore_errors=True)
            raise StoppedError
        found += told
        progress.add(sum(len(shard.clips) for shard in missing[first : first + num_ranks()]), found)
    return found


def _note(journal: Path, made: Sequence[Made]) -> None:
    with journal.open("a") as file:
        file.writelines(json.dumps({"made": one}) + "\n" for one in made)


class Progress:
    """A line now and then: clips, speed, the time that is left."""

    def __init__(self, say: Say, total: int, every_s: float = LOG_EVERY_S):
        self.say, self.total, self.every_s = say, total, every_s
        self.begin_s = self.last_s = time.monotonic()
        self.done = 0

    def add(self, clips: int, found: Sequence[Made]) -> None:
        self.done += clips
        now_s = time.monotonic()
        if now_s - self.last_s < self.every_s and self.done < self.total:
            return
        self.last_s = now_s
        clips_hz = self.done / max(now_s - self.begin_s, 1e-9)
        left_s = round((self.total - self.done) / clips_hz)
        skipped = sum(len(made.skipped) for made in found)
        left = f"{left_s // 3600}:{left_s // 60 % 60:02d}:{left_s % 60:02d}"
        self.say(f"encoded {self.done} of {self.total} clips, {skipped} skipped, {clips_hz:.1f} clips/s, {left} left")


def _publish(
    stage: Stage, catalog: Catalog, encoder: ClipEncoder, facts: Facts, made: Sequence[Made]
) -> dict[str, Any]:
    """Write the manifest and the report, and move the set to its place."""
    made = sorted(made, key=lambda one: one.number)
    rows = [one.row for one in made if one.row is not None]
    skipped = [(key, reason) for one in made for key, reason in one.skipped]
    if not rows:
        key, reason = skipped[0] if skipped else ("", "there is no clip")
        stage.discard()
        raise ValueError(f"none of {len(catalog.refs)} clips can be encoded; the first: {key}: {reason}")
    (empty,) = encoder.texts([""])
    allow_empty = any(ref.allow_empty_caption for ref in catalog.refs)
    entry = {ENCODED: encoded_facts(facts, empty)}
    manifest = end_set(stage.folder, rows, allow_empty, **entry)
    report = EncodeReport(
        manifest["num_clips"], len(rows), manifest["num_bytes"], skipped, max(one.rounding for one in made)
    )
    write_whole(stage.folder / ENCODE_REPORT, report.to_json())
    for path in stage.folder.parent.glob("work-*"):
        shutil.rmtree(path)
    stage.publish()
    return {name: value for name, value in asdict(report).items() if name != "unchanged"}
