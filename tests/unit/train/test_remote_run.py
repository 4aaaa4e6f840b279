"""A run that reads its clips from a web server is the run that reads them from a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vidit.config import RunConfig
from vidit.data.shards import read_index
from vidit.train.fingerprint import fingerprint
from vidit.train.run import run

Serve = Callable[[Path], Any]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_a_data_set_is_the_same_wherever_it_lies(serve: Serve, tiny_clips: Path) -> None:
    with serve(tiny_clips) as web:
        assert fingerprint(read_index(web.url)) == fingerprint(read_index(tiny_clips))


def test_a_run_by_http_in_worker_processes_has_the_losses_of_a_local_one(
    serve: Serve, chaos: Any, configure: Callable[..., RunConfig], tiny_clips: Path, tmp_path: Path
) -> None:
    losses = []
    with serve(tiny_clips) as web:
        web.mischief = chaos(5, 0.2, ("drop", "truncate", "503"))
        for name, place in (("local", {}), ("http", {"train": web.url, "cache_dir": str(tmp_path / "cache")})):
            folder = tmp_path / name
            assert run(configure(folder, data={"num_workers": 1, **place}, sample={"prompts": ()}))
            rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
            losses.append([{k: v for k, v in row.items() if "loss" in k or k == "keys"} for row in rows])
        assert any(name.endswith(".tar") for name, _, _ in web.asked)
    assert losses[0] == losses[1]
    assert len(losses[0]) >= 6
