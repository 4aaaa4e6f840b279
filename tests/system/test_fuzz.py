"""Damaged and hostile files: a small draw of what `python -m benchmarks.fuzz` tries, and what it has found before."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from benchmarks.fuzz_cases import MUTATIONS, Case, Corpus, cases, mutated
from vidit.data.shards import read_index

NUM_CASES = 400


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus(tmp_path_factory.mktemp("fuzz"))


def test_the_corpus_is_whole_and_each_kind_of_file_is_met(corpus: Corpus) -> None:
    assert len(read_index(corpus.packed)) == len(read_index(corpus.bare)) == len(corpus.videos)
    suffixes = {Path(target).suffix for target in corpus.targets}
    assert suffixes >= {".tar", ".jsonl", ".json", ".mp4", ".mkv", ".webm", ".avi", ".mov"}
    assert all(corpus.outcome(Case(target, ())) == "delivered" for target in corpus.targets)


def test_nothing_but_skips_and_refusals(corpus: Corpus) -> None:
    seen: Counter[str] = Counter()

    @settings(
        max_examples=NUM_CASES, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data())
    def attempt(data: st.DataObject) -> None:
        seen[corpus.outcome(data.draw(cases(corpus.targets)))] += 1

    attempt()
    assert min(seen[what] for what in ("delivered", "skipped", "refused")) > NUM_CASES / 20, seen


FOUND_BEFORE = {
    "a suffix that is a list": ("packed/shard-000001.index.jsonl", ("field", 3280, 3761989, 0, b"\xfd3")),
    "an infinite number of bytes": ("packed/dataset.json", ("field", 120, 120, 200, b"\x07")),
}


@pytest.mark.parametrize("name", FOUND_BEFORE)
def test_what_was_found_before(corpus: Corpus, name: str) -> None:
    target, mutation = FOUND_BEFORE[name]
    assert corpus.outcome(Case(target, (mutation,))) == "refused"


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_mutation_changes_what_it_is_for(corpus: Corpus, name: str) -> None:
    target = {"field": "dataset.json", "header": "shard-000000.tar"}.get(name)
    content = (corpus.packed / target).read_bytes() if target else corpus.videos["clip.mp4"]
    changed = [mutated(content, Case("", ((name, at, 9, 2, b"xyz"),))) != content for at in range(8)]
    assert sum(changed) >= 6
