"""Names and ports: that this node's name and the meeting point's resolve, and that node 0 can listen there."""

import os
import socket
from collections.abc import Iterator

from cluster.health.asked import Asked
from cluster.health.finding import Finding, UnfitError, equal

INTERFACES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


def names(asked: Asked) -> Iterator[Finding]:
    """What resolves to which address; the interfaces that variables name; the port, on node 0."""
    place = asked.place
    for name in dict.fromkeys((socket.gethostname(), *((place.address,) if place.nodes > 1 else ()))):
        address = _resolve(name)
        yield equal(f"{name} resolves to", address, address, "")
    there = {name for _, name in socket.if_nameindex()}
    for variable in INTERFACES:
        for name in filter(None, os.environ.get(variable, "").split(",")):
            # ^ leaves out, a name without = is a prefix: both as NCCL reads them
            if not name.startswith("^") and not any(one.startswith(name.lstrip("=")) for one in there):
                known = " ".join(sorted(there))
                raise UnfitError(f"{variable}={name} and this node has {known}, must be one of them; correct the site")
    if place.nodes > 1 and place.number == 0:
        yield _listen(place.port)


def _resolve(name: str) -> str:
    try:
        return str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise UnfitError(f"the name {name} does not resolve: {error}; check DNS and /etc/hosts of this node") from error


def _listen(port: int) -> Finding:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", port))
        except OSError as error:
            raise UnfitError(
                f"port {port} of node 0: {error.strerror}, must be free; use another MASTER_PORT"
            ) from error
    return equal("MASTER_PORT", port, port, "")
