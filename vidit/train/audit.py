"""What became of every clip of a run, from its record and its data set: `vidit data audit RUN`.

The record is read from the first step to the last and held against the order of the clips, place by place
(`vidit/data/account.py`); nothing is decoded and nothing written.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parallel import checkpoint
from vidit.config import RunConfig
from vidit.data.account import CURE, Account, AccountError, Epoch
from vidit.data.catalog import Catalog
from vidit.data.manifest import ENCODE_REPORT
from vidit.data.shards import read_index
from vidit.resolve import resolve
from vidit.train.clips import Split, StreamSplit, fingerprints, read_splits
from vidit.train.fingerprint import order_of
from vidit.train.metrics import METRICS, read_metrics
from vidit.train.rundir import newest_checkpoint, read_config
from vidit.train.stream_audit import StreamAudit, audit_stream

NAMED = 20
"""Skipped clips that are printed; the record holds all."""


@dataclass
class Audit:
    """What a run's record says. `fault` is the first place where it does not agree with the order of the clips."""

    steps: int
    used: int
    dropped: Counter[str]
    held_out: int
    epochs: list[Epoch] = field(default_factory=list)
    failed_substitutes: list[tuple[str, str]] = field(default_factory=list)
    fault: str = ""

    def lines(self) -> Iterator[str]:
        yield f"{self.steps} steps; {self.used} clips to train on, {self.held_out} for validation"
        for reason, count in self.dropped.most_common():
            yield f"not used: {count} clips: {reason}"
        for epoch in self.epochs:
            yield epoch.line()
        if self.failed_substitutes:
            yield f"{len(self.failed_substitutes)} clips that were drawn for skipped ones were skipped too"
        due = [entry for epoch in self.epochs for entry in epoch.skipped]
        skipped = Counter([*due, *self.failed_substitutes])
        for (name, reason), count in sorted(skipped.items())[:NAMED]:
            yield f"skipped {f'{count} times' if count > 1 else 'once'}: {name}: {reason}"
        if len(skipped) > NAMED:
            yield f"and {len(skipped) - NAMED} more, which metrics.jsonl names"
        yield self.fault or "every clip is accounted for"


def audit(run_dir: Path) -> Audit | StreamAudit:
    """Of a run whose data set is where config.json says. ValueError for a folder that is no run's, or another data set;
    errors of `read_splits`.
    """
    config = read_config(run_dir).model_copy(update={"run_dir": str(run_dir)})
    train, held = splits = read_splits(config)
    if isinstance(train, StreamSplit):
        return audit_stream(_steps(run_dir), train.tars, len(held.refs))
    catalog, order = _drawn_from(config, train)
    newest = newest_checkpoint(run_dir)
    facts = checkpoint.read_manifest(newest)["facts"] if newest else {}
    now = fingerprints(splits)
    if facts.get("data", now) != now or facts.get("order", order) != order:
        raise ValueError(
            f"{config.data.train} is another data set than the one that {run_dir} was trained on; give the clips back "
            "their place, or their new one as data.train in config.json"
        )
    rows = _steps(run_dir)
    found = Audit(len(rows), len(catalog.refs), _reasons(train), len(held.refs))
    account = Account(config, catalog, resolve(config).latent_frames)
    try:
        for number, row in enumerate(rows, start=1):
            if row["step"] != number:
                raise AccountError(f"after step {number - 1} metrics.jsonl goes on with step {row['step']}; {CURE}")
            account.add(number, row["keys"], row["skipped"])
        if len(rows) < facts.get("step", 0):
            raise AccountError(
                f"metrics.jsonl ends at step {len(rows)}, and {newest} is of step {facts['step']}; {CURE}"
            )
    except AccountError as error:
        found.fault = str(error)
    found.epochs, found.failed_substitutes = list(account.epochs.values()), account.failed_substitutes
    return found


def recalled(config: RunConfig, catalog: Catalog, step: int) -> Account:
    """The account of a run that goes on after a step: what was skipped before is read from its record."""
    account = Account(config, catalog, resolve(config).latent_frames)
    for row in _steps(config.directory) if step else ():
        if row["skipped"]:
            account.recall(row["step"], row["skipped"])
    return account


def _steps(run_dir: Path) -> list[dict[str, Any]]:
    """A row for each step, `skipped` as pairs in each. ValueError for one that no run has written."""
    rows = []
    for number, row in enumerate(read_metrics(run_dir), start=1):
        try:
            if "keys" in row:
                skipped = [(str(name), str(reason)) for name, reason in row.get("skipped", ())]
                rows.append({**row, "step": int(row["step"]), "keys": list(row["keys"]), "skipped": skipped})
        except (KeyError, TypeError, ValueError) as error:
            path = run_dir / METRICS
            raise ValueError(
                f"{path}, record {number} is damaged ({type(error).__name__}: {error}); restore it from a copy"
            ) from error
    return rows


def _drawn_from(config: RunConfig, train: Split) -> tuple[Catalog, str]:
    """The clips that the run draws from, and what its order stands on, as its checkpoints have it.

    Where clips were encoded before the first step they are those that could be.
    """
    if not (config.data.cache_latents and config.train.task != "vae"):
        return train.catalog, order_of(train.refs, ())
    latents = config.directory / "latents"
    report = json.loads((latents / ENCODE_REPORT).read_text())
    return Catalog.plain(read_index(latents)), order_of(train.refs, {key for key, _ in report["skipped"]})


def _reasons(train: Split) -> Counter[str]:
    """How many clips were not used for which reason; of numbers of frames the numbers do not matter."""
    return Counter(reason.partition("; ")[2] or reason for _, reason in train.dropped)
