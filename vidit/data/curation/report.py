"""One self-contained page about a scored data set: what each rule keeps and drops, and how every score is spread.

To choose a threshold one must see the clips around it. So each rule shows the clips nearest to its limit on both
sides, and some at random; a score without a rule shows its lowest and highest. Captions, keys and rules are text
of others, and escaped; nothing on the page reaches the network.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment

from vidit.data.curation.histogram import BASE, HEIGHT, WIDTH, Histogram, histogram
from vidit.data.curation.page import PAGE
from vidit.data.curation.strip import strip_of
from vidit.data.curation.table import ScoreTable, read_table
from vidit.data.selection import Selection, Verdict, select
from vidit.data.shards import read_index
from vidit.whole_file import full_disk_explained, write_whole

NUM_SHOWN = 4
FACTS = {"duration_s", "fps", "height", "num_frames", "width"}
"""Scores whose extremes look like any other clip."""
MEANINGS = {
    "aspect": "width over height",
    "bits_per_pixel": "of the video file",
    "black_border": "share of the picture that black bars take",
    "brightness": "mean luma, 0 to 255",
    "contrast": "standard deviation of luma",
    "cut_peak": "largest change between frames; 27 is a cut",
    "cuts": "hard cuts",
    "duration_s": "seconds",
    "jitter": "shake: speed that is turned back, % of the short side a second",
    "motion": "mean optical flow, % of the short side a second",
    "sharpness": "variance of the Laplacian",
    "text_area": "share of the picture that text takes",
    "static": "share of the time without motion",
}


@dataclass(frozen=True, slots=True)
class Card:
    """One clip on the page."""

    key: str
    caption: str
    jpeg: str
    value: str


@dataclass(frozen=True, slots=True)
class Group:
    """Clips side by side under a heading."""

    title: str
    cards: tuple[Card, ...]


@dataclass(frozen=True, slots=True)
class Section:
    """A rule, or a score without one."""

    title: str
    text: str
    histogram: Histogram | None
    groups: tuple[Group, ...]


def write_data_report(folder: Path, rules: Sequence[str], out: Path) -> Selection:
    """Write the page to ``out`` and return what the rules do.

    Raises ValueError where scores are missing, and for rules as ``vidit.data.selection.select`` does.
    """
    refs = read_index(folder)
    table = read_table(refs)
    if not table.refs:
        raise ValueError(f"none of the {len(refs)} clips of {folder} could be scored; pack it with `vidit pack`")
    selection = select(table.columns, rules)
    page = (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(PAGE)
        .render(
            name=folder.resolve().name,
            num_clips=len(refs),
            num_kept=sum(selection.keep),
            hours=f"{_hours(table):.3g}",
            scorers=", ".join(table.scorers),
            verdicts=selection.verdicts,
            faults=sorted(table.faults.items()),
            rules=[_rule_section(table, verdict) for verdict in selection.verdicts],
            scores=_score_sections(table, selection),
            size={"width": WIDTH, "height": HEIGHT, "base": BASE},
        )
    )
    with full_disk_explained(out.parent):
        write_whole(out, page)
    return selection


def _hours(table: ScoreTable) -> float:
    return sum(float(value or 0) for value in table.columns["duration_s"]) / 3600


def _card(table: ScoreTable, place: int, name: str) -> Card:
    ref = table.refs[place]
    jpeg, caption = strip_of(ref)
    value = table.columns[name][place]
    return Card(ref.key, caption, jpeg, f"{name} {value:.4g}" if isinstance(value, float | int) else f"{name} {value}")


def _group(table: ScoreTable, title: str, places: Sequence[int], name: str) -> Group:
    return Group(title, tuple(_card(table, place, name) for place in places[:NUM_SHOWN]))


def _rule_section(table: ScoreTable, verdict: Verdict) -> Section:
    name, limits = verdict.rule.name, verdict.limits
    sides = {side: [place for place, keep in enumerate(verdict.keeps) if keep == side] for side in (True, False)}
    groups, drawn = [], None
    if limits:
        numbers = _numbers(table, name)
        drawn = histogram(numbers, verdict.keeps, limits)

        def gap(place: int) -> float:
            return min(abs(numbers[place] - limit) for limit in limits)

        for kept, word in ((False, "dropped"), (True, "kept")):
            groups.append(_group(table, f"{word}, nearest to the limit", sorted(sides[kept], key=gap), name))
    chance = random.Random(0)  # the same page from the same scores
    for kept, word in ((False, "dropped"), (True, "kept")):
        places = chance.sample(sides[kept], min(NUM_SHOWN, len(sides[kept])))
        if name == "duplicate_of" and not kept:
            groups.append(_pairs(table, places))
        else:
            groups.append(_group(table, f"{word}, at random", places, name))
    return Section(verdict.rule.text, verdict.line(), drawn, tuple(group for group in groups if group.cards))


def _pairs(table: ScoreTable, places: Sequence[int]) -> Group:
    """Copies, each followed by its original."""
    where = {ref.key: place for place, ref in enumerate(table.refs)}
    cards = []
    for place in places:
        cards.append(_card(table, place, "duplicate_of"))
        original = where.get(str(table.columns["duplicate_of"][place]))
        if original is not None:
            cards.append(_card(table, original, "duplicate_of"))
    return Group("dropped, at random, each before its original", tuple(cards))


def _score_sections(table: ScoreTable, selection: Selection) -> list[Section]:
    """Every numeric score; where no rule is about it, with its extremes."""
    ruled = {verdict.rule.name for verdict in selection.verdicts}
    sections = []
    for name in (name for name in table.columns if name != "duplicate_of"):
        numbers = _numbers(table, name)
        order = sorted(range(len(numbers)), key=numbers.__getitem__)
        groups: tuple[Group, ...] = ()
        if name not in ruled | FACTS and numbers[order[0]] < numbers[order[-1]]:
            half = min(2, len(order) // 2)
            groups = (
                _group(table, "lowest", order[:half], name),
                _group(table, "highest", order[::-1][:half], name),
            )
        sections.append(Section(name, MEANINGS.get(name, ""), histogram(numbers, selection.keep), groups))
    return sections


def _numbers(table: ScoreTable, name: str) -> list[float]:
    return [float(value) for value in table.columns[name] if isinstance(value, int | float)]
