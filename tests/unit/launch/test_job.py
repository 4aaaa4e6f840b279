"""Jobs, sites, submissions and what srun says, without anything being started."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from launch import folder, snapshot
from launch.job import JobSpec, Task, format_minutes, parse_minutes
from launch.process import Backend as Local
from launch.site import SITES, read_site
from launch.slurm import Backend, _parsed
from launch.srun import ALONE, Node, node_of, rank_variables
from vidit.config import ConfigError

STEP = {
    "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_NODEID": "1", "SLURM_STEP_NUM_NODES": "2",
    "MASTER_ADDR": "node1", "MASTER_PORT": "20007",
}  # fmt: skip


def spec(**changes: object) -> JobSpec:
    given = {
        "name": "x",
        "config": "configs.clips",
        "tasks": [Task(run_dir="/runs/x")],
        "workdir": "/w",
        "python": "py",
    }
    return JobSpec.model_validate({**given, **changes})


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("1:30", 2), ("4:00:00", 240), ("2-12", 3600), ("1-00:00:30", 1441), ("0-0:1", 1)],
)
def test_minutes(text: str, minutes: int) -> None:
    assert parse_minutes(text) == minutes
    assert parse_minutes(format_minutes(minutes)) == minutes


@pytest.mark.parametrize("text", ["", "4h", "-5", "1:2:3:4", "0", "00:00", "1-", "-", "1--2", "1.5"])
def test_no_minutes(text: str) -> None:
    with pytest.raises(ValueError, match="time"):
        parse_minutes(text)


def test_the_command_can_be_run_by_hand() -> None:
    task = Task(overrides=("a.b=c d",), run_dir="/runs/x")
    command = ["py", "-m", "vidit.cli", "train", "configs.clips", "a.b=c d", "run_dir=/runs/x"]
    assert spec(devices=4).command(task) == [*command, "launch.local=1"]
    assert spec(devices=4, ranks="node").command(task) == [*command, "launch.local=4"]


@pytest.mark.parametrize("name", ["", "a\nb", "a\x1b[0m"])
def test_names_are_one_printable_line(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        spec(name=name)


def test_ranks_of_srun() -> None:
    assert rank_variables(STEP) == {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
    alone = {"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "7"}
    assert rank_variables(alone) == {}, "a batch script, or a shell on a node, is no rank"
    assert rank_variables({**STEP, "SLURM_STEP_NUM_TASKS": "1"}) == {}
    assert node_of(alone) == ALONE
    one_a_node = {**STEP, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    assert node_of(one_a_node) == Node(1, 2, "node1", 20007)


def test_srun_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"srun has started 8,4 tasks on the nodes; ranks must be equally many"):
        rank_variables({**STEP, "SLURM_STEP_TASKS_PER_NODE": "8,4"})
    with pytest.raises(ValueError, match="MASTER_ADDR is not set"):
        rank_variables({key: value for key, value in STEP.items() if key != "MASTER_ADDR"})
    with pytest.raises(ValueError, match="srun has started 8 processes on each node"):
        node_of(STEP)


@pytest.mark.parametrize("path", sorted(SITES.glob("*.toml")), ids=lambda path: path.stem)
def test_sites(path: Path) -> None:
    assert read_site(path.stem).description
    assert read_site(path.stem) == read_site(str(path))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[slurm]\npartitoin = 'x'", "slurm.partitoin: Extra inputs"),
        ("devices = 0", "devices: Input should be greater"),
        ("devices = ", "Invalid value"),
        ("keep = ['A']\n[environment]\nA = '1'", "A would be kept and set"),
        ("[environment]\n'A B' = '1'", "'A B' is not a name"),
        ("[environment]\nSLURM_NTASKS = '1'", "not yours to set"),
    ],
)
def test_sites_with_faults(tmp_path: Path, text: str, fault: str) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(ConfigError, match=fault) as caught:
        read_site(str(tmp_path / "mine.toml"))
    assert f"{tmp_path}/mine.toml: " in str(caught.value)
    with pytest.raises(ConfigError, match="use one of a100 cpu_test dgx_h100"):
        read_site("dgx")


def test_submissions_are_numbered(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no submitted job"):
        folder.newest(tmp_path)
    for number in (1, 2):
        target = folder.next_folder(tmp_path)
        assert target.name == f"00{number}"
        assert folder.keep(target, "#!/bin/bash\n", []).stat().st_mode & 0o100
        folder.record(target, "slurm", spec(), ["sbatch"], (str(number),))
    folder.keep(folder.next_folder(tmp_path), "never submitted\n", [])
    assert folder.newest(tmp_path)[1].ids == ("2",)
    with pytest.raises(RuntimeError, match="another submission"):
        folder.keep(target, "", [])


def test_dependencies() -> None:
    command = Backend().argv(spec(after=("3", "4")), Path("job.sh"), ["9"])
    waits = "--dependency=afterok:3:4,afterany:9"
    assert command == ["sbatch", "--parsable", waits, "--kill-on-invalid-dep=yes", "job.sh"]


def test_what_scontrol_says() -> None:
    line = (
        "JobId=12 ArrayJobId=10 ArrayTaskId=2 JobName=a JobState=FAILED UserId=x UserId=me(0) GroupId=me(0) "
        "JobState=RUNNING Reason=None Restarts=1 ExitCode=0:0 RunTime=00:01:00 ReqNodeList=(null) NodeList=n[1-2] "
        "Command=/a JobState=FAILED"
    )
    state = _parsed(line)
    assert (state.id, state.state) == ("10_2", "running")
    assert state.detail == "running, nodes n[1-2], restarts 1, 00:01:00"


def test_options_without_effect_are_refused() -> None:
    """On this machine."""
    given = spec(nodes=2, minutes=5, site="a100", after=("1",), chain=2, restarts=1, options=("--x",), ranks="device")
    found = " ".join(Local().faults(given, read_site("")))
    for name in ("nodes=2", "time", "site", "after", "chain", "restarts", "sbatch", "ranks"):
        assert f"--{name}" in found
    assert list(Local().faults(spec(ranks="node", restarts=0), read_site(""))) == []


def test_the_code_of_a_job(tmp_path: Path) -> None:
    """What git tracks or would track, as it is; the commit and what differs from it."""
    clone, copy = tmp_path / "clone", tmp_path / "copy"
    assert not snapshot.take(copy, tmp_path)
    (clone / "vidit").mkdir(parents=True)
    files = {"vidit/a.py": "old", "vidit/gone.py": "x", ".gitignore": "*.log\n", "README.md": "x"}
    for name, text in files.items():
        (clone / name).write_text(text + "\n")
    git = ["git", "-C", str(clone), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    (clone / "vidit/a.py").write_text("new\n")
    (clone / "vidit/gone.py").unlink()
    (clone / "vidit/new é.py").write_text("new\n")
    (clone / "vidit/x.log").write_text("ignored\n")
    assert snapshot.take(copy, clone)
    assert {str(p.relative_to(copy)) for p in copy.rglob("*") if p.is_file()} == {
        "vidit/a.py", "vidit/new é.py", "commit", "source.diff",
    }  # fmt: skip
    assert (copy / "vidit/a.py").read_text() == "new\n"
    assert "+new" in (copy / "source.diff").read_text()
    assert len((copy / "commit").read_text().strip()) == 40
