"""The data report: complete, self-contained, and blind to what a caption would like to do to it."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vidit.data.curation.histogram import BASE, WIDTH, histogram
from vidit.data.curation.report import write_data_report
from vidit.data.curation.score_set import score_set
from vidit.data.encode import encode_mp4
from vidit.data.scenes import render, sample_scene
from vidit.data.shard_writer import ShardWriter

EVIL = "<script>alert(1)</script><img src=http://evil.example/x onerror=\"alert('2')\"> {{ 7 * 7 }}"


class Page(HTMLParser):
    """Tags with their attributes, and all text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight scenes, the last a copy of the first and one with a caption that attacks; the third does not decode."""
    folder = tmp_path_factory.mktemp("report") / "data"
    folder.mkdir()
    with ShardWriter(folder, 10) as writer:
        for index in range(8):
            frames = np.asarray(render(sample_scene(0, index % 7, "train")))
            video = encode_mp4(frames, 8.0)
            caption = EVIL if index == 4 else f"caption {index}"
            facts = {"caption": caption, "fps": 8.0, "num_frames": len(frames), "height": 64, "width": 64}
            writer.add(f"clip{index}", video[:-900] if index == 2 else video, facts, "mp4")
        writer.close()
    assert len(score_set(folder).faults) == 1
    return folder


def test_the_page_holds_rules_clips_scores_and_faults(dataset: Path, tmp_path: Path) -> None:
    rules = ["motion >= q0.5", "duplicate_of is none", "brightness in 0..255"]
    out = tmp_path / "report.html"
    selection = write_data_report(dataset, rules, out)
    source = out.read_text()
    page = Page(source)
    for rule in rules:
        assert rule in page.text
    for verdict in selection.verdicts:
        assert verdict.line() in page.text
    for word in ("dropped, nearest to the limit", "kept, nearest to the limit", "dropped, at random", "kept, at random",
                 "each before its original", "sharpness", "jitter", "lowest", "highest"):  # fmt: skip
        assert word in page.text, word
    assert "Clips that do not decode" in page.text
    assert re.search(r"clip2\s*(truncated|damaged|does not open)", page.text)
    kept = sum(selection.keep)
    assert re.search(rf"The rules keep\s*{kept}\s*clips and drop\s*{8 - kept}", page.text)
    assert f"{selection.verdicts[0].limits[0]:.4g}" in page.text
    assert sum(tag == "line" and a["class"] == "mark" for tag, a in page.tags) == 1, "0 and 255 are out of sight"


def test_pictures_are_strips_of_the_clips(dataset: Path, tmp_path: Path) -> None:
    write_data_report(dataset, [], tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    pictures = [a["src"] for tag, a in page.tags if tag == "img"]
    assert len(pictures) > 8
    image = Image.open(io.BytesIO(base64.b64decode(str(pictures[0]).partition(",")[2])))
    assert image.size == (5 * 64 + 4 * 2, 64)


def test_nothing_reaches_out_and_captions_are_escaped(dataset: Path, tmp_path: Path) -> None:
    write_data_report(dataset, ["motion >= 0"], tmp_path / "report.html")
    source = (tmp_path / "report.html").read_text()
    page = Page(source)
    assert EVIL in page.text, "the caption is shown as it is"
    assert "49" not in re.findall(r"\{\{.*?\}\}|evil.*?(49)", source)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "iframe", "object", "link", "embed", "form"})
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "@import" not in source
    assert "url(" not in source


def test_a_page_is_the_same_from_the_same_scores(dataset: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_data_report(dataset, ["motion >= q0.5"], tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_data_set_without_scores_names_the_command(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    with ShardWriter(folder, 4) as writer:
        frames = np.asarray(render(sample_scene(0, 0, "train")))
        facts = {"caption": "x", "fps": 8.0, "num_frames": len(frames), "height": 64, "width": 64}
        writer.add("clip", encode_mp4(frames, 8.0), facts, "mp4")
        writer.close()
    with pytest.raises(ValueError, match="run `vidit score"):
        write_data_report(folder, [], tmp_path / "report.html")


@pytest.mark.parametrize(
    "values", [[3.0], [1.0, 2.0, 2.0, 9.0], [0.01, 1.0, 5000.0], [-5.0, 0.0, 5.0], [0.0, 0.0, 1.0]]
)
def test_every_clip_is_in_a_bar_on_the_drawing(values: list[float]) -> None:
    keeps = [index % 2 == 0 for index in range(len(values))]
    drawn = histogram(values, keeps, [min(values), max(values), max(values) + 1])
    labels = [re.search(r": (\d+) clips(?:, (\d+) dropped)?", bar.label) for bar in drawn.bars]
    assert sum(int(label[1]) for label in labels if label) == len(values)
    assert sum(int(label[2] or 0) for label in labels if label) == keeps.count(False)
    assert len(drawn.limits) == 2, "a limit out of sight is not drawn"
    for bar in drawn.bars:
        assert bar.x >= 0
        assert bar.x + bar.width <= WIDTH
        assert bar.kept_y + bar.kept_height == pytest.approx(BASE, abs=0.2)
        assert bar.dropped_y >= 0
        assert bar.dropped_y + bar.dropped_height == pytest.approx(bar.kept_y, abs=0.2)
