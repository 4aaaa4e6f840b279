"""The command lines and the environment of a throwaway Ray: several nodes on one machine, inside one directory.

Each node has a loopback address of its own (127.0.0.11 and so on), so Ray and the ranks see distinct machines. The
first is the head: it has no CPUs, so no rank runs there and the others may be killed. Nodes have session directories
of their own, or those that start at once would wait for one another.

Ray's daemons listen on every interface whatever the address of their node is, unless that is 127.0.0.1 for all. So
authentication by token is always on, with a token that only this user can read.
"""

import socket
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from cluster.ray.processes import NET, folder_of

HEAD = f"{NET}11"
STORE_BYTES = 80_000_000  # Ray takes no less than 75 MB
PATH_BYTES = 40  # of the root: what Ray puts behind it ends in a socket, whose path may have 107


@dataclass(frozen=True)
class Shape:
    """How many nodes besides the head, and what each has."""

    nodes: int = 2
    cpus: int = 4
    gpus: int = 0

    @property
    def names(self) -> list[str]:
        """The addresses of the nodes that have resources."""
        return [f"{NET}{12 + number}" for number in range(self.nodes)]


@dataclass(frozen=True)
class Ports:
    """Of the head: its store, its job server, its proxy for clients."""

    gcs: int
    jobs: int
    client: int

    @classmethod
    def free(cls) -> "Ports":
        """Ports that nobody listens on at this moment."""
        with ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
            for one in sockets:
                one.bind(("", 0))
            return cls(*[one.getsockname()[1] for one in sockets])


def clean(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what belongs to another Ray."""
    return {k: v for k, v in environment.items() if not k.startswith("RAY_")}


def of_clients(root: Path, ports: Ports) -> dict[str, str]:
    """What makes `ray`, its libraries and `vidit submit ray` use this Ray."""
    return {
        "RAY_ADDRESS": f"{HEAD}:{ports.gcs}",
        "RAY_API_SERVER_ADDRESS": f"http://{HEAD}:{ports.jobs}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(root / "token"),
    }


def of_daemons(root: Path) -> dict[str, str]:
    """What the daemons need besides: a dead node is noticed in 2 s and a dead head in 10 s, instead of minutes; nothing
    is reported home.
    """
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(root / "token"),
        "RAY_TMPDIR": str(root),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_health_check_initial_delay_ms": "500",
        "RAY_health_check_period_ms": "500",
        "RAY_health_check_timeout_ms": "2000",
        "RAY_health_check_failure_threshold": "3",
        "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
    }


def head(root: Path, ports: Ports) -> tuple[str, ...]:
    """Starts the head."""
    return (
        "start", "--head", "--block", "--disable-usage-stats", f"--node-ip-address={HEAD}", f"--port={ports.gcs}",
        f"--dashboard-host={HEAD}", f"--dashboard-port={ports.jobs}", "--dashboard-agent-listen-port=0",
        f"--ray-client-server-port={ports.client}", "--num-cpus=0", "--num-gpus=0", *_node(root, HEAD),
    )  # fmt: skip


def worker(root: Path, shape: Shape, ports: Ports, name: str) -> tuple[str, ...]:
    """Starts another node, once the head is up: Ray's own patience with a head that is not ignores signals."""
    return (
        "start", "--block", f"--address={HEAD}:{ports.gcs}", f"--node-ip-address={name}", f"--num-cpus={shape.cpus}",
        f"--num-gpus={shape.gpus}", "--dashboard-agent-listen-port=0", *_node(root, name),
    )  # fmt: skip


def _node(root: Path, name: str) -> tuple[str, ...]:
    """Ports of workers are any that are free: Ray's fixed range would clash with those of other nodes."""
    return (
        f"--temp-dir={folder_of(root, name)}", f"--object-store-memory={STORE_BYTES}",
        "--min-worker-port=0", "--max-worker-port=0", "--include-log-monitor=false",
    )  # fmt: skip
