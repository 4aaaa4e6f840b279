"""Saved on one layout, loaded on another: every tensor bit for bit, and the next step that of one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import checkpoint_case
import pytest
import torch
from checkpoint_case import Job
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from benchmarks.rank_pool import Pool, TaskError
from parallel import checkpoint, matrices
from parallel.layout import Layout

LAYOUTS: dict[str, Job] = {
    "one": Job(None, Path()),
    "zero2": Job({"shard": 2}, Path()),
    "zero2 gathered": Job({"shard": 2}, Path(), keep_gathered=True),
    "zero3": Job({"shard": 2, "sequence": 2}, Path()),
    "zero4": Job({"shard": 4}, Path()),
    "hsdp 2x2": Job({"replicate": 2, "shard": 2}, Path()),
    "tp2": Job({"tensor": 2}, Path(), zero=False),
    "tp2 zero2": Job({"shard": 2, "tensor": 2}, Path()),
}
# Each layout writes once and reads once or more.
PAIRS = {
    "one": "tp2 zero2", "zero2": "one", "zero2 gathered": "zero2 gathered", "zero3": "hsdp 2x2", "zero4": "tp2",
    "hsdp 2x2": "zero4", "tp2": "zero3", "tp2 zero2": "zero4",
}  # fmt: skip
Saved = dict[str, tuple[Path, dict[str, Tensor]]]


def run(pool: Pool, function: str, job: Job) -> list:
    call = getattr(checkpoint_case, function)
    return [call(job)] if job.layout is None else pool.run(Layout(**job.layout).world, call, job)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def saved(pool: Pool, root: Path) -> Saved:
    """Layout -> (checkpoint, the tensors that went into it)"""
    found = {}
    for name, job in LAYOUTS.items():
        folder = root / name.replace(" ", "-")
        tensors = run(pool, "save", replace(job, folder=folder, background=name != "zero4"))[0]
        found[name] = checkpoint.folder_of(folder, checkpoint_case.STEPS), tensors
    return found


@pytest.fixture(scope="module")
def after(saved: Saved) -> dict[str, Tensor]:
    """One process, three steps without a stop."""
    state, _ = checkpoint_case.build(LAYOUTS["one"], 1)
    checkpoint_case.train(state, None, LAYOUTS["one"], checkpoint_case.STEPS + 1)
    return checkpoint_case.full(state)


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest of all tensors' relative errors; what is near nothing in its kind counts as that."""
    assert found.keys() == expected.keys()
    floor: dict[str, float] = {}
    for name, tensor in expected.items():
        kind = name.partition(".")[0]
        floor[kind] = max(floor.get(kind, 0.0), 1e-6 * float(tensor.norm()))
    return max(
        float((found[name] - t).norm()) / max(floor[name.partition(".")[0]], float(t.norm()))
        for name, t in expected.items()
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_as_one_process(saved: Saved, name: str) -> None:
    """AdamW, Muon and the average on divided parameters: weights, moments and averages after two steps."""
    assert {n.partition(".")[0] for n in saved[name][1]} == {
        "model", "ema", "exp_avg", "exp_avg_sq", "momentum_buffer"
    }  # fmt: skip
    assert all(tensor.dtype == torch.float64 for tensor in saved[name][1].values())
    assert error(saved[name][1], saved["one"][1]) <= 1e-11


@pytest.mark.parametrize(("written", "read"), PAIRS.items())
def test_another_layout_goes_on(pool: Pool, saved: Saved, after: dict[str, Tensor], written: str, read: str) -> None:
    folder, expected = saved[written]
    loaded, trained = run(pool, "load", replace(LAYOUTS[read], folder=folder))[0]
    assert loaded.keys() == expected.keys()
    assert [name for name in loaded if not torch.equal(loaded[name], expected[name])] == []
    assert error(trained, after) <= 1e-11


@pytest.mark.parametrize("name", ["one", "zero4", "hsdp 2x2", "tp2", "tp2 zero2"])
def test_every_number_is_written_once(saved: Saved, name: str) -> None:
    """Replicas share the writing: no part twice, and no rank with much more than the others where all hold all."""
    folder, tensors = saved[name]
    data = sum(tensor.numel() for tensor in tensors.values()) * 8
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    job = LAYOUTS[name]
    assert len(sizes) == (1 if job.layout is None else Layout(**job.layout).world)
    assert 0 <= sum(sizes) - data <= 60_000 * len(sizes), "headers"
    assert max(sizes) < 1.4 * min(sizes)
    assert {path.name for path in folder.iterdir()} == {*checkpoint.verify(folder)["files"], "manifest.json"}


@pytest.mark.parametrize("name", ["one", "zero4", "tp2 zero2"])
def test_torchs_own_reader_reads_it(saved: Saved, name: str) -> None:
    folder, expected = saved[name]
    found = {n: torch.zeros_like(t) for n, t in expected.items()}
    dcp_load(found, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    assert all(torch.equal(found[n], t) for n, t in expected.items())


def test_what_torchs_own_writer_wrote_is_read(saved: Saved, tmp_path: Path) -> None:
    """Checkpoints of runs that were saved by it."""
    _, expected = saved["one"]
    folder = checkpoint.save(tmp_path, 1, {"x": torch.zeros(2)}, {"old": True})
    for path in folder.iterdir():
        path.unlink()
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp_save(dict(expected), storage_writer=writer, no_dist=True)
    found = {n: torch.zeros_like(t) for n, t in expected.items()}
    index = checkpoint.index_of(folder, [path.name for path in folder.iterdir()])
    kept = {n: {"shape": list(t.shape), "dtype": "float64"} for n, t in expected.items()}
    stored = checkpoint.Stored(folder, {"tensors": kept}, index)
    assert all(torch.equal(stored.whole(n), t) for n, t in expected.items())
    assert found.keys() == index.keys()


def test_muon_on_parts_would_be_seen(pool: Pool, saved: Saved, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: each rank makes its own part of a matrix orthogonal."""
    found = pool.run(2, checkpoint_case.save_planted, Job({"shard": 2}, root / "planted"))[0]
    assert error(found, saved["one"][1]) > 1e-3
    assert matrices.cuts(torch.zeros(2)) == []


def test_pipeline_stages_hold_other_names(pool: Pool, tmp_path: Path) -> None:
    replies = pool.run(2, checkpoint_case.stages, tmp_path)
    folder = checkpoint.folder_of(tmp_path, 1)
    assert checkpoint.verify(folder)["tensors"].keys() == {"model.embed", *replies[0][1], *replies[1][1]}
    assert replies[0][0] == replies[1][0]
    assert "does not fit this model: model.embed has no place here; model.1.2 has no place here" in replies[0][0]


def test_a_damaged_file_is_named_on_every_rank(pool: Pool, saved: Saved, tmp_path: Path) -> None:
    """The last rank's file, which one rank checks; nothing is changed anywhere."""
    folder, _ = saved["tp2 zero2"]
    path = folder / "rank-00003.safetensors"
    data = path.read_bytes()
    try:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        replies = run(pool, "load_outcome", replace(LAYOUTS["zero2"], folder=folder))
    finally:
        path.write_bytes(data)
    assert {said for said, _ in replies} == {
        f"{path} is damaged: its SHA-256 differs from the manifest's. Nothing was changed; restore the file, or "
        f"delete {folder} to resume from the checkpoint before it"
    }
    assert all(unchanged for _, unchanged in replies)


def test_a_full_disk_on_one_rank_is_an_error_on_all(pool: Pool, tmp_path: Path) -> None:
    """Heard at the next call; the checkpoint before stays, and the next save works."""
    job = Job({"shard": 2}, tmp_path, background=True)
    replies = pool.run(2, checkpoint_case.failing_save, job)
    assert replies[0] == replies[1]
    first, second, third = replies[0]
    assert (first, third) == ("done", "done")
    assert "step-00000002: rank 1: [Errno 28] No space left on device; free space or choose another" in second
    assert checkpoint.steps(tmp_path) == [1, 3]
    assert not list(tmp_path.glob("*.partial"))


def test_averages_reach_gathered_weights(pool: Pool) -> None:
    assert all(run(pool, "gathered_average", LAYOUTS["zero2 gathered"]))
    with pytest.raises(TaskError, match="must match the size"):
        run(pool, "gathered_average_planted", LAYOUTS["zero2 gathered"])


def test_a_rank_that_hangs_is_named(pool: Pool, tmp_path: Path) -> None:
    replies = pool.run(2, checkpoint_case.late_save, Job({"shard": 2}, tmp_path, background=True))
    assert replies[0] == replies[1]
    assert replies[0][0] == "done"
    assert "step-00000001: rank 1: not written in 0.5 s; free space" in replies[0][1]
    assert checkpoint.steps(tmp_path) == []


def test_plain_parameters_and_two_meshes_in_one_model(pool: Pool) -> None:
    assert max(pool.run(4, checkpoint_case.mixed, False)) <= 1e-14
    assert min(pool.run(4, checkpoint_case.mixed, True)) > 1e-3


def test_the_layouts_cut_in_every_way(pool: Pool) -> None:
    """Empty parts, and uneven ones below a cut of tensor parallelism, where torch's and our arithmetic agree."""
    assert "empty" in run(pool, "cut_unevenly", LAYOUTS["zero4"])[0]
    assert {"strided", "strided, uneven"} <= run(pool, "cut_unevenly", LAYOUTS["tp2 zero2"])[0]
