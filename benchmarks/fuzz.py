"""Does any damaged or hostile file crash the reader, hang it, or take memory without end?

    python -m benchmarks.fuzz --cases 20000

Draws mutated tars, indexes, manifests and videos (`benchmarks/fuzz_cases.py`) and reads them in processes of their own.
A process that ends by a signal, is silent for HANG_S or grows beyond MEMORY_GIB counts as a fault, like any error that
is not a counted skip or a clear refusal. Faults are listed with the case that showed each first; the exit code is 1
where there is one. The answer is written to benchmarks/results/.
"""

import argparse
import json
import multiprocessing
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil
from hypothesis import HealthCheck, Phase, given, seed, settings

from benchmarks.fuzz_cases import Case, Corpus, cases
from benchmarks.record import write_result

HANG_S = 60.0
MEMORY_GIB = 2.0
BATCH = 500


def work(pipe: Connection, folder: Path, number: int, num_cases: int) -> None:
    """One batch of cases: tells the parent each case before it is tried, and then what came of it."""
    corpus = Corpus(folder)
    limit = psutil.Process().memory_info().vms + int(MEMORY_GIB * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    @seed(number)
    @settings(
        max_examples=num_cases, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(cases(corpus.targets))
    def attempt(case: Case) -> None:
        pipe.send(("case", case))
        try:
            pipe.send(("outcome", corpus.outcome(case)))
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{type(error).__name__}: {str(error)[:120]} at {Path(frame.filename).name}:{frame.lineno}"
            pipe.send(("fault", place))

    attempt()
    pipe.send(("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


class Findings:
    """What came of all cases."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Counter[str]] = {}
        self.faults: dict[str, list[Case]] = {}
        self.slowest_s, self.peak_bytes = 0.0, 0

    def count(self, case: Case, what: str) -> None:
        self.outcomes.setdefault(case.target, Counter())[what] += 1

    def fault(self, case: Case, place: str) -> None:
        self.count(case, "fault")
        self.faults.setdefault(place, []).append(case)

    @property
    def num_cases(self) -> int:
        return sum(counts.total() for counts in self.outcomes.values())

    def report(self) -> dict[str, Any]:
        found = [
            {"what": place, "cases": len(seen), "first": repr(asdict(seen[0]))} for place, seen in self.faults.items()
        ]
        return {
            "cases": self.num_cases, "outcomes": {name: dict(c) for name, c in sorted(self.outcomes.items())},
            "faults": found, "slowest_s": self.slowest_s, "peak_rss_gib": self.peak_bytes / 2**30,
        }  # fmt: skip


def follow(pipe: Connection, process: Any, findings: Findings) -> None:
    """Take what one batch tells until it ends, one way or another."""
    case, since = None, time.monotonic()
    while True:
        if not wait([pipe], HANG_S):
            process.kill()
            if case:
                findings.fault(case, f"silent for {HANG_S:g} s")
            return
        try:
            kind, told = pipe.recv()
        except EOFError:
            process.join()
            if case and process.exitcode:
                findings.fault(case, f"the process ended by {signal.Signals(-process.exitcode).name}")
            return
        if kind == "case":
            case, since = told, time.monotonic()
        elif kind == "peak":
            findings.peak_bytes = max(findings.peak_bytes, told)
        elif case:
            findings.slowest_s = max(findings.slowest_s, time.monotonic() - since)
            findings.count(case, told) if kind == "outcome" else findings.fault(case, told)
            case = None


def search(num_cases: int, first_seed: int) -> Findings:
    """Batches one after the other, each in a process of its own, until there are so many cases."""
    findings, context, number = Findings(), multiprocessing.get_context("spawn"), first_seed
    with tempfile.TemporaryDirectory() as name:
        while findings.num_cases < num_cases:
            here, there = context.Pipe(duplex=False)
            folder = Path(name) / str(number)
            process = context.Process(target=work, args=(there, folder, number, min(BATCH, num_cases)), daemon=True)
            process.start()
            there.close()
            follow(here, process, findings)
            number += 1
            sys.stderr.write(f"{findings.num_cases} cases, {len(findings.faults)} kinds of faults\n")
    return findings


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", default="fuzz", help="name of the result file")
    given_ = parser.parse_args(arguments)
    report = search(given_.cases, given_.seed).report()
    print(json.dumps(report, indent=1))
    write_result(given_.record, report)
    return bool(report["faults"])


if __name__ == "__main__":
    sys.exit(main())
