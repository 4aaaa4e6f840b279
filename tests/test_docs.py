"""Every command in README and docs runs, and every config in them resolves."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vidit.cli import main, parse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = [
    pytest.param(line[2:], id=f"{page.name}: {line[2:]}")
    for page in PAGES
    for block in re.findall(r"```console\n(.*?)```", page.read_text(), re.DOTALL)
    for line in block.splitlines()
    if line.startswith("$ ")
]


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 8


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The config of docs/configs.md, saved as it says."""
    page = (ROOT / "docs" / "configs.md").read_text()
    source = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    (tmp_path / "mine.py").write_text(source)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(command)
    if words[0] == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif words[0] == "vidit":
        arguments = parse(words[1:])
        if words[1] in ("train", "config"):
            assert main(["config", arguments.config, *arguments.overrides]) == 0
            assert json.loads(capsys.readouterr().out)["derived"]
    elif words[0] == "tensorboard":
        assert (Path(sys.executable).parent / "tensorboard").is_file()
    else:
        assert words[0] == "git", f"no test knows how to run {command!r}"


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page}: {target}"


def test_every_paths_row_of_the_run_directory_is_written_by_the_code() -> None:
    source = "".join(path.read_text() for path in (ROOT / "vidit").rglob("*.py"))
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "run_directory.md").read_text(), re.MULTILINE)
    for name in re.findall(r"`([\w./-]+)`", " ".join(rows)):
        assert name.rstrip("/").split("/")[0] in source, name
