"""Saving beside the training: the training thread copies, another one writes.

`Saver.save` copies what this rank writes into one host buffer (pinned for an accelerator, kept for the next save),
and returns. A thread hashes, writes and syncs it as `rank-00003.safetensors`, then leaves `rank-00003.json` with
the hash. The thread of rank 0 waits for all of these, writes the manifest, renames the folder and prunes. Threads
talk by these files alone: the process groups belong to the training thread, which asks for the outcome at the
next `save` or `finish`. A process killed at any moment leaves the checkpoints before as they were.
"""

import json
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.dtensor import local
from parallel.exchange import exchange, first_fault, num_ranks, own_rank
from parallel.manifest import CheckpointError, folder_of, partial_of, prune, remove, sync, write_json, write_manifest
from parallel.save_plan import SavePlan, held, make_plan, signature, told_by_all
from parallel.shard_file import content, header, total_bytes, views, write

POLL_S = 0.02


class Saver:
    """Saves checkpoints of one run, one at a time. Every method is collective over the default process group.

    `background`: return from `save` when the tensors are copied; else when the checkpoint is whole. `timeout_s` is how
    long a save may take, and has to be shorter than the time after which a collective of the group gives up.
    """

    def __init__(self, background: bool = True, timeout_s: float = 300.0):
        self.background, self.timeout_s = background, timeout_s
        self._plan: SavePlan | None = None
        self._signature: list[tuple[Any, ...]] = []
        self._buffer: Tensor | None = None
        self._job: _Job | None = None

    def save(
        self,
        root: Path,
        step: int,
        tensors: Mapping[str, Tensor],
        facts: Mapping[str, Any],
        keep: int | None = None,
        keep_every: int = 0,
    ) -> Path:
        """Write `root/step-XXXXXXXX` whole or not at all, then prune as `manifest.prune` does; returns the folder.

        The tensors may change as soon as this returns. Raises CheckpointError, on every rank the same, where the save
        before this one failed or where this one does: then the partial folder is removed and every earlier checkpoint
        is as it was.
        """
        self.finish()
        folder = folder_of(root, step)
        fault = first_fault(_cleared(folder) if own_rank() == 0 else None)
        if fault is not None:
            raise CheckpointError(_cannot_save(folder, fault))
        plan = self._planned(tensors)
        self._job = job = _Job(folder, plan, facts, keep, keep_every, self.timeout_s)
        try:
            self._stage(tensors, job)
        except Exception as error:  # no memory for the copy, on this rank: the others hear of it at the outcome
            job.error = error
        job.thread.start()
        if not self.background:
            self.finish()
            self._buffer = None
        return folder

    @property
    def writing(self) -> bool:
        """Whether this rank's thread is at work."""
        return self._job is not None and self._job.thread.is_alive()

    def finish(self) -> None:
        """Wait for the save in flight, if there is one. Raises as `save` does."""
        job, self._job = self._job, None
        if job is None:
            return
        try:
            self._conclude(job)
        except BaseException:
            job.abandoned.set()
            raise

    def join(self) -> None:
        """Wait for this rank's thread, whatever comes of the save: not collective, for a process that is alone."""
        if self._job is not None:
            self._job.thread.join()

    def _conclude(self, job: "_Job") -> None:
        written = job.written.wait(self.timeout_s)
        late = None if written else f"not written in {self.timeout_s:g} s"
        fault = first_fault(late or job.fault())
        if fault is not None:
            job.abandoned.set()
        if late is None:
            job.thread.join()
        fault = fault or first_fault(job.fault())
        if fault is None:
            return
        if own_rank() == 0:
            shutil.rmtree(partial_of(job.folder), ignore_errors=True)
        if num_ranks() == 1 and job.error is not None and not isinstance(job.error, OSError):
            raise job.error
        raise CheckpointError(_cannot_save(job.folder, fault)) from job.error

    def _planned(self, tensors: Mapping[str, Tensor]) -> SavePlan:
        """The plan of the last save where nothing has changed on any rank, else a new one."""
        found = signature(tensors)
        same = all(exchange(self._plan is not None and found == self._signature))
        if self._plan is None or not same:
            self._plan, self._signature = make_plan(told_by_all(held(tensors))), found
        return self._plan

    @torch.no_grad()
    def _stage(self, tensors: Mapping[str, Tensor], job: "_Job") -> None:
        """Copy what this rank writes. On an accelerator the copies are queued behind what made the values."""
        parts = job.parts
        devices = {part.name: local(tensors[part.name]).device for part in parts}
        accelerators = {device for device in devices.values() if device.type != "cpu"}
        size = total_bytes(parts)
        if self._buffer is None or self._buffer.numel() != size:
            self._buffer = None  # before the new one is made: two may not fit
            self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=bool(accelerators))
        for part, target in views(self._buffer, parts):
            target.copy_(local(tensors[part.name]), non_blocking=True)
        for device in accelerators:
            event = torch.get_device_module(device).Event()
            event.record()
            job.events.append(event)
        job.buffer = self._buffer


