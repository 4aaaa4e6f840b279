"""Every command in README and docs runs, and every config in them resolves."""

import json
import re
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import AutoencoderKLWan

from vidit.cli import main, parse
from vidit.config import Model, RunConfig, Section
from vidit.data.encode import encode_mp4
from vidit.data.scenes import caption, render, sample_scene
from vidit.export.diffusers.store import export_diffusers
from vidit.train.run import run

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


@pytest.fixture(scope="module")
def workplace(configure: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the pages assume it: the configs, the code of the pages; VIDEOS, as tables and tars too; trained
    runs/clips, runs/given (which takes frames), runs/unet-images and runs/tuned, the last also as a CHECKPOINT of
    diffusers, and a trained VAE as runs/tiny16; and the VAE of a PIPELINE of diffusers.
    """
    folder = tmp_path_factory.mktemp("docs")
    for page, name in (
        ("configs.md", "mine.py"),
        ("data.md", "taste.py"),
        ("models.md", "tuned.py"),
        ("vae_training.md", "sd.py"),
    ):
        text = (ROOT / "docs" / page).read_text()
        (folder / name).write_text(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0])
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "VIDEOS").mkdir()
    for index in range(2):
        scene = sample_scene(0, index, "train")
        (folder / "VIDEOS" / f"{index}.mp4").write_bytes(encode_mp4(render(scene), float(scene.fps)))
        (folder / "VIDEOS" / f"{index}.txt").write_text(caption(scene))
    (folder / "clips.csv").write_text("path,text\nVIDEOS/0.mp4,one\nVIDEOS/1.mp4,two\n")
    (folder / "names.csv").write_text("path,text\n0.mp4,one\n1.mp4,two\n")
    (folder / "TARS").mkdir()
    with tarfile.open(folder / "TARS" / "00000.tar", "w") as tar:
        for name in ("0.mp4", "0.txt", "1.mp4", "1.txt"):
            tar.add(folder / "VIDEOS" / name, name)
    assert run(configure(folder / "runs" / "clips", train={"steps": 2}, sample={"prompts": ()}))
    given = {"given": ({"kind": "image_head", "share": 0.5},)}
    assert run(
        configure(
            folder / "runs" / "given", model={"frame_times": True}, diffusion=given, train={"steps": 1},
            sample={"prompts": ()},
        )
    )  # fmt: skip
    assert run(configure(folder / "runs" / "tiny16", train={"task": "vae", "steps": 2}))
    small = Model.preset("wan-1.3B", num_layers=1, width=24, num_heads=2, mlp_width=48)
    assert run(
        configure(folder / "runs" / "tuned", model=small.model_dump(), train={"steps": 1}, sample={"prompts": ()})
    )
    images = {"channels": 8, "multipliers": (1,), "num_res_blocks": 1, "attention": (True,), "head_dim": 4,
              "norm_groups": 4, "temporal": "none"}  # fmt: skip
    tree = configure(folder / "runs" / "unet-images", train={"task": "unet", "steps": 1}, unet=images).model_dump(
        exclude_unset=True, exclude={"model", "sample"}
    )
    assert run(RunConfig.model_validate(tree))
    export_diffusers(folder / "runs" / "tuned", folder / "CHECKPOINT")
    wan = AutoencoderKLWan(base_dim=4, num_res_blocks=1, dim_mult=[1, 1, 1, 1])
    wan.save_pretrained(folder / "PIPELINE" / "vae")
    (folder / "PIPELINE" / "model_index.json").write_text("{}")
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_command(
    command: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs each command for real, but for what takes minutes: `make` is a dry run, `train` resolves its config."""
    monkeypatch.chdir(workplace)
    words = shlex.split(command)
    if words[0] == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif words[0] == "vidit":
        arguments = parse(words[1:])
        if words[1] == "train":
            words = ["vidit", "config", arguments.config, *arguments.overrides]
        if words[1] in ("status", "logs", "cancel"):
            return  # there is no job: tests/system has them
        if words[1] == "submit" and "--dry-run" not in words:
            words.append("--dry-run")
        if words[1] == "scenes":
            words += ["--clips", "2", "--overwrite"]
        assert main(words[1:]) == 0
        out = capsys.readouterr().out
        if words[1] == "config":
            assert json.loads(out)["derived"]
    elif words[:3] == ["python", "-m", "cluster.ray.local"]:
        done = subprocess.run([sys.executable, *words[1:4], "--help"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert all(word in done.stdout for word in words if word.startswith("--"))
    elif words[0] == "tensorboard":
        done = subprocess.run([Path(sys.executable).parent / words[0], "--help"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert words[1] in done.stdout
    elif words[:2] == ["python", "-m"]:
        done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    elif words[0] == ".":
        assert (Path(sys.executable).parent / Path(words[1]).name).is_file()
    else:
        assert words[0] == "git", f"no test knows how to run {command!r}"


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page}: {target}"


def test_every_paths_row_of_the_run_directory_is_written_by_the_code() -> None:
    source = "".join(path.read_text() for package in ("vidit", "launch") for path in (ROOT / package).rglob("*.py"))
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "run_directory.md").read_text(), re.MULTILINE)
    for name in re.findall(r"`([\w./-]+)`", " ".join(rows)):
        assert name.rstrip("/").split("/")[0] in source, name


def test_fragments_of_models() -> None:
    """The Python of the page on models, beside the file of its commands: sections without a fault."""
    text = (ROOT / "docs" / "models.md").read_text()
    _, *fragments = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert fragments
    for fragment in fragments:
        names: dict[str, Any] = {}
        exec(fragment, names)
        made = [value for value in names.values() if isinstance(value, Section)]
        assert made
        assert [fault for section in made if hasattr(section, "faults") for fault in section.faults()] == []
