"""Sets of latents: what they hold, that a run on them is the run on the videos, what is refused or left by a stop."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from vidit.cli import main
from vidit.config import ConfigError, RunConfig
from vidit.data.curation.score_set import score_set
from vidit.data.encoded import read_encoding
from vidit.data.limits import ShardError
from vidit.data.manifest import MANIFEST
from vidit.data.pack import pack
from vidit.data.shard_writer import ShardWriter
from vidit.data.shards import ClipRef, read_clip, read_index
from vidit.data.video import decode_clip
from vidit.train import encode_run as encode_run_module
from vidit.train.clips import read_splits
from vidit.train.encode_run import encode_run
from vidit.train.encode_set import EncodeReport
from vidit.train.metrics import read_metrics
from vidit.train.run import run
from vidit.train.step import to_pixels
from vidit.train.stop import StoppedError, StopRequest
from vidit.vae.store import load_vae, save_vae

Configure = Callable[..., RunConfig]
CPU = torch.device("cpu")
BUCKETS = ({"num_frames": 5, "height": 32, "width": 32}, {"num_frames": 1, "height": 32, "width": 32})


def encode(config: RunConfig, out: Path, storage: Any = "fp32", per_shard: int = 6, **more: Any) -> EncodeReport:
    return encode_run(config, out, storage, per_shard, **more)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def logged(config: RunConfig) -> list[tuple[float, float, list[str]]]:
    assert run(config)
    rows = [row for row in read_metrics(config.directory) if "loss" in row]
    # Clips of a mixture are called by their folder too, which is another one.
    return [(row["loss"], row["grad_norm"], [key.rpartition("/")[2] for key in row["keys"]]) for row in rows]


def validated(config: RunConfig) -> list[float]:
    return [row["validation"]["loss"] for row in read_metrics(config.directory) if "validation" in row]


def assert_same(found: Sequence[Any], expected: Sequence[Any], within: float) -> None:
    assert [keys for *_, keys in found] == [keys for *_, keys in expected]
    assert [row[:2] for row in found] == [pytest.approx(row[:2], rel=within) for row in expected]


def test_a_clip_is_the_raw_posterior_of_its_cut(configure: Configure, tiny_clips: Path, tmp_path: Path) -> None:
    config = configure(tmp_path)
    report = encode(config, tmp_path / "out")
    assert (report.num_clips, report.num_shards, report.skipped) == (16, 3, [])
    refs = read_index(tmp_path / "out")
    videos = read_index(tiny_clips)
    assert [ref.key for ref in refs] == [ref.key for ref in videos]
    vae = load_vae(Path(config.vae.weights or ""), CPU, torch.float32)
    for ref, video in list(zip(refs, videos, strict=True))[::5]:
        stored, caption, sidecar = read_clip(ref)
        member, expected, _ = read_clip(video)
        assert caption == expected
        assert sidecar["encoded_from"]["key"] == video.key
        pixels = decode_clip(member, num_frames=5, height=32, width=32, fps=0.0)
        posterior = vae.encode(to_pixels(pixels[None], CPU))
        tensors = load(stored)
        assert set(tensors) == {"mean", "std"}, "the byte encoder is trained, so its text is not stored"
        torch.testing.assert_close(tensors["mean"], posterior.mean[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tensors["std"], (0.5 * posterior.log_variance[0]).exp(), rtol=1e-4, atol=1e-5)
    encoding = read_encoding(tmp_path / "out")
    assert encoding is not None
    assert encoding.facts["shapes"] == [[5, 32, 32]]


@pytest.mark.parametrize("change", [{}, {"data": {"image_rows": 1}, "train": {"micro_batch": 3, "global_batch": 6}}])
def test_a_run_on_latents_is_the_run_on_the_videos(configure: Configure, tmp_path: Path, change: Any) -> None:
    """Losses, norms, validation and the order of the clips, validation being the last clips of the same folder."""
    more = {**change, "sample": {"prompts": ()}}
    direct = configure(tmp_path / "direct", **more)
    encode(direct, tmp_path / "out")
    encode(direct, tmp_path / "half", "fp16")
    expected = logged(direct)
    for name, within in (("out", 1e-6), ("half", 5e-3)):
        data = {**change.get("data", {}), "train": str(tmp_path / name)}
        config = configure(tmp_path / f"run-{name}", **{**more, "data": data})
        assert_same(logged(config), expected, 5 * within)
        assert validated(config) == pytest.approx(validated(direct), rel=5 * within)


def test_videos_and_latents_share_a_micro_batch(configure: Configure, tiny_clips: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_clips, tmp_path / "other"))
    encode(configure(tmp_path, data={"train": str(other)}), tmp_path / "latents")

    def config(name: str, second: Path) -> RunConfig:
        mixture = ({"path": str(tiny_clips), "weight": 1}, {"path": str(second), "weight": 1})
        data = {"train": "", "mixture": mixture, "num_validation": 0, "image_rows": 1, "num_workers": 1}
        train = {"micro_batch": 4, "global_batch": 8}
        run_dir = tmp_path / name
        tree = configure(run_dir, data=data, train=train, sample={"prompts": ()}).model_dump()
        tree["data"]["train"] = ""
        return RunConfig.model_validate(tree)

    expected = logged(config("direct", other))
    assert_same(logged(config("mixed", tmp_path / "latents")), expected, 5e-6)


def test_each_clip_is_encoded_in_its_bucket(configure: Configure, tmp_path: Path) -> None:
    """Also where chance decides: latents stay in the bucket that they were encoded for."""
    buckets = ({**BUCKETS[0], "keep": 0.5}, BUCKETS[1])
    data = {"buckets": buckets, "num_validation": 0}
    direct = configure(tmp_path / "direct", data=data, sample={"prompts": ()})
    encode(direct, tmp_path / "out", per_shard=3)
    shapes = {(ref.num_frames, ref.shard_path.name) for ref in read_index(tmp_path / "out")}
    assert {frames for frames, _ in shapes} == {1, 5}
    assert len({name for _, name in shapes}) == len(shapes), "a shard holds one shape"
    config = configure(tmp_path / "run", data={**data, "train": str(tmp_path / "out")}, sample={"prompts": ()})
    catalogs = [read_splits(each)[0].catalog for each in (direct, config)]
    assert config.train.seed == direct.train.seed
    seeded = config.model_copy(update={"train": config.train.model_copy(update={"seed": 5})})
    catalogs.append(read_splits(seeded)[0].catalog)
    buckets_of = [dict(zip((r.key for r in c.refs), c.bucket.tolist(), strict=True)) for c in catalogs]
    assert buckets_of[0] == buckets_of[1] == buckets_of[2]
    assert_same(logged(config), logged(direct), 5e-6)


def test_the_same_command_again_and_other_ones(configure: Configure, tmp_path: Path) -> None:
    config, out = configure(tmp_path), tmp_path / "out"
    first = encode(config, out)
    before = content(out)
    again = encode(config, out)
    assert again.unchanged
    assert not first.unchanged
    assert content(out) == before
    with pytest.raises(ValueError, match=r'out was encoded with other settings; storage: "fp32", now "fp16"'):
        encode(config, out, "fp16")
    with pytest.raises(ValueError, match=r"fps: 0\.0, now 4\.0"):
        encode(configure(tmp_path, data={"fps": 4.0, "num_frames": 1}), out)
    assert content(out) == before
    encode(config, out, "bf16", overwrite=True)
    assert content(out) != before
    with pytest.raises(ValueError, match=r"clips holds dataset.json of a data set that is no latents"):
        encode(config, Path(shutil.copytree(config.data.train, tmp_path / "clips")))


class Stops(StopRequest):
    """A request to stop that comes at the n-th question."""

    left = 0

    def check_alone(self) -> None:
        Stops.left -= 1
        if Stops.left < 0:
            raise StoppedError


def test_a_stop_anywhere_leaves_the_same_bytes(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = configure(tmp_path), tmp_path / "out"
    encode(config, tmp_path / "whole", per_shard=4)
    monkeypatch.setattr(encode_run_module, "StopRequest", Stops)
    for number in (0, 1, 2, 1, 3):
        Stops.left = number
        with pytest.raises(RuntimeError, match="stopped before all was encoded"):
            encode_run(config, out, "fp32", 4)
        assert not out.exists()
    with pytest.raises(ValueError, match='was encoded with other settings; storage: "fp32", now "bf16"'):
        encode(config, out, "bf16", 4)
    Stops.left = 100
    encode(config, out, per_shard=4)
    assert content(out) == content(tmp_path / "whole")
    assert 100 - Stops.left <= 4, "what was whole is not made again"


def packed(folder: Path, clips: Sequence[tuple[str, bytes, str]]) -> Path:
    with ShardWriter(folder, allow_empty_captions=True) as writer:
        for key, video, text in clips:
            writer.add(key, video, {"caption": text, "width": 32, "height": 32, "fps": 8.0, "num_frames": 5})
    return folder


def test_what_cannot_be_encoded_is_named(configure: Configure, tiny_clips: Path, tmp_path: Path) -> None:
    videos = [read_clip(ref)[0] for ref in read_index(tiny_clips)[:6]]
    clips = [(f"{i}", v[: len(v) // 2] if i in {0, 1, 4} else v, "x") for i, v in enumerate(videos)]
    data = {"train": str(packed(tmp_path / "data", clips)), "num_validation": 0}
    report = encode(configure(tmp_path, data=data), tmp_path / "out", per_shard=2)
    assert [key for key, _ in report.skipped] == ["0", "1", "4"]
    assert [ref.key for ref in read_index(tmp_path / "out")] == ["2", "3", "5"]
    assert [key for key, _ in json.loads((tmp_path / "out" / "encode_report.json").read_text())["skipped"]] == [
        "0", "1", "4"
    ]  # fmt: skip
    data["train"] = str(packed(tmp_path / "broken", clips[:2]))
    with pytest.raises(ValueError, match="none of 2 clips can be encoded; the first: 0: "):
        encode(configure(tmp_path, data=data), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def faults_of(config: RunConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        run(config)
    assert not list(config.directory.glob("checkpoints/*"))
    return str(caught.value)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"random_crop": True}, "holds one cut of each clip, which data.random_crop=true contradicts"),
        ({"horizontal_flip": 0.5}, "holds one cut of each clip, which data.horizontal_flip=0.5 contradicts"),
        ({"fps": 4.0, "num_frames": 3}, "was encoded with data.fps=0, the run has 4; change data.fps, or encode again"),
        ({"num_frames": 3}, "was encoded in 5x32x32 (frames x height x width), the run has 3x32x32; change"),
        ({"num_frames": 9}, "was encoded in 5x32x32 (frames x height x width), the run has 9x32x32; change"),
        ({"height": 16}, "was encoded in 5x32x32 (frames x height x width), the run has 5x16x32; change"),
        ({"cache_latents": True}, "data.cache_latents=true has no effect on"),
    ],
)
def test_another_cut_is_refused(configure: Configure, tmp_path: Path, data: dict[str, Any], told: str) -> None:
    encode(configure(tmp_path), tmp_path / "out")
    assert told in faults_of(configure(tmp_path / "run", data={"train": str(tmp_path / "out"), **data}))


def test_another_vae_is_refused_and_another_decoder_is_not(
    configure: Configure, tiny_vae: Path, tmp_path: Path
) -> None:
    encode(configure(tmp_path), tmp_path / "out")
    vae = load_vae(tiny_vae, CPU, torch.float32)
    vae.decoder.last.bias.add_(1)
    vae.latent_mean.add_(1)
    save_vae(tmp_path / "decoder", vae)
    vae.encoder.last.bias.add_(1e-3)
    save_vae(tmp_path / "encoder", vae)
    more = {"data": {"train": str(tmp_path / "out")}, "train": {"steps": 1}, "sample": {"prompts": ()}}
    assert run(configure(tmp_path / "one", vae={"weights": str(tmp_path / "decoder")}, **more))
    told = faults_of(configure(tmp_path / "two", vae={"weights": str(tmp_path / "encoder")}, **more))
    assert f"out was encoded by the VAE {tiny_vae} (" in told
    assert "the run has " in told


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"data": {"random_crop": True}}, "data.random_crop=true: one cut of each clip is kept"),
        ({"data": {"horizontal_flip": 0.5}}, "data.horizontal_flip=0.5: one cut of each clip is kept"),
        ({"train": {"task": "vae"}}, "give the config of a DiT"),
    ],
)
def test_configs_that_cannot_be_encoded(configure: Configure, tmp_path: Path, change: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        encode(configure(tmp_path, **change), tmp_path / "out")


def test_latents_are_not_encoded_again(configure: Configure, tmp_path: Path) -> None:
    encode(configure(tmp_path), tmp_path / "out")
    with pytest.raises(ConfigError, match="holds latents already"):
        encode(configure(tmp_path, data={"train": str(tmp_path / "out")}), tmp_path / "again")


def test_a_latent_too_large_for_its_dtype(configure: Configure, tiny_vae: Path, tmp_path: Path) -> None:
    vae = load_vae(tiny_vae, CPU, torch.float32)
    vae.encoder.last.bias.add_(1e5)
    save_vae(tmp_path / "vae", vae)
    config = configure(tmp_path, vae={"weights": str(tmp_path / "vae")})
    with pytest.raises(ValueError, match=r"the latent reaches 1\d+, and fp16 holds at most 65504; use --dtype"):
        encode(config, tmp_path / "out", "fp16")
    assert encode(config, tmp_path / "out", "bf16", overwrite=True).num_clips == 16


@pytest.mark.parametrize("manifest", [True, False])
def test_a_source_that_was_packed_anew_is_another(
    configure: Configure, tiny_clips: Path, tmp_path: Path, manifest: bool
) -> None:
    """The same videos under the same names, captions of the same length; without hashes of shards the CRC tells."""
    clips = [(ref.key, read_clip(ref)[0]) for ref in read_index(tiny_clips)[:3]]
    data = tmp_path / "data"
    config = configure(tmp_path, data={"train": str(data), "num_validation": 0})
    for text in ("a red dog", "a big cat"):
        shutil.rmtree(data, ignore_errors=True)
        packed(data, [(*clip, text) for clip in clips])
        if not manifest:
            (data / "dataset.json").unlink()
        if text == "a red dog":
            encode(config, tmp_path / "out")
    with pytest.raises(ValueError, match="was encoded with other settings; source: "):
        encode(config, tmp_path / "out")


def test_a_damaged_latent_is_replaced_and_named(configure: Configure, tmp_path: Path) -> None:
    encode(configure(tmp_path), tmp_path / "out")
    ref: ClipRef = read_index(tmp_path / "out")[2]
    assert isinstance(ref.shard_path, Path)
    shard = bytearray(ref.shard_path.read_bytes())
    shard[ref.video_offset + ref.video_size - 1] ^= 1
    ref.shard_path.write_bytes(shard)
    config = configure(
        tmp_path / "run", data={"train": str(tmp_path / "out"), "max_skipped": 0.5}, sample={"prompts": ()}
    )
    assert run(config)
    lost = [key for row in read_metrics(config.directory) for key, _ in row.get("skipped", ())]
    assert lost
    assert set(lost) == {ref.key}


def test_the_command(
    configure: Configure, config_file: Callable[..., str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = config_file(tmp_path, configure(tmp_path / "run"))
    assert main(["encode", file, str(tmp_path / "out"), "data.num_workers=1", "--clips-per-shard", "5"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert f"{tmp_path}/out: 16 clips in 4 shards, " in out
    assert "0 skipped; fp16 moves latents by at most 0." in out
    assert main(["encode", file, str(tmp_path / "out"), "--clips-per-shard", "5"]) == 0
    assert "the folder already held exactly this set" in capfd.readouterr().out
    assert not (tmp_path / "run").exists()
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".tar", ".json", ".jsonl", ".safetensors"}
    assert not (tmp_path / ".out.partial").exists()


def test_a_damaged_set_is_not_taken_for_a_whole_one(configure: Configure, tmp_path: Path) -> None:
    config, out = configure(tmp_path), tmp_path / "out"
    encode(config, out)
    before = content(out)
    (out / "shard-000001.tar").write_bytes(before["shard-000001.tar"][:-512])
    with pytest.raises(ValueError, match=r"out is damaged: shard-000001\.tar is not whole; use --overwrite"):
        encode(config, out)
    encode(config, out, overwrite=True)
    assert content(out) == before


def test_a_process_that_died_while_it_moved_the_set(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = configure(tmp_path), tmp_path / "out"
    encode(config, tmp_path / "whole")
    replace, calls = Path.replace, []

    def dies(self: Path, target: Path) -> Path:
        calls.append(target)
        if Path(target).parent == out and len([c for c in calls if Path(c).parent == out]) == 4:
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            encode(config, out)
    assert 0 < len(content(out)) < len(content(tmp_path / "whole"))
    encode(config, out)
    assert content(out) == content(tmp_path / "whole")


def test_cached_latents_are_such_a_set_and_made_once(
    configure: Configure, tiny_vae: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In the run's own folder; another VAE, before there is a checkpoint, replaces it."""
    more = {"data": {"cache_latents": True}, "sample": {"prompts": ()}}
    direct = logged(configure(tmp_path / "direct", sample={"prompts": ()}))
    assert_same(logged(configure(tmp_path / "run", **more)), direct, 5e-6)
    capfd.readouterr()
    assert run(configure(tmp_path / "run", train={"steps": 7}, **more))
    assert "encoded" not in capfd.readouterr().out
    encoding = read_encoding(tmp_path / "run" / "latents")
    assert encoding is not None
    assert encoding.facts["storage"] == "fp32"
    vae = load_vae(tiny_vae, CPU, torch.float32)
    vae.encoder.last.bias.add_(1)
    save_vae(tmp_path / "vae", vae)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert run(configure(tmp_path / "run", vae={"weights": str(tmp_path / "vae")}, **more))
    assert "encoded 12 of 12 clips" in capfd.readouterr().out


