"""A throwaway SLURM on this machine: real daemons, several nodes, fake GPUs, one directory, no root, gone afterwards.

    python -m cluster.slurm.local up DIR --nodes 2     starts it; prints the variable that makes sbatch use it
    python -m cluster.slurm.local down DIR             ends it and everything that its jobs started

    with LocalSlurm(Shape(nodes=3)) as slurm:          the same for as long as the block runs
        subprocess.run(["sinfo"], env=slurm.environment)

One process, the keeper, starts the daemons and waits. They end with it (pdeathsig), and it ends, with every job, when
its owner does, however that ends. Needs slurmctld, slurmd and munged (Debian: slurm-wlm, munge); otherwise the
standard library only.
"""

import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from cluster.keeper import command, empty, ended
from cluster.processes import command_of, end, is_alive
from cluster.slurm import processes
from cluster.slurm.conf import Shape, free_ports, gres_conf, slurm_conf

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
SBIN = "/usr/sbin:/usr/local/sbin"
UP_S = 30.0
PDEATHSIG = 1  # PR_SET_PDEATHSIG of prctl


def missing() -> list[str]:
    """Programs that are not installed; nothing can be started without them."""
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:{SBIN}"


def clean(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what belongs to another SLURM."""
    return {k: v for k, v in environment.items() if not k.startswith(("SLURM_", "SLURMD_", "SBATCH_"))}


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGKILL)


class Keeper:
    """Owns the daemons. Runs in a process of its own, in its main thread: pdeathsig goes by thread."""

    def __init__(self, root: Path, shape: Shape):
        self.root, self.shape = root, shape
        self.environment = {
            **clean(os.environ), "PATH": _path(), "SLURM_CONF": str(root / "slurm.conf"), processes.ROOT: str(root),
        }  # fmt: skip
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.controller: subprocess.Popen[bytes] | None = None
        self.over = False

    def run(self, watch: bool) -> None:
        """Start everything, say so in `ready`, wait for SIGTERM or (`watch`) for the end of standard input; end it."""
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        signal.signal(signal.SIGHUP, self._revive)
        try:
            self._start()
            (self.root / "ready").write_text(str(os.getpid()))
            while not self.over:
                ready = select.select([0] if watch else [], [], [], 0.2)[0]
                if ready and not os.read(0, 1):
                    break
        except Exception as error:
            (self.root / "error").write_text(str(error))
            raise
        finally:
            end(lambda: processes.find(self.root))
            for child in (*self.daemons, self.controller, *self.nodes.values()):
                if child:
                    child.wait()

    def _stop(self, *_: object) -> None:
        self.over = True

    def _start(self) -> None:
        root = self.root
        munge = root / "munge"
        munge.mkdir(mode=0o711)
        munge.chmod(0o711)  # whatever the umask is: munged refuses a socket that others cannot reach
        key = munge / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self._daemon(
            "munged", "-F", f"--key-file={key}", f"--socket={munge}/socket", f"--pid-file={munge}/pid",
            f"--log-file={munge}/log", f"--seed-file={munge}/seed",
        )  # fmt: skip
        self._wait("munged", (munge / "socket").exists)
        (root / "slurm.conf").write_text(slurm_conf(root, self.shape, free_ports(1 + self.shape.nodes)))
        (root / "gres.conf").write_text(gres_conf(self.shape))
        (root / "state").mkdir()
        self.controller = self._spawn(("slurmctld", "-D", "-c", "-i"), self.environment)
        self._start_nodes()
        self._wait("the nodes", self._all_idle)

    def _revive(self, *_: object) -> None:
        """Start again what was killed; a controller goes on from the state that it saved."""
        if self.controller and self.controller.poll() is not None:
            self.controller = self._spawn(("slurmctld", "-D"), self.environment)
        self._start_nodes()

    def _daemon(self, *argv: str) -> None:
        self.daemons.append(self._spawn(argv, self.environment))

    def _start_nodes(self) -> None:
        for name in self.shape.names:
            if name not in self.nodes or self.nodes[name].poll() is not None:
                environment = self.environment | {processes.NODE: name}
                self.nodes[name] = self._spawn(("slurmd", "-D", "-N", name), environment)

    def _spawn(self, argv: tuple[str, ...], environment: dict[str, str]) -> "subprocess.Popen[bytes]":
        program = shutil.which(argv[0], path=_path()) or argv[0]
        with (self.root / f"{argv[0]}.out").open("ab") as out:
            return subprocess.Popen(
                [program, *argv[1:]], env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                start_new_session=True, preexec_fn=_die_with_parent,
            )  # fmt: skip

    def _wait(self, what: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + UP_S
        while not condition():
            if any(daemon and daemon.poll() is not None for daemon in (*self.daemons, self.controller)):
                raise RuntimeError(f"a daemon has ended while {what} was waited for; see {self.root}/*.out and *.log")
            if time.monotonic() > deadline:
                raise RuntimeError(f"{what} not up after {UP_S:g} s; see {self.root}/*.log")
            time.sleep(0.05)

    def _all_idle(self) -> bool:
        done = subprocess.run(["sinfo", "-h", "-N", "-p", "main", "-o", "%T"], env=self.environment,
                              capture_output=True, text=True)  # fmt: skip
        return done.stdout.split() == ["idle"] * self.shape.nodes


def start(root: Path, shape: Shape, owned: bool) -> "subprocess.Popen[bytes]":
    """Start a keeper for a SLURM in `root`, an empty directory. RuntimeError where it does not come up."""
    if absent := missing():
        raise RuntimeError(f"{' '.join(absent)} not installed; on Debian: apt-get install slurm-wlm munge")
    root.chmod(0o711)
    with (root / "keeper.log").open("wb") as log:
        keeper = subprocess.Popen(
            [sys.executable, "-m", "cluster.slurm.local", "keep", str(root), "--shape", json.dumps(asdict(shape)),
             *(["--owned"] if owned else [])],
            stdin=subprocess.PIPE if owned else subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            cwd=Path(__file__).parents[2], env={**clean(os.environ), processes.ROOT: ""},
        )  # fmt: skip
    while not (root / "ready").exists():
        if keeper.poll() is not None:
            reason = (root / "error").read_text() if (root / "error").exists() else (root / "keeper.log").read_text()
            raise RuntimeError(f"no SLURM in {root}: {reason}")
        time.sleep(0.02)
    return keeper


class LocalSlurm:
    """A SLURM for as long as the block runs. `environment` is for whoever talks to it."""

    def __init__(self, shape: Shape = Shape()):  # noqa: B008, frozen
        self.shape = shape
        self.root = Path()

    def __enter__(self) -> Self:
        self.root = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: paths of sockets may have 107 bytes
        try:
            self.keeper = start(self.root, self.shape, owned=True)
        except BaseException:
            shutil.rmtree(self.root, ignore_errors=True)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.keeper.terminate()
        self.keeper.wait()
        shutil.rmtree(self.root, ignore_errors=True)

    @property
    def environment(self) -> dict[str, str]:
        return {**clean(os.environ), "PATH": _path(), "SLURM_CONF": str(self.root / "slurm.conf")}

    def kill_node(self, name: str) -> None:
        """As if its power went: slurmd and everything that it runs, at once."""
        end(lambda: processes.find(self.root, name))

    def stop_controller(self) -> None:
        """Ask slurmctld to save its state and leave, as a restart of the service does."""
        (controller,) = (one for one in processes.find(self.root) if command_of(one).endswith("slurmctld"))
        os.kill(controller, signal.SIGTERM)
        deadline = time.monotonic() + UP_S
        while is_alive(controller):
            if time.monotonic() > deadline:
                raise RuntimeError(f"slurmctld has not left {UP_S:g} s after SIGTERM; see {self.root}/*.log")
            time.sleep(0.05)

    def revive(self) -> None:
        """Start again what has ended."""
        self.keeper.send_signal(signal.SIGHUP)


def up(root: Path, shape: Shape) -> str:
    """Start a SLURM that lives until `down`; what to tell a shell that is to use it."""
    root = empty(root)
    start(root, shape, owned=False)
    return f"export SLURM_CONF={root}/slurm.conf"


def down(root: Path) -> None:
    """End what runs in `root`, also what a killed keeper has left, and delete the directory."""
    root = root.resolve()
    if not (root / "slurm.conf").is_file():
        raise ValueError(f"{root} holds no SLURM: there is no slurm.conf")
    keeper = int((root / "ready").read_text()) if (root / "ready").is_file() else None
    ended(root, keeper, lambda: processes.find(root))


def keep(root: Path, shape: Shape, owned: bool) -> None:
    """Be the keeper."""
    Keeper(root, shape).run(watch=owned)


if __name__ == "__main__":
    sys.exit(command("slurm", Shape, up, down, keep, None))
