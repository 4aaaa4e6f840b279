"""What many tests need: a tiny VAE, a few procedural clips, a tiny run on them, the command as a process, and a
web server on loopback that serves byte ranges and misbehaves when told."""

from __future__ import annotations

import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from vidit.config import RunConfig, Vae

ROOT = Path(__file__).parents[1]
TINY_VAE = {
    "latent_channels": 4,
    "patch": 2,
    "base_channels": 8,
    "multipliers": (1, 2),
    "num_res_blocks": (0, 1),
    "decoder_res_blocks": (0, 1),
    "spatial_down": (True,),
    "temporal_down": (True,),
}
TINY: dict[str, dict[str, Any]] = {
    "text": {"width": 32, "num_layers": 1, "num_heads": 2, "max_tokens": 12, "hash_buckets": 64},
    "model": {
        "num_layers": 2, "width": 32, "num_heads": 4, "mlp_width": 64, "patch": 2,
        "windows": ((1, 0, 0), (0, 2, 2)), "pooled_text": True, "self_conditioning": 0.0,
    },
    "data": {"num_validation": 4, "num_frames": 5, "height": 32, "width": 32, "num_workers": 0},
    "train": {
        "steps": 6, "global_batch": 4, "micro_batch": 2, "learning_rate": 3e-3, "precision": "fp32", "device": "cpu",
        "ema_decay": 0.9, "checkpoint_every": 3, "validate_every": 3, "log_every": 1, "num_time_bands": 2,
    },
    "sample": {"num_steps": 2, "guidance": 2.0, "prompts": ("a red circle moves left",)},
}  # fmt: skip

Configure = Callable[..., RunConfig]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests of one file go to one process, and all that share the pool of ranks: fixtures are made once.

    Where nothing else is asked for, each process has a pool: `pytest -n 2 tests/dist`.
    """
    alone = [arg.rstrip("/") for arg in config.args] == ["tests/dist"]
    from xdist.scheduler import LoadScopeScheduling

    class ByFixtures(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "tests/dist" if file.startswith("tests/dist/") and not alone else file

    return ByFixtures(config, log)


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a VAE of strides 2x4x4 and 4 channels: initial weights, plausible latent statistics."""
    import torch

    from vidit.model.init import initialise
    from vidit.vae.autoencoder import CausalVae
    from vidit.vae.store import save_vae

    vae = CausalVae(Vae(**TINY_VAE))
    initialise(vae, seed=1)
    vae.latent_mean.copy_(torch.linspace(-0.2, 0.2, 4))
    vae.latent_std.copy_(torch.linspace(0.3, 0.6, 4))
    folder = tmp_path_factory.mktemp("tiny") / "vae"
    save_vae(folder, vae)
    return folder


@pytest.fixture(scope="session")
def tiny_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 procedural clips of 5 frames of 32x32."""
    from vidit.data.scene_pack import pack_scenes

    folder = tmp_path_factory.mktemp("tiny") / "clips"
    pack_scenes(folder, 16, "train", 0, num_frames=5, height=32, width=32, workers=0)
    return folder


@pytest.fixture(scope="session")
def mixed_clips(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Sequence[tuple[int, int, int]]], Path]:
    """Shapes (frames, height, width) -> a folder of 24 clips of noise that have them in turn."""
    import numpy as np

    from vidit.data.encode import encode_mp4
    from vidit.data.shard_writer import ShardWriter

    def write(shapes: Sequence[tuple[int, int, int]]) -> Path:
        rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("mixed") / "clips"
        with ShardWriter(folder) as writer:
            for i in range(24):
                t, h, w = shapes[i % len(shapes)]
                video = encode_mp4(rng.integers(0, 256, (t, h, w, 3), dtype=np.uint8), 8)
                writer.add(f"clip-{i}", video, {"caption": f"clip {i}"})
        return folder

    return write


@pytest.fixture(scope="session")
def configure(tiny_vae: Path, tiny_clips: Path) -> Configure:
    """(run_dir, section={field: value}, ...) -> the tiny run with those fields changed; a dotless key is top level."""

    def build(run_dir: Path | str = "", **changes: Any) -> RunConfig:
        vae = TINY_VAE if changes.get("train", {}).get("task") == "vae" else {"weights": str(tiny_vae)}
        tree: dict[str, Any] = {"name": "tiny", "run_dir": str(run_dir), "vae": vae}
        acts = TINY if "weights" in vae else ("data", "train")
        tree |= {name: dict(TINY[name]) for name in acts}
        tree["data"]["train"] = str(tiny_clips)
        if "weights" not in vae:
            del tree["train"]["num_time_bands"]  # a VAE has no timesteps
        for name, change in changes.items():
            tree[name] = {**tree.get(name, {}), **change} if isinstance(change, dict) else change
        return RunConfig.model_validate(tree)

    return build


@pytest.fixture(scope="session")
def config_file() -> Callable[[Path, RunConfig], str]:
    """(folder, config) -> the name of a config file that returns it, as `vidit train` takes it."""

    def write(folder: Path, config: RunConfig) -> str:
        path = folder / "tiny.py"
        path.write_text(
            "from vidit.config import RunConfig\n\n\n"
            f"def tiny():\n    return RunConfig.model_validate_json({config.to_json()!r})\n"
        )
        return str(path)

    return write


@pytest.fixture(scope="session")
def command() -> Callable[..., subprocess.Popen[str]]:
    """(arguments of `vidit`) -> the running process, text pipes, one thread, in a process group of its own."""

    def start(*arguments: object, extra: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(extra or {})}
        return subprocess.Popen(
            [sys.executable, "-m", "vidit.cli", *map(str, arguments)],
            cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip

    return start


@pytest.fixture(scope="session")
def vidit(command: Callable[..., subprocess.Popen[str]]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """(arguments of `vidit`) -> the finished process."""

    def run(*arguments: object, extra: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        process = command(*arguments, extra=extra)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, where this user may mount one; else the test is skipped."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("no tmpfs can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


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


@pytest.fixture
def torchcodec() -> None:
    """The test is skipped where torchcodec is not installed, or finds no FFmpeg."""
    from vidit.data.torchcodec_window import torchcodec_decoders

    try:
        torchcodec_decoders()
    except ValueError as error:
        pytest.skip(str(error))
