"""A layout against its model and batch: every fault with numbers and legal choices, and what `auto` becomes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from vidit.config import FAMILIES, ConfigError, Data, Model, Parallel, RunConfig, Train, Vae
from vidit.train.layout import layout_of, own_tokens, stages_of, with_layout

MODEL = {"windows": ((1, 0, 0), (0, 8, 8)), "cross_keys": "text"}
SKIPPING = {"windows": (("single", 4), ("group", 4)), "relative_position": "rope", "cross_attention": "all"}
THROUGH_TIME = {"temporal_attention": True, "relative_position": "rope"}


def config(parallel: dict[str, Any], **sections: Any) -> RunConfig:
    """24 layers of 16 heads on 5x16x16 tokens, W.A.L.T.'s windows in turn."""
    train = {"global_batch": 64, "micro_batch": 1, "device": "cpu", **sections.pop("train", {})}
    own = sections.pop("model", {})
    model = own if own.get("cross_attention") == "joint" else {**MODEL, **own}
    return RunConfig(
        name="a", vae=Vae(weights="x"), data=Data(train="x"), model=Model(**model), train=Train(**train),
        parallel=Parallel(**parallel), **sections,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("parallel", "ranks", "parts"),
    [
        ({"tensor": 3}, 3, ["16 heads", "parallel.tensor=3", "1 2 4 8 16"]),
        ({"sequence": 5, "sequence_kind": "ulysses"}, 5, ["16 heads", "parallel.sequence=5", "1 2 4 8 16"]),
        ({"sequence": 8, "tensor": 4, "sequence_kind": "ulysses"}, 32, ["4 heads (16 / tensor 4)", "=8", "1 2 4"]),
        ({"sequence": 6, "sequence_kind": "window"}, 6, ["makes 5 windows", "parallel.sequence=6", "1 to 5"]),
        ({"sequence": 4, "sequence_kind": "ulysses_ring", "ulysses": 3}, 4, ["parallel.ulysses=3", "1 2 4"]),
        ({"pipeline": 32}, 32, ["32 stages", "24 blocks", "at most 24"]),
        ({"pipeline": 4, "schedule": "interleaved"}, 4, ["stages_per_rank=1", "2 or more"]),
        ({"pipeline": 4, "stages_per_rank": 2, "schedule": "interleaved", "vae_context": "time", "sequence": 8}, 32,
         ["5 latent frames", "8 ranks"]),
        ({"sharded_norms": True, "tensor": 2, "sequence": 2, "sequence_kind": "window"}, 4, ["whole windows"]),
        ({"cpu_offload": True}, 2, ["cpu_offload", "train.device=cpu"]),
        ({"cpu_offload": True, "tensor": 2}, 2, ["cpu_offload=true has no effect"]),
        ({"reduce_dtype": "bf16", "pipeline": 2}, 2, ["reduce_dtype=bf16 has no effect"]),
        ({"count_communication": True}, 1, ["count_communication=True has no effect"]),
        ({"zero": 2, "replicate": 2}, 2, ["parallel.zero=2 divides nothing", "replicate=2", "zero=0"]),
        ({"cpu_offload": True, "zero": 0}, 2, ["cpu_offload", "parallel.zero=0", "zero=1, 2 or 3"]),
    ],
    ids=lambda value: " ".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict) else "",
)  # fmt: skip
def test_faults(parallel: dict[str, Any], ranks: int, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        with_layout(config(parallel), ranks)
    assert any(all(part in line for part in parts) for line in caught.value.faults), caught.value.faults


def test_a_ring_has_kernels_of_its_own() -> None:
    model = {"relative_position": "rope", "attention_backend": "flash"}
    with pytest.raises(ConfigError, match=r"sequence_kind=ring has kernels of its own.*use auto"):
        with_layout(config({"sequence": 2, "sequence_kind": "ring"}, model=model), 2)
    assert with_layout(config({"sequence": 2, "sequence_kind": "ulysses"}, model=model), 2)


@pytest.mark.parametrize(
    ("parallel", "part"),
    [
        ({"sequence": 2, "sequence_kind": "window"}, "the whole clip is 1 window, fewer than parallel.sequence=2"),
        ({"tensor": 2, "sharded_norms": True}, "sharded_norms=true cuts the video's tokens and not the text's"),
    ],
)
def test_text_tokens_of_a_joint_model(parallel: dict[str, Any], part: str) -> None:
    model = {**FAMILIES["cogvideox"], "width": 768, "num_heads": 16, "patch": 1}
    del model["time_width"]
    ranks = parallel.get("tensor", 1) * parallel.get("sequence", 1)
    with pytest.raises(ConfigError) as caught:
        with_layout(config(parallel, model=model, train={"global_batch": 60}), ranks)
    assert any(part in line for line in caught.value.faults), caught.value.faults
    chosen = with_layout(config({"tensor": 2, "sequence": 2}, model=model), 4).parallel
    assert (chosen.sequence_kind, chosen.sharded_norms) == ("ulysses", False)
    odd = config({"sequence": 3}, model=model, train={"global_batch": 60})
    assert with_layout(odd, 3).parallel.sequence_kind == "ring"  # which 16 heads do not ask to divide


def test_what_torch_does_not_run_together() -> None:
    train = {"compile": True, "activation_checkpointing": "full"}
    with pytest.raises(ConfigError, match=r"parallel\.tensor=2 with train\.compile=true and .* leave one out"):
        with_layout(config({"tensor": 2}, train=train), 2)
    assert with_layout(config({"tensor": 2}, train={"compile": True}), 2)
    assert with_layout(config({"sequence": 2}, train=train), 2)


def test_a_vae_divided_while_every_rank_encodes_its_own_clips() -> None:
    c = config({"sequence": 2, "vae_context": "time"})
    assert with_layout(c, 2)
    cached = c.model_copy(update={"data": c.data.model_copy(update={"cache_latents": True})})
    with pytest.raises(ConfigError, match="encodes clips of its own; leave one out"):
        with_layout(cached, 2)


def test_micro_batches_of_a_pipeline() -> None:
    with pytest.raises(ConfigError, match="gets 2 micro-batches a step and needs at least 4"):
        with_layout(config({"pipeline": 4}, train={"global_batch": 2}), 4)


@pytest.mark.parametrize("ranks", [96, 7])
def test_all_faults_at_once(ranks: int) -> None:
    """Those of the model too where the ranks do not fit the layout."""
    with pytest.raises(ConfigError) as caught:
        with_layout(config({"tensor": 3, "pipeline": 32}), ranks)
    assert len(caught.value.faults) == (3 if ranks == 96 else 4)
    assert any("model.mlp_width=4096 is not divisible by parallel.tensor=3" in line for line in caught.value.faults)
    assert any("16 heads" in line for line in caught.value.faults)
    assert any("32 stages" in line for line in caught.value.faults)


def test_a_group_that_does_not_fit_its_nodes() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.tensor=16 does not divide the 8 ranks of a node"):
        with_layout(config({"tensor": 16}), 16, 8)


@pytest.mark.parametrize(
    ("parallel", "model", "ranks", "kind"),
    [
        ({"sequence": 4}, {}, 4, "ulysses"),  # 5 frames on 4 ranks: one has 1.6 times the mean
        ({"sequence": 5}, {"windows": ((1, 0, 0),)}, 5, "window"),
        ({"sequence": 4}, {"windows": ((1, 8, 8), (0, 8, 8))}, 4, "window"),
        ({"sequence": 4}, {"windows": ((0, 0, 0),), "cross_attention": "all"}, 4, "ulysses"),
        ({"sequence": 5}, {"windows": ((0, 0, 0),), "cross_attention": "all"}, 5, "ring"),
        ({"sequence": 12}, {"windows": ((0, 0, 0),), "cross_attention": "all"}, 12, "ulysses_ring"),
        ({"sequence": 4}, SKIPPING, 4, "window"),
        ({"sequence": 4}, {**SKIPPING, "full_ends": 2}, 4, "ulysses"),
        ({"sequence": 8}, SKIPPING, 8, "ulysses"),
        ({"sequence": 5}, {"windows": ((1, 0, 0),), **THROUGH_TIME}, 5, "ring"),
    ],
)
def test_auto(parallel: dict[str, Any], model: dict[str, Any], ranks: int, kind: str) -> None:
    chosen = with_layout(config(parallel, model=model), ranks).parallel
    assert chosen.sequence_kind == kind
    assert chosen.ulysses == (4 if kind == "ulysses_ring" else 0)


@pytest.mark.parametrize(
    ("ranks", "model", "part"),
    [
        (
            8,
            SKIPPING,
            "a window of (single, 4) on a grid of 5x16x16 tokens: makes 4 windows, fewer than parallel.sequence=8",
        ),
        (4, {**SKIPPING, "full_ends": 2}, "the whole clip is 1 window, fewer than parallel.sequence=4"),
        (5, {"windows": ((1, 0, 0),), **THROUGH_TIME}, "mixes tokens of a block in windows of two kinds"),
    ],
)
def test_what_cannot_be_whole_on_a_rank(ranks: int, model: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        with_layout(config({"sequence": ranks, "sequence_kind": "window"}, model=model), ranks)
    assert any(part in fault for fault in caught.value.faults), caught.value.faults


def test_the_rest_of_the_ranks_is_shard() -> None:
    fixed = with_layout(config({"tensor": 2, "replicate": 2}), 16)
    assert layout_of(fixed).degrees == (1, 2, 4, 1, 2)
    assert with_layout(fixed, 16) == fixed
    with pytest.raises(ConfigError, match="takes 16 ranks, but there are 8"):
        with_layout(fixed, 8)


def test_stages_cover_the_layers() -> None:
    stages = stages_of(with_layout(config({"pipeline": 4}), 4))
    assert [layer for stage in stages for layer in stage] == list(range(24))
    assert len({len(stage) for stage in stages}) <= 2


def test_tokens_of_a_rank() -> None:
    grid = (5, 16, 16)
    dealt = with_layout(config({"sequence": 4, "sequence_kind": "window"}), 4)
    assert [[own_tokens(dealt, grid, layer, rank) for rank in range(4)] for layer in (0, 1)] in (
        [[256, 256, 256, 512], [320] * 4], [[512, 256, 256, 256], [320] * 4],
        [[256, 512, 256, 256], [320] * 4], [[256, 256, 512, 256], [320] * 4],
    )  # fmt: skip
    skipped = with_layout(config({"sequence": 4}, model=SKIPPING), 4)
    assert [[own_tokens(skipped, (5, 3, 3), layer, rank) for rank in range(4)] for layer in (0, 1)] == [
        [12, 11, 11, 11], [12, 12, 12, 9],
    ]  # fmt: skip
    even = with_layout(config({"sequence": 3, "tensor": 2, "sequence_kind": "ring"}), 6)
    assert even.parallel.sharded_norms is True
    assert own_tokens(even, grid, 0, 2) == 214  # 1280 / 3 and that / 2, rounded up
    whole = with_layout(config({"sequence": 4, "tensor": 2, "sequence_kind": "window"}), 8)
    assert whole.parallel.sharded_norms is False


@pytest.mark.parametrize(
    ("parallel", "parts"),
    [
        ({"tensor": 2}, ["parallel.tensor=2 does not apply to train.task=vae"]),
        ({"pipeline": 2}, ["parallel.pipeline=2 does not apply to train.task=vae"]),
        ({"sequence": 2}, ["divides nothing of a VAE without parallel.vae_context=time or rows"]),
        ({"sequence": 8, "vae_context": "time"}, ["5 latent frames"]),
        ({"sequence": 3, "vae_context": "rows"}, ["16 latent rows are not divisible by 3 ranks"]),
    ],
)
def test_a_vae(parallel: dict[str, Any], parts: list[str]) -> None:
    c = RunConfig(
        name="a", data=Data(train="x"), train=Train(task="vae", global_batch=8, micro_batch=1),
        parallel=Parallel(**parallel),
    )  # fmt: skip
    ranks = c.parallel.ranks_per_row
    with pytest.raises(ConfigError) as caught:
        with_layout(c, ranks)
    assert any(all(part in line for part in parts) for line in caught.value.faults), caught.value.faults


def test_it_needs_no_torch() -> None:
    code = "import sys, vidit.train.layout\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
