"""Where the time went: rows of several starts put together, and what one start writes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vidit.train.goodput import Ledger, add_up, read_goodput

SECTIONS = {"compute": 6.0, "update": 3.0, "log": 1.0, "data": 2.0, "checkpoint": 0.5, "review": 4.0}


def row(start: float, time: float, first: int, step: int, training: float, **more: Any) -> dict[str, Any]:
    seconds = {"training": training, "data": 1.0, "checkpoint": 0.5, "review": 0.0}
    startup = {"imports": 2.0, "first step": 3.0}
    return {"start": start, "time": time, "from": first, "step": step, "lost": 0.0, "startup": startup,
            "seconds": seconds, **more}  # fmt: skip


def test_a_killed_start_and_the_next() -> None:
    """Steps 11 to 20 were run twice: their first time is lost."""
    killed = [row(100, 110, 0, 10, 4.0), row(100, 120, 0, 20, 9.0)]
    found = add_up([killed, [row(130, 150, 10, 30, 12.0, end="done")]])
    assert (found.starts, found.failures, found.lost_steps) == (2, 1, 10)
    assert found.seconds == {
        "training": 16.0, "data": 2.0, "checkpoint": 1.0, "review": 0.0, "startup": 10.0, "lost": 5.0, "restart": 10.0,
    }  # fmt: skip
    assert found.share == 16 / 44
    assert found.startup == {"imports": 4.0, "first step": 6.0}


def test_a_stop_costs_nothing() -> None:
    """However long the run then lies still."""
    found = add_up([[row(100, 120, 0, 20, 9.0, end="stopped")], [row(9e4, 9e4 + 20, 20, 30, 5.0, end="done")]])
    assert (found.failures, found.seconds["restart"], found.seconds["lost"]) == (0, 0.0, 0.0)
    assert found.line().startswith("goodput 51.9% of 27.0 s in 2 starts; data 2.0 s")


def test_a_roll_back_within_a_start(tmp_path: Path) -> None:
    ledger = Ledger(0.0)
    ledger.keep(tmp_path, 0)
    ledger.write(3, {"compute": 10.0})
    ledger.write(4, {"compute": 14.0})
    ledger.roll_back(3, {"compute": 17.0})
    ledger.write(5, {"compute": 17.0})
    ledger.roll_back(5, {"compute": 18.0})  # to the checkpoint that was saved on coming back
    ledger.write(6, {"compute": 20.0}, end="done")
    found = read_goodput(tmp_path)
    assert found.seconds["lost"] == 8.0
    assert found.seconds["training"] == 12.0


def test_what_a_start_writes(tmp_path: Path) -> None:
    ledger = Ledger(0.0)
    ledger.started("imports")
    ledger.write(1, SECTIONS)
    assert not (tmp_path / "goodput.jsonl").exists(), "nobody has said where"
    ledger.keep(tmp_path, 7)
    ledger.started("first step")
    ledger.write(8, SECTIONS)
    ledger.write(9, SECTIONS, now=False)  # too soon
    (written,) = [json.loads(line) for line in (tmp_path / "goodput.jsonl").read_text().splitlines()]
    assert (written["from"], written["step"]) == (7, 8)
    assert written["seconds"] == {"training": 10.0, "data": 2.0, "checkpoint": 0.5, "review": 4.0}
    assert list(written["startup"]) == ["imports", "first step"]


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no goodput\.jsonl"):
        read_goodput(tmp_path)


def test_a_process_began_when_it_was_started() -> None:
    """Not up to a second before, as by the time of boot, which the kernel rounds."""
    code = "from vidit.train.goodput import process_began; print(process_began())"
    before = time.time()
    began = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert before - 0.02 < began < time.time()
    assert began - before < 0.5 * (time.time() - before), "what Python loads comes after it"
