"""The recipes of container images as text: nothing here can build them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
RECIPES = ROOT / "cluster" / "containers"
DOCKER = (RECIPES / "Dockerfile").read_text()
APPTAINER = (RECIPES / "vidit.def").read_text()


def copied_by_docker() -> list[str]:
    found = []
    for line in re.findall(r"^COPY (.+)$", DOCKER, re.MULTILINE):
        found += line.split()[:-1]
    return found


def copied_by_apptainer() -> list[str]:
    section = APPTAINER.partition("%files\n")[2].partition("\n%")[0]
    return [line.split()[0] for line in section.splitlines() if line.strip()]


def test_the_base_is_one_pinned_image() -> None:
    (docker,) = re.findall(r"^FROM (\S+)$", DOCKER, re.MULTILINE)
    (apptainer,) = re.findall(r"^From: (\S+)$", APPTAINER, re.MULTILINE)
    assert docker == apptainer
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-devel-ubuntu\d\d\.\d\d", docker)


@pytest.mark.parametrize("paths", [copied_by_docker(), copied_by_apptainer()], ids=["docker", "apptainer"])
def test_everything_that_is_copied_exists_at_the_root(paths: list[str]) -> None:
    assert {"constraints.txt", "pyproject.toml", "vidit", "cluster"} <= set(paths)
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_package_is_in_the_image() -> None:
    packages = re.findall(r'"(\w+)\*"', (ROOT / "pyproject.toml").read_text())
    assert len(packages) > 4
    assert set(packages) <= set(copied_by_docker())
    assert set(packages) <= set(copied_by_apptainer())


def test_what_is_copied_is_sent_to_the_builder() -> None:
    lines = (RECIPES / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in lines
    assert {line[1:] for line in lines if line.startswith("!")} == set(copied_by_docker())


def test_dependencies_come_before_the_code_and_the_user_last() -> None:
    order = ["COPY constraints.txt", "pip install --constraint constraints.txt torch", "--requirement", "COPY vidit",
             "\nUSER vidit", "\nCMD "]  # fmt: skip
    at = [DOCKER.index(text) for text in order]
    assert at == sorted(at)
    assert re.findall(r"^USER (\S+)$", DOCKER, re.MULTILINE) == ["vidit"]


def test_torch_is_pinned_and_new_enough() -> None:
    (version,) = re.findall(r"^torch==(\d+)\.(\d+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert tuple(map(int, version)) >= (2, 11)


@pytest.mark.parametrize("text", [DOCKER, APPTAINER], ids=["docker", "apptainer"])
def test_no_secrets(text: str) -> None:
    assert not re.search(r"(?i)token|password|secret|api_?key|--extra-index-url|://\S+@", text)
    assert ":latest" not in text
