"""Runs whose clips torchcodec decodes, and machines without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from vidit.config import RunConfig
from vidit.data import torchcodec_window
from vidit.train.run import run

Configure = Callable[..., RunConfig]


@pytest.mark.usefixtures("torchcodec")
def test_a_run_trains_on_it(configure: Configure, tmp_path: Path) -> None:
    assert run(configure(tmp_path, data={"decoder": "torchcodec", "num_workers": 1}, train={"steps": 2}))


def test_without_it_nothing_starts(configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(torchcodec_window.__dict__["__builtins__"], "__import__", refusing())
    with pytest.raises(ValueError, match=r"pip install torchcodec.*or set data.decoder=pyav"):
        run(configure(tmp_path, data={"decoder": "torchcodec"}))
    assert not list(tmp_path.glob("checkpoints/*"))


def refusing() -> Callable[..., object]:
    real = __import__

    def refuse(name: str, *more: object, **named: object) -> object:
        if name.startswith("torchcodec"):
            raise ImportError("No module named 'torchcodec'")
        return real(name, *more, **named)

    return refuse