def test_a_cached_run_goes_on_after_its_latents_were_deleted(configure: Configure, tmp_path: Path) -> None:
    """The order is that of the clips, not of the bits of their latents, and the micro-batch may change."""
    more = {"data": {"cache_latents": True}, "sample": {"prompts": ()}}
    assert run(configure(tmp_path / "run", train={"steps": 3}, **more))
    shutil.rmtree(tmp_path / "run" / "latents")
    found = logged(configure(tmp_path / "run", train={"steps": 6, "micro_batch": 4}, **more))
    assert_same(found, logged(configure(tmp_path / "whole", **more)), 1e-4)


def test_latents_behind_a_url(configure: Configure, serve: Callable[..., Any], tmp_path: Path) -> None:
    more: dict[str, Any] = {"sample": {"prompts": ()}}
    direct = configure(tmp_path / "direct", **more)
    encode(direct, tmp_path / "out")
    with serve(tmp_path / "out") as web:
        found = logged(configure(tmp_path / "run", data={"train": web.url}, **more))
    assert_same(found, logged(direct), 5e-6)


def test_latents_are_not_scored_or_packed(configure: Configure, tmp_path: Path) -> None:
    encode(configure(tmp_path), tmp_path / "out")
    with pytest.raises(ValueError, match="holds latents, which have no picture to score"):
        score_set(tmp_path / "out")
    with pytest.raises(ValueError, match="0 videos under one key"):
        pack(tmp_path / "out", tmp_path / "packed")


@pytest.mark.parametrize("manifest", ["{", "[]", '{"encoded": "x"}', '{"encoded": {}, "shards": 3}'])
def test_a_damaged_manifest_is_replaced_when_asked(configure: Configure, tmp_path: Path, manifest: str) -> None:
    config, out = configure(tmp_path), tmp_path / "out"
    encode(config, out)
    before = content(out)
    (out / MANIFEST).write_text(manifest)
    with pytest.raises(ValueError, match="damaged; write elsewhere, or replace it with --overwrite"):
        encode(config, out)
    encode(config, out, overwrite=True)
    assert content(out) == before


@pytest.mark.parametrize("change", [{"fps": "8"}, {"shapes": 3}, {"vae": {}}, {"shapes": [[1, 2]]}, {"text": 4}])
def test_an_entry_of_another_version_is_refused(configure: Configure, tmp_path: Path, change: dict[str, Any]) -> None:
    encode(configure(tmp_path), tmp_path / "out")
    path = tmp_path / "out" / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["encoded"] |= change
    path.write_text(json.dumps(manifest))
    with pytest.raises(ShardError, match="`encoded` is damaged"):
        read_splits(configure(tmp_path / "run", data={"train": str(tmp_path / "out")}))
