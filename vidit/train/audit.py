"""What became of every clip of a run, from its record and its data set: `vidit data audit RUN`.

The record is read from the first step to the last and held against the order of the clips, place by place
(`vidit/data/account.py`); nothing is decoded and nothing written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parallel import checkpoint
from vidit.config import RunConfig
from vidit.data.account import CURE, Account, AccountError, Epoch
from vidit.data.catalog import Catalog
from vidit.data.shards import read_index
from vidit.resolve import resolve
from vidit.train.clips import Split, StreamSplit, fingerprints, read_splits
from vidit.train.fingerprint import digest
from vidit.train.metrics import read_metrics
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
    fault: str = ""

    def lines(self) -> Iterator[str]:
        yield f"{self.steps} steps; {self.used} clips to train on, {self.held_out} for validation"
        for reason, count in self.dropped.most_common():
            yield f"not used: {count} clips: {reason}"
        for epoch in self.epochs:
            yield epoch.line()
        skipped = Counter((name, reason) for epoch in self.epochs for name, reason in epoch.skipped)
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
    catalog = _catalog(config, train)
    newest = newest_checkpoint(run_dir)
    facts = checkpoint.read_manifest(newest)["facts"] if newest else {}
    if facts.get("data", now := fingerprints(splits)) != now or facts.get("order", digest(catalog.refs)) != digest(
        catalog.refs
    ):
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
            account.add(number, row["keys"], pairs(row.get("skipped", ())))
    except AccountError as error:
        found.fault = str(error)
    found.epochs = list(account.epochs.values())
    return found


def recalled(config: RunConfig, catalog: Catalog, step: int) -> Account:
    """The account of a run that goes on after a step: what was skipped before is read from its record."""
    account = Account(config, catalog, resolve(config).latent_frames)
    for row in _steps(config.directory) if step else ():
        if "skipped" in row:
            account.recall(row["step"], pairs(row["skipped"]))
    return account


def _steps(run_dir: Path) -> list[dict[str, Any]]:
    """A row for each step."""
    return [row for row in read_metrics(run_dir) if "keys" in row]


def pairs(skipped: Sequence[Sequence[str]]) -> list[tuple[str, str]]:
    """The (name, reason) of a row of metrics.jsonl."""
    return [(name, reason) for name, reason in skipped]


def _catalog(config: RunConfig, train: Split) -> Catalog:
    """The clips that the run draws from: where they were encoded before the first step, those that could be."""
    latents = config.directory / "latents"
    cached = config.data.cache_latents and config.train.task == "dit"
    return Catalog.plain(read_index(latents)) if cached else train.catalog


def _reasons(train: Split) -> Counter[str]:
    """How many clips were not used for which reason; of numbers of frames the numbers do not matter."""
    return Counter(reason.partition("; ")[2] or reason for _, reason in train.dropped)
