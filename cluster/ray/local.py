"""A throwaway Ray on this machine: real daemons, several nodes, one directory, gone afterwards.

    python -m cluster.ray.local up DIR --nodes 2     starts it; prints the variables that make ray and vidit use it
    python -m cluster.ray.local down DIR             ends it and everything that its jobs started

    with LocalRay(Shape(nodes=3)) as ray:            the same for as long as the block runs
        subprocess.run(["ray", "status"], env=ray.environment)

One process, the keeper, starts the daemons and waits. It ends them when its owner ends, however that ends; what a
keeper that was killed itself leaves is ended by the next one. Other Rays of this machine are left alone (`ray stop`
would end them all). Needs the package ray[default]; otherwise the standard library only.
"""

import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cluster.keeper import command, empty, ended
from cluster.processes import end
from cluster.ray import daemons, processes
from cluster.ray.daemons import HEAD, Ports, Shape, clean

LEAST = (2, 52)  # the first Ray with authentication by token
UP_S = 90.0


def missing() -> str:
    """Why no Ray can be started here; empty where one can."""
    try:
        found = version("ray")
    except PackageNotFoundError:
        return "ray is not installed; run `pip install -e '.[ray]'` in the clone"
    if tuple(int(part) for part in found.split(".")[:2]) < LEAST:
        return f"ray {found} has no authentication by token; install {LEAST[0]}.{LEAST[1]} or later"
    return ""


class Keeper:
    """Owns the daemons, in a process of its own."""

    def __init__(self, root: Path, shape: Shape):
        self.root, self.shape, self.ports = root, shape, Ports.free()
        self.environment = {
            **clean(os.environ), **daemons.of_daemons(root),
            processes.ROOT: str(root),
        }  # fmt: skip
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.over = False

    def run(self, watch: bool) -> None:
        """Start everything, say so in `ready`, wait for SIGTERM or (`watch`) for the end of standard input; end it."""
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        signal.signal(signal.SIGHUP, lambda *_: self._start_nodes())
        try:
            (self.root / "keeper").write_text(str(os.getpid()))
            end(processes.orphans)
            self._start()
            (self.root / "clients.json").write_text(json.dumps(daemons.of_clients(self.root, self.ports)))
            (self.root / "ready").touch()
            while not self.over:
                ready = select.select([0] if watch else [], [], [], 0.2)[0]
                if ready and not os.read(0, 1):
                    break
        except Exception as error:
            (self.root / "error").write_text(str(error))
            raise
        finally:
            end(lambda: processes.find(self.root))
            for child in self.nodes.values():
                child.wait()

    def _stop(self, *_: object) -> None:
        self.over = True

    def _start(self) -> None:
        token = self.root / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        self._node(HEAD, daemons.head(self.root, self.ports))
        self._wait("the head", lambda: self._ask("/api/version") is not None)
        self._start_nodes()
        self._wait("the nodes", lambda: self._num_alive() > self.shape.nodes)

    def _start_nodes(self) -> None:
        for name in self.shape.names:
            if name not in self.nodes or self.nodes[name].poll() is not None:
                self._node(name, daemons.worker(self.root, self.shape, self.ports, name))

    def _node(self, name: str, words: tuple[str, ...]) -> None:
        folder = processes.folder_of(self.root, name)
        folder.mkdir(exist_ok=True)
        with (self.root / f"{name}.out").open("ab") as out:
            self.nodes[name] = subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", *words], env=self.environment | {processes.NODE: name},
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=folder, start_new_session=True,
            )  # fmt: skip

    def _ask(self, path: str) -> Any:
        """What the head's web server says; None where it does not."""
        request = urllib.request.Request(f"http://{HEAD}:{self.ports.jobs}{path}")
        request.add_header("Authorization", f"Bearer {(self.root / 'token').read_text()}")
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5) as answer:
                return json.load(answer)
        except (OSError, ValueError):
            return None

    def _num_alive(self) -> int:
        told = self._ask("/nodes?view=summary")
        return sum(node["raylet"].get("state") == "ALIVE" for node in told["data"]["summary"]) if told else 0

    def _wait(self, what: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + UP_S
        while not self.over and not condition():
            if any(node.poll() is not None for node in self.nodes.values()):
                raise RuntimeError(f"a node has ended while {what} was waited for; see {self.root}/*.out")
            if time.monotonic() > deadline:
                raise RuntimeError(f"{what} not up after {UP_S:g} s; see {self.root}/*.out")
            time.sleep(0.1)


def start(root: Path, shape: Shape, owned: bool) -> "subprocess.Popen[bytes]":
    """Start a keeper for a Ray in `root`, an empty directory. ValueError where its path is too long, RuntimeError
    where Ray does not come up."""
    if len(str(root)) > daemons.PATH_BYTES:
        raise ValueError(
            f"{root} has {len(str(root))} characters, and at most {daemons.PATH_BYTES} leave room for Ray's sockets "
            "below; give a shorter path, such as one in /tmp"
        )
    if why := missing():
        raise RuntimeError(why)
    with (root / "keeper.log").open("wb") as log:
        keeper = subprocess.Popen(
            [sys.executable, "-m", "cluster.ray.local", "keep", str(root), "--shape", json.dumps(asdict(shape)),
             *(["--owned"] if owned else [])],
            stdin=subprocess.PIPE if owned else subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            cwd=Path(__file__).parents[2], env=clean(os.environ),
        )  # fmt: skip
    while not (root / "ready").exists():
        if keeper.poll() is not None:
            reason = (root / "error").read_text() if (root / "error").exists() else (root / "keeper.log").read_text()
            raise RuntimeError(f"no Ray in {root}: {reason}")
        time.sleep(0.05)
    return keeper


class LocalRay:
    """A Ray for as long as the block runs. `environment` is for whoever talks to it."""

    def __init__(self, shape: Shape = Shape()):  # noqa: B008, frozen
        self.shape = shape
        self.root = Path()

    def __enter__(self) -> Self:
        self.root = Path(tempfile.mkdtemp(prefix="ray-"))
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
        return {**clean(os.environ), **json.loads((self.root / "clients.json").read_text())}

    def kill_node(self, name: str) -> None:
        """As if its power went: its daemons and everything that runs there, at once."""
        end(lambda: processes.find(self.root, name))

    def revive(self) -> None:
        """Start the nodes again that were killed."""
        self.keeper.send_signal(signal.SIGHUP)


def up(root: Path, shape: Shape) -> str:
    """Start a Ray that lives until `down`; what to tell a shell that is to use it."""
    root = empty(root)
    start(root, shape, owned=False)
    clients = json.loads((root / "clients.json").read_text())
    return "\n".join(f"export {name}={value}" for name, value in clients.items())


def down(root: Path) -> None:
    """End what runs in `root`, also what a killed keeper has left, and delete the directory."""
    root = root.resolve()
    if not (root / "keeper").is_file():
        raise ValueError(f"{root} holds no Ray: there is no file `keeper`")
    ended(root, int((root / "keeper").read_text()), lambda: processes.find(root))


def keep(root: Path, shape: Shape, owned: bool) -> None:
    """Be the keeper."""
    Keeper(root, shape).run(watch=owned)


if __name__ == "__main__":
    sys.exit(command("ray", Shape, up, down, keep, None))
