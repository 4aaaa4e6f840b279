"""What the person at the terminal sees of scoring: a bar on the way, a table at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vidit.data.curation.score_set import Progress, ScoreReport


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A function that moves the bar; it shows nothing where there is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console()
    columns = TextColumn("score"), BarColumn(), MofNCompleteColumn(), TextColumn("clips"), TimeRemainingColumn()
    with Bar(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_scored(folder: Path, report: ScoreReport) -> None:
    """Print the counts, and every clip that does not decode with its reason."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    total = Table("clips", "scored now", "do not decode", "near-duplicates", title="vidit score")
    counts = (report.num_clips, report.num_scored, len(report.faults), report.num_duplicates)
    total.add_row(*map(str, counts))
    console.print(total)
    for key, reason in report.faults:
        console.print(f"does not decode: {escape(key)}: {escape(reason)}", highlight=False)
    console.print(f"look at them: vidit data report {escape(str(folder))} --out report.html", highlight=False)
