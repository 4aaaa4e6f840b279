"""A run whose captions are read by a language model, beside CLIP: it trains, stops, goes on and draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.text_models import save_text_models
from vidit.config import ConfigError, RunConfig
from vidit.sample.run import open_trained
from vidit.train.metrics import read_metrics
from vidit.train.run import run


def test_trains_resumes_and_draws(configure: Callable[..., RunConfig], tmp_path: Path) -> None:
    folders = save_text_models(tmp_path / "text")
    second = {"kind": "clip", "path": str(folders["clip"]), "max_tokens": 12}
    text: dict[str, Any] = {
        "kind": "llama", "path": str(folders["llama"]), "max_tokens": 12, "template": "say:\n{}<|eot_id|>",
        "hidden_layer": -3, "second": second,
    }  # fmt: skip

    def build(name: str, steps: int, **changes: Any) -> RunConfig:
        config = configure(
            tmp_path / name, train={"steps": steps, "checkpoint_every": 2, "validate_every": 2},
            model={"cross_attention": "all"}, sample={"prompts": ()},
        )  # fmt: skip
        tree = config.model_dump(exclude_defaults=True)
        return RunConfig.model_validate({**tree, "text": {**text, **changes}})

    def losses(name: str) -> list[float]:
        return [row["loss"] for row in read_metrics(tmp_path / name) if "loss" in row]

    assert run(build("whole", 4))
    assert run(build("run", 2))
    for change in ({"template": "tell:\n{}<|eot_id|>"}, {"hidden_layer": -2}):
        with pytest.raises(ConfigError, match=rf"text\.{next(iter(change))}: the run has"):
            run(build("run", 4, **change))
    assert run(build("run", 4))
    assert losses("run") == losses("whole")
    assert len(losses("run")) == 4
    a, b = open_trained(tmp_path / "run").draw(["a red cube", "two cats"], 0)
    assert a.shape == b.shape
    assert not (a == b).all()
