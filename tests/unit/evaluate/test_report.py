"""The report: what is damaged is named, with the cure, and no old page is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vidit.config import RunConfig
from vidit.evaluate.report import write_report

Configure = Callable[..., RunConfig]
PART = {"colour": 1.0, "direction": None, "shape": 0.5, "count": 0.25}
SUMMARY = PART | {
    "seen": PART, "unseen": PART, "ground_truth": PART, "steps": 6, "train_s": 3.0, "evaluate_s": 1.0, "captions": 2,
    "peak_rss_gib": 0.5,
}  # fmt: skip


@pytest.fixture
def evaluated(configure: Configure, tmp_path: Path) -> Path:
    """A run of 60 frames a second with an evaluation of two clips."""
    (tmp_path / "config.json").write_text(configure(tmp_path, data={"fps": 60.0}).to_json())
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    judged = [{"caption": "a <b>", "seen": True, "colour": 1.0, "direction": None, "shape": 0.0, "count": True}] * 2
    (tmp_path / "evaluation.json").write_text(json.dumps(judged))
    videos = {f"{i:04d}": torch.zeros(3, 8, 8, 3, dtype=torch.uint8) for i in range(2)}
    save_file(videos, tmp_path / "evaluation.safetensors")
    return tmp_path


def test_a_page(evaluated: Path) -> None:
    page = write_report(evaluated).read_text()
    assert page.count("data:image/gif;base64,") == 2
    assert "a &lt;b&gt;" in page


@pytest.mark.parametrize("name", ["summary.json", "evaluation.json", "evaluation.safetensors"])
@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"null", b'{"colour": 1}', b"\xff\xfe"])
def test_a_damaged_evaluation_is_named(evaluated: Path, name: str, content: bytes) -> None:
    write_report(evaluated)
    before = (evaluated / "report.html").read_bytes()
    (evaluated / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged or of another version .*run `vidit evaluate` again, or delete"):
        write_report(evaluated)
    assert (evaluated / "report.html").read_bytes() == before


def test_a_page_of_a_vae(configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(configure(tmp_path, train={"task": "vae"}).to_json())
    assert "Not evaluated yet" in write_report(tmp_path).read_text()
    found = {"steps": 7, "clips": 3, "of": "validation", "psnr_db": 27.25, "sharpness": {"clips": 0.5}}
    (tmp_path / "reconstruction.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"reconstruction\.png.*run `vidit evaluate` again"):
        write_report(tmp_path)
    (tmp_path / "reconstruction.png").write_bytes(b"pixels")
    page = write_report(tmp_path).read_text()
    assert "7 steps, evaluated on 3 clips (validation)." in page
    assert "<td>psnr_db</td><td>27.25</td>" in page
    assert "<td>sharpness, clips</td><td>0.5</td>" in page
    assert "data:image/png;base64,cGl4ZWxz" in page
