"""A web server on loopback that serves byte ranges, and misbehaves when told."""

from __future__ import annotations

import random
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

STALL_S = 30.0
Mischief = Callable[[str], str]
"""Path of a request -> what is done to it: ok drop reset stall truncate flip 503 429 404 whole redirect."""


@dataclass
class WebServer:
    """Serves a folder; ``mischief`` decides the fate of each request, ``asked`` lists (file, first, last)."""

    folder: Path
    mischief: Mischief = lambda path: "ok"
    asked: list[tuple[str, int, int]] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    port: int = 0
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and content in one packet: each in its own waits 40 ms for the other's acknowledgement
    web: WebServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        web, path = self.web, self.web.folder / self.path.lstrip("/")
        fate = web.mischief(self.path)
        web.done.append(fate)
        self.close_connection = fate not in ("ok", "flip")
        if fate.isdigit():
            self.send_response(int(fate))
            self.send_header("Content-Length", "0")
            if fate == "429":
                self.send_header("Retry-After", "0")
            self.end_headers()
            return
        if fate == "redirect":
            self.send_response(302)
            self.send_header("Location", "file:///etc/passwd")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fate == "reset":  # RST instead of FIN
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if fate in ("drop", "reset"):
            self.connection.close()
            return
        if fate == "stall":
            web.stop.wait(STALL_S)
            return
        if not path.is_file():
            self.send_error(404)
            return
        whole = path.read_bytes()
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
        assert match, self.headers["Range"]
        first, last = int(match[1]), min(int(match[2]), len(whole) - 1)
        web.asked.append((path.name, first, last))
        content = whole if fate == "whole" else whole[first : last + 1]
        self.send_response(200 if fate == "whole" else 206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(whole)}")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if fate == "truncate":
            content = content[: len(content) // 2]
        if fate == "flip" and content:
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.wfile.write(content)
        self.wfile.flush()


class Quiet(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Whoever breaks connections off on purpose needs no traceback of it."""


@contextmanager
def serving(folder: Path) -> Iterator[WebServer]:
    web = WebServer(folder)
    server = Quiet(("127.0.0.1", 0), type("Bound", (Handler,), {"web": web}))
    server.daemon_threads = True
    web.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield web
    finally:
        web.stop.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def serve() -> Callable[..., object]:
    """(folder) -> a context that serves it, as a WebServer."""
    return serving


def seeded(seed: int, bad: float, fates: tuple[str, ...]) -> Mischief:
    """Each request meets one of ``fates`` with probability ``bad``."""
    dice, lock = random.Random(seed), threading.Lock()

    def decide(_: str) -> str:
        with lock:
            return dice.choice(fates) if dice.random() < bad else "ok"

    return decide


@pytest.fixture
def chaos() -> Callable[[int, float, tuple[str, ...]], Mischief]:
    """(seed, probability, fates) -> a mischief that is dealt at random."""
    return seeded