class _Job:
    """One save: what its thread needs, and what became of it."""

    def __init__(
        self,
        folder: Path,
        plan: SavePlan,
        facts: Mapping[str, Any],
        keep: int | None,
        keep_every: int,
        timeout_s: float,
    ):
        self.folder, self.plan, self.facts = folder, plan, dict(facts)
        self.keep, self.keep_every, self.timeout_s = keep, keep_every, timeout_s
        self.rank, self.world = own_rank(), num_ranks()
        self.parts = plan.parts[self.rank]
        self.buffer: Tensor | None = None
        self.events: list[Any] = []
        self.error: BaseException | None = None
        self.written, self.abandoned = threading.Event(), threading.Event()
        # No daemon: one process that leaves by an error still completes the save in flight (ranks end by os._exit).
        self.thread = threading.Thread(target=self._run, name="checkpoint")

    def fault(self) -> str | None:
        """The error as text that travels to other ranks."""
        if self.error is None or isinstance(self.error, OSError):
            return None if self.error is None else str(self.error)
        return f"{type(self.error).__name__}: {self.error}"

    def _run(self) -> None:
        try:
            if self.error is None:
                self._write()
        except BaseException as error:
            self.error = error
        finally:
            self.written.set()
        if self.rank or self.error is not None:
            return
        try:
            self._commit()
        except BaseException as error:
            self.error = error

    def _write(self) -> None:
        """This rank's file, then the word that it is whole."""
        partial, name = partial_of(self.folder), f"rank-{self.rank:05d}"
        partial.mkdir(parents=True, exist_ok=True)
        for event in self.events:
            event.synchronize()
        files = {}
        if self.parts:
            assert self.buffer is not None
            file = f"{name}.safetensors"
            files[file] = write(partial / file, header(self.parts), [content(self.buffer)])
        write_json(partial / f"{name}.json", files)

    def _commit(self) -> None:
        """On rank 0: gather the hashes, write the manifest, give the folder its name."""
        partial = partial_of(self.folder)
        files: dict[str, Any] = {}
        for path in self._words(partial):
            files |= json.loads(path.read_text())
            path.unlink()
        step = int(self.folder.name.removeprefix("step-"))
        write_manifest(partial, step, self.plan.tensors, self.facts, files)
        if self.folder.exists():
            remove(self.folder)
        partial.rename(self.folder)
        sync(self.folder.parent)
        if self.keep is not None:
            prune(self.folder.parent, self.keep, self.keep_every)

    def _words(self, partial: Path) -> list[Path]:
        """The hashes' files of all ranks, when all are there. Raises TimeoutError."""
        words = [partial / f"rank-{number:05d}.json" for number in range(self.world)]
        deadline = time.monotonic() + self.timeout_s
        while missing := [number for number, path in enumerate(words) if not path.is_file()]:
            if self.abandoned.wait(POLL_S):
                raise InterruptedError("given up, because another rank failed")
            if time.monotonic() > deadline:
                late = " ".join(map(str, missing))
                raise TimeoutError(f"ranks {late} have not written their parts in {self.timeout_s:g} s")
        return words


def _cleared(folder: Path) -> str | None:
    """Make an empty partial folder, in place of what a crashed save left; the fault, if that fails."""
    partial = partial_of(folder)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        return str(error)
    return None


def _cannot_save(folder: Path, reason: str) -> str:
    return (
        f"cannot save {folder}: {reason}; free space or choose another run_dir, then run the same command "
        "again: earlier checkpoints are untouched"
    )
