"""What packing did with every file: a table for people, ``pack_report.json`` for programs."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

REPORT = "pack_report.json"


@dataclass(frozen=True, slots=True)
class PackReport:
    """What became of every file. ``unchanged``: the folder already held exactly these shards."""

    kept: tuple[str, ...]
    rejected: tuple[tuple[str, str], ...]
    """(file, reason)"""
    cleaned: tuple[tuple[str, tuple[str, ...]], ...]
    """(file, what was changed in its caption)"""
    duplicates: tuple[tuple[str, str], ...]
    """(file, the first one with the same bytes); kept as well, unless they were to be dropped"""
    captions_without_file: tuple[str, ...]
    num_shards: int
    num_bytes: int
    unchanged: bool = False

    def write(self, folder: Path) -> None:
        """Write all but ``unchanged``, so that packing the same again gives the same file."""
        content = {name: value for name, value in asdict(self).items() if name != "unchanged"}
        (folder / REPORT).write_text(json.dumps(content, indent=1, ensure_ascii=True) + "\n", encoding="utf-8")


def print_report(report: PackReport) -> None:
    """Print a table of what was kept, and one of what was left out and why."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    total = Table("kept", "rejected", "duplicates", "captions cleaned", "shards", "MiB", title="vidit pack")
    counts = (len(report.kept), len(report.rejected), len(report.duplicates), len(report.cleaned), report.num_shards)
    total.add_row(*map(str, counts), f"{report.num_bytes / 2**20:.1f}")
    console.print(total)
    if report.rejected:
        table = Table("rejected file", "reason")
        for name, reason in report.rejected:
            table.add_row(escape(name), escape(reason))
        console.print(table)
    dropped = {name for name, _ in report.rejected}
    for name, first in report.duplicates:
        if name not in dropped:
            text = f"kept though it has the same bytes as {escape(first)}: {escape(name)}"
            console.print(text, highlight=False)
    changes = Counter(change for _, names in report.cleaned for change in names)
    for change, count in sorted(changes.items()):
        console.print(f"caption changes: {change} in {count}", highlight=False)
    for name in report.captions_without_file:
        console.print(f"caption without a file: {escape(name)}", highlight=False)
    if report.unchanged:
        console.print("the folder already held exactly this data set; nothing was written")
