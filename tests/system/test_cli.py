"""The whole way through the real command line, and every kind of bad input: one message, nothing lost."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from parallel import checkpoint
from vidit.cli import main
from vidit.config import RunConfig
from vidit.data.encode import encode_mp4
from vidit.data.scenes import caption, render, sample_scene
from vidit.data.shard_writer import ShardWriter
from vidit.data.shards import read_clip, read_index
from vidit.data.video import decode_clip, probe
from vidit.train.metrics import read_metrics
from vidit.vae.store import load_vae

Vidit = Callable[..., subprocess.CompletedProcess[str]]
Configure = Callable[..., RunConfig]
ConfigFile = Callable[[Path, RunConfig], str]


@pytest.fixture(scope="module")
def packed(vidit: Vidit, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(shards that `vidit pack` made of a folder of videos, what it printed)"""
    folder = tmp_path_factory.mktemp("cli")
    source = folder / "videos"
    source.mkdir()
    rows = []
    for index in range(12):
        scene = sample_scene(3, index, "train", num_frames=5, height=32, width=32)
        (source / f"scene-{index:02d}.mp4").write_bytes(encode_mp4(render(scene), 8))
        rows.append({"file": f"scene-{index:02d}.mp4", "caption": caption(scene)})
    rows[1]["caption"] = "  \t "
    rows[2]["caption"] = "a very long story " * 600_000  # 10 MB
    rows[5]["file"] = "gone.mp4"
    (source / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (source / "scene-05.txt").write_bytes(b"a caf\xe9 at n\xffight")
    (source / "broken.mp4").write_bytes((source / "scene-00.mp4").read_bytes()[:900])
    (source / "broken.txt").write_text("never seen")
    done = vidit("pack", source, folder / "shards", extra={"COLUMNS": "200"})
    assert (done.returncode, done.stderr) == (0, "")
    return folder / "shards", done.stdout


@pytest.fixture(scope="module")
def trained(
    vidit: Vidit,
    packed: tuple[Path, str],
    configure: Configure,
    config_file: ConfigFile,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, str]:
    """(run directory of 6 steps on the packed clips, its config file)"""
    folder = tmp_path_factory.mktemp("cli")
    file = config_file(folder, configure(folder / "run", data={"train": str(packed[0]), "cache_latents": True}))
    done = vidit("train", file)
    assert (done.returncode, done.stderr) == (0, "")
    assert "7 clips, 0 dropped, 0 cropped to 32x32" in done.stdout
    return folder / "run", file


@pytest.fixture
def run_copy(trained: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of the trained run that a test may damage."""
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


def content(folder: Path) -> dict[str, bytes]:
    """Everything that must survive an error: all but the records of each start."""
    free = ("environment.json", "source.diff", "config.json", "costs.jsonl", "goodput.jsonl")
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in free]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if "tensorboard" not in path.parts}


def fails(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one message of a command that must fail."""
    capfd.readouterr()
    assert main([str(argument) for argument in arguments]) == 1
    err = capfd.readouterr().err
    assert err.startswith("vidit: ")
    assert err.count("vidit: ") == 1
    assert "Traceback" not in err
    assert len(err) < 3000
    return err.removeprefix("vidit: ").strip()


def assert_video(path: Path, frames: int, height: int, width: int) -> None:
    info = probe(path)
    assert (info.num_frames, info.height, info.width, info.codec) == (frames, height, width, "h264")


# The way through.


def test_pack_counts_and_lists_what_it_left_out(packed: tuple[Path, str]) -> None:
    shards, printed = packed
    report = json.loads((shards / "pack_report.json").read_text())
    assert len(report["kept"]) == 11
    rejected = dict(report["rejected"])
    assert set(rejected) == {"scene-01.mp4", "broken.mp4"}
    assert "caption" in rejected["scene-01.mp4"]
    cleaned = dict(report["cleaned"])
    assert cleaned["scene-02.mp4"] == ["white_space", "cut"]
    assert cleaned["scene-05.mp4"] == ["invalid_utf8"]
    assert report["captions_without_file"] == ["gone.mp4"]
    captions = {ref.key: read_clip(ref)[1] for ref in read_index(shards)}
    assert len(captions["scene-02"]) <= 2048
    assert captions["scene-05"] == "a caf\ufffd at n\ufffdight"
    for text in ("scene-01.mp4", "broken.mp4", "caption changes: cut in 1", "caption without a file: gone.mp4"):
        assert text in printed


def test_train_leaves_a_documented_run_directory(trained: tuple[Path, str]) -> None:
    run, _ = trained
    assert {path.name for path in run.iterdir()} >= {
        "config.json", "environment.json", "data.json", "vae", "checkpoints", "metrics.jsonl", "tensorboard",
        "samples", "costs.jsonl", "goodput.jsonl", "latents",
    }  # fmt: skip
    rows = [row for row in read_metrics(run) if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert_video(run / "samples" / "step-00000006" / "000.mp4", 5, 32, 32)
    assert list((run / "tensorboard").glob("events.*"))
    none = {"dropped": [], "cropped": []}
    validation = {"used": 4, **none, "replaced": []}
    assert json.loads((run / "data.json").read_text()) == {"used": 7, **none, "validation": validation}


def test_sample_writes_mp4_and_gif(vidit: Vidit, trained: tuple[Path, str], tmp_path: Path) -> None:
    """Two prompts at another size than trained, options and overrides in any order; the same seed again."""
    run, _ = trained
    out = tmp_path / "out"
    done = vidit(
        "sample",
        run,
        "--prompt",
        "a cat!",
        "data.height=16",
        "--prompt",
        "",
        "data.width=24",
        "--out",
        out,
        "--seed",
        7,
    )
    assert (done.returncode, done.stderr) == (0, "")
    names = ["7-0-a-cat.mp4", "7-0-a-cat.gif", "7-1-empty.mp4", "7-1-empty.gif"]
    assert done.stdout.split() == [str(out / name) for name in names]
    for name in names[::2]:
        assert_video(out / name, 5, 16, 24)
    with Image.open(out / names[1]) as image:
        assert image.n_frames == 5
        assert image.size[0] % 24 == image.size[1] % 16 == 0
    request = ["sample", str(run), "data.height=16", "data.width=24", "--prompt", "a cat!", "--seed", "7", "--out"]
    assert main([*request, str(tmp_path / "a")]) == 0
    assert main([*request, str(tmp_path / "b")]) == 0
    first, again = ((tmp_path / folder / names[0]).read_bytes() for folder in "ab")
    assert first == again
    # One prompt instead of two rounds otherwise, and the codec makes a few levels of it: the same video still.
    one, of_two = (decode_clip(data, num_frames=5, fps=0, height=16, width=24) for data in (first, out / names[0]))
    assert float((one.float() - of_two.float()).abs().mean()) < 1


def test_evaluate_and_report(vidit: Vidit, run_copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    done = vidit("evaluate", run_copy, "--clips", 4)
    assert (done.returncode, done.stderr) == (0, "")
    summary = json.loads(done.stdout)
    assert summary == json.loads((run_copy / "summary.json").read_text())
    assert {"colour", "direction", "shape", "seen", "unseen", "train_s", "peak_rss_gib"} <= summary.keys()
    assert summary["ground_truth"]["colour"] == 1
    assert (summary["captions"], summary["steps"]) == (4, 6)
    capfd.readouterr()
    assert main(["report", str(run_copy)]) == 0
    out, err = capfd.readouterr()
    assert (out.strip(), err) == (str(run_copy / "report.html"), "")
    page = (run_copy / "report.html").read_text()
    links = re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"'\s>]{0,40})", page)
    assert links
    assert all(link.startswith(("data:image/gif;base64,", "data:image/png;base64,")) for link in links)
    assert not re.search(r"<script|@import|url\(", page)
    judged = json.loads((run_copy / "evaluation.json").read_text())
    assert len(judged) == 4
    assert all(row["caption"] in unescape(page) for row in judged)
    assert page.count("data:image/gif;base64,") == 4
    assert '"learning_rate"' in unescape(page)


def test_evaluate_without_unseen_captions_is_still_json(run_copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run_copy), "--clips", "1"]) == 0
    summary = json.loads(capfd.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert summary["unseen"] == {"colour": None, "direction": None, "shape": None, "count": None}
    assert main(["report", str(run_copy)]) == 0


def test_report_before_evaluation_says_so(run_copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run_copy)]) == 0
    assert "Not evaluated yet" in (run_copy / "report.html").read_text()


def test_config_prints_every_derived_number(trained: tuple[Path, str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["config", trained[1], "train.global_batch=8", "model.cross_attention=all"]) == 0
    printed = json.loads(capfd.readouterr().out)
    derived = printed["derived"]
    assert printed["config"]["model"]["cross_attention"] == "all"
    assert printed["config"]["vae"]["latent_channels"] == 4, "the VAE's geometry comes from its folder"
    assert derived["grid"] == [3, 4, 4]
    assert derived["tokens_per_clip"] == 48
    assert derived["windows"] == [[1, 4, 4], [3, 2, 2]]
    assert (derived["accumulation"], derived["clips_total"], derived["head_dim"]) == (4, 48, 8)
    assert all(derived[name] > 0 for name in ("dit_parameters", "training_flops_total", "state_bytes"))


def test_scenes_and_a_vae_from_scratch(configure: Configure, config_file: ConfigFile, tmp_path: Path) -> None:
    """`vidit scenes`, then a VAE run whose folder the next DiT run could use."""
    assert (
        main(["scenes", str(tmp_path / "data"), "--clips", "6", "--frames", "5", "--size", "32", "--workers", "0"]) == 0
    )
    run = configure(
        tmp_path / "run", data={"train": str(tmp_path / "data"), "num_validation": 2}, train={"task": "vae"}
    )
    assert main(["train", config_file(tmp_path, run), "train.steps=2"]) == 0
    vae = load_vae(tmp_path / "run" / "vae", torch.device("cpu"), torch.float32)
    assert bool((vae.latent_std > 0).all())
    assert not torch.equal(vae.latent_std, torch.ones(4)), "measured, not the initial value"
    assert {"l1", "kl", "psnr"} <= read_metrics(tmp_path / "run")[0].keys()


def test_a_finished_run_stays_finished(run_copy: Path, trained: tuple[Path, str]) -> None:
    before = content(run_copy)
    assert main(["train", trained[1], f"run_dir={run_copy}"]) == 0
    assert content(run_copy) == before


# Bad input.


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "is not a folder; name the folder that `vidit pack` wrote"),
        ("empty", "holds no .tar file"),
        ("truncated", r"shard-000000\.tar: \d+ bytes, dataset\.json says"),
        ("garbage", r"shard-000000\.tar"),
        ("index", r"shard-000000\.index\.jsonl"),
        ("empty_shard", r"shard-000000\.tar"),
    ],
)
def test_bad_shards(
    configure: Configure, config_file: ConfigFile, tiny_clips: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str], damage: str, message: str,
) -> None:  # fmt: skip
    data = tmp_path / "data"
    if damage == "empty":
        data.mkdir()
    elif damage != "missing":
        shutil.copytree(tiny_clips, data)
        tar = data / "shard-000000.tar"
        whole = tar.read_bytes()
        if damage == "truncated":
            tar.write_bytes(whole[: len(whole) // 2])
        elif damage == "garbage":
            tar.write_bytes(bytes(len(whole)))
        elif damage == "empty_shard":
            tar.write_bytes(b"")
        else:
            (data / "shard-000000.index.jsonl").write_text("{}\n")
    file = config_file(tmp_path, configure(tmp_path / "run", data={"train": str(data)}))
    assert re.search(message, fails(capfd, "train", file))
    assert not (tmp_path / "run").exists(), "found before anything is written"


def test_too_few_clips(trained: tuple[Path, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _, file = trained
    message = fails(capfd, "train", file, f"run_dir={tmp_path}", "data.num_validation=11")
    assert "data.num_validation=11 leaves none of the 11 clips" in message
    message = fails(capfd, "train", file, f"run_dir={tmp_path}", "data.num_frames=9")
    assert "no clip of" in message
    assert "5 frames; data.num_frames=9" in message


def partly_broken(folder: Path, broken: int, total: int) -> Path:
    rng = np.random.default_rng(0)
    with ShardWriter(folder) as writer:
        for i in range(total):
            video = encode_mp4(rng.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8), 8)
            sidecar = {"caption": f"clip {i}", "width": 32, "height": 32, "fps": 8.0, "num_frames": 5}
            writer.add(f"clip-{i:02d}", video[: len(video) // 2] if i < broken else video, sidecar)
    return folder


@pytest.mark.parametrize("cached", [False, True])
def test_a_clip_that_does_not_decode_is_counted(
    configure: Configure, config_file: ConfigFile, tmp_path: Path, capfd: pytest.CaptureFixture[str], cached: bool
) -> None:
    data = {"train": str(partly_broken(tmp_path / "data", 1, 10)), "cache_latents": cached, "num_validation": 2}
    file = config_file(tmp_path, configure(tmp_path / "run", data=data))
    assert main(["train", file, "train.steps=2"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert out.count("skipped clip clip-00: ") == 1
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2]
    if cached:
        found = json.loads((tmp_path / "run" / "data.json").read_text())
        assert (found["used"], found["dropped"][0][0]) == (7, "clip-00")
    else:
        assert [[name for name, _ in row["skipped"]] for row in rows if "skipped" in row] == [["clip-00"]]
    assert all("clip-00" not in row["keys"] for row in rows)


@pytest.mark.parametrize(("cached", "workers"), [(False, 0), (False, 1), (True, 0)])
def test_too_many_broken_clips_stop_the_run(
    configure: Configure, config_file: ConfigFile, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    cached: bool, workers: int,
) -> None:  # fmt: skip
    data = {
        "train": str(partly_broken(tmp_path / "data", 4, 10)), "cache_latents": cached, "num_workers": workers,
        "num_validation": 0, "max_skipped": 0.2,
    }  # fmt: skip
    file = config_file(tmp_path, configure(tmp_path / "run", data=data))
    message = fails(capfd, "train", file, "train.checkpoint_every=1000")
    assert re.search(
        r"\d+ of \d+ clips could not be used, more than data\.max_skipped=0\.2 allows; the last: clip-0", message
    )
    reached = max((row["step"] for row in read_metrics(tmp_path / "run") if "loss" in row), default=0)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == ([reached] if reached else []), "no step is lost"
    assert main(["train", file, "data.max_skipped=1"]) == 0, "as the message says"


def test_three_faults_are_listed_at_once(
    trained: tuple[Path, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, file = trained
    before = content(run)
    message = fails(capfd, "train", file, "model.num_heads=5", "data.height=33", "train.global_batch=5")
    assert message.startswith("3 faults:\n- model.width=32 is not divisible by model.num_heads=5")
    assert "data.height=33 is not divisible by 8" in message
    assert "use one of 32 40" in message
    message = fails(capfd, "train", file, "model.wdith=64", "train.steps=many", "data.height=33", "oops")
    assert message.startswith("4 faults:")
    for text in ("nearest: model.width", "train.steps='many'", "'oops' has no '='", "data.height=33"):
        assert text in message
    source = tmp_path / "faulty.py"
    source.write_text(
        "from vidit.config import Model, RunConfig\n\n\n"
        "def faulty():\n    return RunConfig(name='x', model=Model(wdith=4, num_layers=-1, num_heads='a'))\n"
    )
    message = fails(capfd, "train", source)
    assert message.startswith("3 faults:")
    for text in ("unknown key 'model.wdith'; nearest: model.width", "model.num_layers=-1", "model.num_heads='a'"):
        assert text in message
    assert content(run) == before


def test_configs_that_are_not_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "no config file" in fails(capfd, "train", tmp_path / "none.py")
    assert "no config module configs.none" in fails(capfd, "train", "configs.none")
    assert "has no config 'none'; it has" in fails(capfd, "train", "configs.demo:none")
    (tmp_path / "odd.py").write_text("def odd():\n    return 3\n")
    assert "returns int, not a RunConfig" in fails(capfd, "train", tmp_path / "odd.py")
    assert "configs has no config 'configs'; it is a package; name one of configs." in fails(capfd, "config", "configs")
    for name in (tmp_path / "odd", "../odd", ".odd", "", "a b"):
        assert "no config file" in fails(capfd, "config", name)
    assert fails(capfd, "config", tmp_path / "odd").endswith(f"give {tmp_path / 'odd.py'}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\ndef odd(:\n", "odd.py, line 2: invalid syntax"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module' ({path}, line 1)"),
        ("from vidit.config import Daten", "ImportError: cannot import name 'Daten'"),
        ("def odd():\n    return 1 / 0", "ZeroDivisionError: division by zero ({path}, line 2)"),
        ("from vidit.config import *\n\ndef odd():\n    return Model.preset('XXL')", "no model preset 'XXL'"),
        ("x = 1", "has no config 'odd'; it defines no function"),
    ],
)
def test_configs_that_do_not_run(tmp_path: Path, capfd: pytest.CaptureFixture[str], source: str, message: str) -> None:
    (tmp_path / "odd.py").write_text(source)
    told = fails(capfd, "config", tmp_path / "odd.py")
    assert message.format(path=tmp_path / "odd.py") in told
    assert "\n" not in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "run", "--clips", "0"], "argument --clips: 0 is less than 1"),
        (["evaluate", "run", "--clips", "-3"], "argument --clips: -3 is less than 1"),
        (["evaluate", "run", "--clips", "many"], "argument --clips: invalid whole number value: 'many'"),
        (["scenes", "out", "--clips", "0"], "argument --clips: 0 is less than 1"),
        (["sample", "run", "--prompt", "x", "--seed", "-1"], "argument --seed: -1 is less than 0"),
    ],
)
def test_counts_that_are_none(arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert capfd.readouterr().err.endswith(f"error: {message}\n")


def test_config_lists_a_missing_vae_with_every_other_fault(
    trained: tuple[Path, str], capfd: pytest.CaptureFixture[str]
) -> None:
    overrides = ["vae.weights=/none", "foo.bar=1", "train.betas=[0.9, 1]", "text.width=31", "diffusion.path=vp",
                 "diffusion.shift=constant", "diffusion.beta_start=0.5", "data.image_rows=2",
                 "train.final_learning_rate=0.5"]  # fmt: skip
    message = fails(capfd, "config", trained[1], *overrides)
    assert message.startswith("9 faults:")
    for text in ("vae.weights=/none holds no config.json", "foo.bar", "train.betas.1=1", "text.width=31",
                 "diffusion.target=flow", "diffusion.shift=constant", "beta_start=0.5", "data.image_rows=2",
                 "train.final_learning_rate=0.5"):  # fmt: skip
        assert text in message


def test_resume_with_another_model(
    run_copy: Path, trained: tuple[Path, str], capfd: pytest.CaptureFixture[str]
) -> None:
    before = content(run_copy) | {"config": (run_copy / "config.json").read_bytes()}
    message = fails(capfd, "train", trained[1], f"run_dir={run_copy}", "model.width=64", "train.steps=9")
    assert message.startswith("model.width: the run has 32, this config 64; ")
    assert "give the old value, or a new run_dir" in message
    # A config that lies about the checkpoint beside it is found too, before anything is changed.
    (run_copy / "config.json").write_text(
        (run_copy / "config.json")
        .read_text()
        .replace('"width": 32,\n  "num_heads": 4', '"width": 64,\n  "num_heads": 4')
    )
    message = fails(capfd, "train", trained[1], f"run_dir={run_copy}", "model.width=64", "train.steps=9")
    assert re.search(r"model\.dit\.\S+ is \(.*32.*\) there and \(.*64.*\) here", message)
    assert content(run_copy) == {name: data for name, data in before.items() if name != "config"}


def test_resume_with_another_vae(
    run_copy: Path, trained: tuple[Path, str], tmp_path: Path, capfd: pytest.CaptureFixture[str], tiny_vae: Path
) -> None:
    other = Path(shutil.copytree(tiny_vae, tmp_path / "vae"))
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    before = content(run_copy)
    arguments = ("train", trained[1], f"run_dir={run_copy}", "train.steps=7")
    message = fails(capfd, *arguments, f"vae.weights={other}")
    assert f"is another VAE than the run was started with; give vae.weights={run_copy / 'vae'}" in message
    assert content(run_copy) == before
    assert main([*map(str, arguments), f"vae.weights={run_copy / 'vae'}"]) == 0


def test_bad_vae(trained: tuple[Path, str], tmp_path: Path, tiny_vae: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _, file = trained
    message = fails(capfd, "train", file, f"run_dir={tmp_path / 'run'}", f"vae.weights={tmp_path / 'none'}")
    assert "holds no config.json; give a folder that a VAE run wrote" in message
    broken = Path(shutil.copytree(tiny_vae, tmp_path / "vae"))
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:500])
    message = fails(capfd, "train", file, f"run_dir={tmp_path / 'run'}", f"vae.weights={broken}")
    assert "model.safetensors" in message
    (broken / "model.safetensors").unlink()
    message = fails(capfd, "train", file, f"run_dir={tmp_path / 'run'}", f"vae.weights={broken}")
    assert "model.safetensors" in message


def test_a_checkpoint_with_a_flipped_byte(
    run_copy: Path, trained: tuple[Path, str], capfd: pytest.CaptureFixture[str]
) -> None:
    newest = run_copy / "checkpoints" / "step-00000006"
    path = next(newest.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)
    before = content(run_copy)
    for arguments in (
        ("sample", run_copy, "--prompt", "x"),
        ("evaluate", run_copy, "--clips", "2"),
    ):
        message = fails(capfd, *arguments)
        assert f"{path} is damaged: its SHA-256 differs" in message
        assert f"delete {newest} to resume" in message
        assert content(run_copy) == before
    assert main(["train", trained[1], f"run_dir={run_copy}"]) == 0
    out = capfd.readouterr().out
    assert f"{path} is damaged: its SHA-256 differs" in out
    aside = newest.with_suffix(".damaged")
    assert f"It is kept as {aside}" in out
    assert (aside / path.name).read_bytes() == data
    assert f"resumed {run_copy} at step 3" in out
    rows = [row["step"] for row in read_metrics(run_copy) if "loss" in row]
    assert rows == [1, 2, 3, 4, 5, 6]


def test_no_checkpoint_is_whole(run_copy: Path, trained: tuple[Path, str], capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing is started anew over what somebody may want to repair."""
    for path in run_copy.glob("checkpoints/*/manifest.json"):
        path.write_text(path.read_text()[:-20])
    message = fails(capfd, "train", trained[1], f"run_dir={run_copy}")
    assert f"no checkpoint under {run_copy}/checkpoints is whole" in message
    assert len(list(run_copy.glob("checkpoints/*.damaged"))) == 2
    again = fails(capfd, "train", trained[1], f"run_dir={run_copy}")
    assert "step-00000003.damaged, step-00000006.damaged" in again


def test_sample_requests_that_cannot_be_met(
    trained: tuple[Path, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, _ = trained
    before = content(run)
    out = tmp_path / "out"
    message = fails(
        capfd, "sample", run, "--prompt", "x", "--out", out, "data.height=30", "data.width=12", "data.num_frames=4"
    )
    assert message.startswith("3 faults:")
    for text in ("data.height=30 is not", "one of 24 32", "data.width=12 is not", "one of 8 16", "use 3 or 5"):
        assert text in message
    request = ("sample", run, "--prompt", "x", "--out", out)
    assert "holds no config.json" in fails(capfd, "sample", tmp_path, "--prompt", "x")
    assert "nearest: sample.guidance" in fails(capfd, *request, "sample.guidence=2")
    assert "'word' has no '='" in fails(capfd, *request, "word")
    message = fails(capfd, *request, "sample.sampler=ddpm", "sample.num_steps=0", "foo.bar=1", "data.height=20")
    assert message.startswith("4 faults:")
    for text in ("sample.sampler='ddpm'", "sample.num_steps=0", "unknown key 'foo.bar'", "data.height=20"):
        assert text in message
    assert "diffusion.shift_value=3.0 has no effect" in fails(capfd, *request, "diffusion.shift_value=3")
    assert "data.fps=1001: " in fails(capfd, *request, "data.fps=1001")
    for option in ("model.width=64", "data.random_crop=true", "data.train=x", "sample.prompts=[]", "train.steps=9",
                   "diffusion.stratified=false", "train.compile=true"):  # fmt: skip
        key = option.partition("=")[0]
        message = fails(capfd, *request, option)
        assert message.startswith(f"{option}: {key} does not act when sampling; only sample.sampler, ")
    assert not list(out.glob("*"))
    assert content(run) == before


def test_a_sample_larger_than_the_position_tables_is_refused_before_any_weight_is_read(
    run_copy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for path in [*run_copy.rglob("*.safetensors")]:
        path.write_bytes(b"")
    request = ("sample", run_copy, "--prompt", "x", "--out", tmp_path / "out")
    message = fails(capfd, *request, "data.height=64", "data.num_frames=9", "data.width=12")
    assert message.startswith("3 faults:")
    assert "data.width=12 is not divisible by 8" in message
    for name, asked, tokens, most, size in (("height", 64, 8, 4, 32), ("num_frames", 9, 5, 3, 5)):
        assert (
            f"data.{name}={asked} is {tokens} tokens, but the position table holds {most}, for data.{name}={size} in "
            f"training; sample at most {size}, or train with model.absolute_position=false"
        ) in message


def test_samples_are_kept_and_named_by_any_script(
    trained: tuple[Path, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The same prompt again leaves the first files as they are; 60 frames a second is more than a GIF can show."""
    run, _ = trained
    request = ["sample", str(run), "--prompt", "кот ловит мяч", "--out", str(tmp_path), "data.height=16"]
    assert main(request) == 0
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(first) == {"0-0-кот-ловит-мяч.mp4", "0-0-кот-ловит-мяч.gif"}
    capfd.readouterr()
    assert main([*request, "data.width=16", "data.fps=60"]) == 0
    second = capfd.readouterr().out.split()
    assert second == [str(tmp_path / f"0-0-кот-ловит-мяч-2.{kind}") for kind in ("mp4", "gif")]
    assert {name: (tmp_path / name).read_bytes() for name in first} == first
    assert probe(Path(second[0])).fps == 60
    with Image.open(second[1]) as image:
        assert (image.n_frames, image.info["duration"]) == (5, 20)


@pytest.mark.parametrize(
    "arguments",
    [["--promt", "x", "--prompt", "y"], [], ["--prompt"], ["--prompt", "x", "--seed", "one"]],
)
def test_unknown_prompt_flags(
    trained: tuple[Path, str], capfd: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    """argparse's own exit code 2 and usage line."""
    run, _ = trained
    with pytest.raises(SystemExit) as caught:
        main(["sample", str(run), *arguments])
    assert caught.value.code == 2
    err = capfd.readouterr().err
    assert err.count("error: ") == 1
    assert "Traceback" not in err


def test_a_loss_that_is_not_finite(
    configure: Configure, config_file: ConfigFile, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Step 1 throws the weights so far that step 2 overflows: no update, the clips named, the disk as after step 1."""
    run = tmp_path / "run"
    file = config_file(tmp_path, configure(run, train={"learning_rate": 1e30, "checkpoint_every": 1, "ema_decay": 0.0}))
    message = fails(capfd, "train", file)
    assert "at step 2: not finite, no update made. Clips of the batch: scene-train-" in message
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000001"]
    before = content(run)
    again = fails(capfd, "train", file)
    assert again == message
    assert content(run) == before
    assert [row["step"] for row in read_metrics(run)] == [1]
    named = message.partition("Clips of the batch: ")[2].partition(". ")[0].split()
    assert len(named) == 4


def test_a_full_disk(
    configure: Configure, config_file: ConfigFile, small_disk: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Full at the second checkpoint, full at once: one message each time; freed, the same command goes on."""
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "none"))  # the diff that a run keeps may be larger than the disk
    run = small_disk / "run"
    tiny = configure(
        run,
        text={"width": 16, "num_layers": 0},
        model={"num_layers": 1, "width": 16, "num_heads": 2, "mlp_width": 16, "pooled_text": False},
        data={"num_validation": 0}, train={"checkpoint_every": 2}, sample={"prompts": ()},
    )  # fmt: skip
    file, ballast = config_file(tmp_path, tiny), small_disk / "ballast"
    assert main(["train", file, "train.steps=2"]) == 0
    before = content(run / "checkpoints")
    assert before
    for room in (100_000, 4096):
        ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - room))
        message = fails(capfd, "train", file)
        assert "No space left on device; free space" in message
        assert str(run) in message
        assert "\n" not in message
        assert content(run / "checkpoints") == before
        ballast.unlink()
    assert main(["train", file]) == 0
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3, 4, 5, 6]


def test_pack_of_bad_folders(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "is not a folder" in fails(capfd, "pack", tmp_path / "none", tmp_path / "out")
    source = tmp_path / "source"
    source.mkdir()
    assert "holds no video" in fails(capfd, "pack", source, tmp_path / "out")
    (source / "a.mp4").write_bytes(b"")
    (source / "a.txt").write_text("a caption")
    assert "none of 1 files can be used" in fails(capfd, "pack", source, tmp_path / "out")
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    assert "holds thesis.txt, which is no part of a data set" in fails(capfd, "pack", source, out, "--overwrite")
    assert (out / "thesis.txt").read_text() == "years of work"


def test_a_run_is_audited(
    configure: Configure, config_file: ConfigFile, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each clip is delivered, skipped or to come; a record that was tampered with is caught."""
    run, data = tmp_path / "run", {"train": str(partly_broken(tmp_path / "data", 1, 10)), "num_validation": 2}
    file = config_file(tmp_path, configure(run, data={**data, "max_skipped": 1}, train={"global_batch": 2}))
    for steps in (3, 5):  # the second start knows what the first one skipped
        assert main(["train", file, f"train.steps={steps}"]) == 0
    assert "epoch 1: 8 clips, 7 delivered, 1 skipped\n" in capfd.readouterr().out
    (ended,) = [epoch for row in read_metrics(run) for epoch in row.get("epochs", ())]
    assert ended == {"stream": "clips", "number": 1, "clips": 8, "delivered": 7, "skipped": 1}
    assert main(["data", "audit", str(run)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "5 steps; 8 clips to train on, 2 for validation"
    assert lines[1:3] == [
        "epoch 1: 8 clips, 7 delivered, 1 skipped", "epoch 2: 8 clips, 1 delivered, 1 skipped, 6 not yet reached"
    ]  # fmt: skip
    assert lines[3].startswith("skipped 2 times: clip-00: ")
    assert lines[4:] == ["every clip is accounted for"]
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    keys, rows[1]["keys"][0] = rows[1]["keys"][0], rows[0]["keys"][0]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "audit", str(run)]) == 1
    assert "was delivered instead, and nothing says that" in capfd.readouterr().out
    del rows[2:]
    rows[1]["keys"][0] = keys
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "audit", str(run)]) == 1
    assert "metrics.jsonl ends at step 2, and " in capfd.readouterr().out
    path.write_text('{"keys": ["a"], "clips": 2}\n')
    assert "metrics.jsonl, record 1 is damaged (KeyError" in fails(capfd, "data", "audit", run)


def test_a_run_with_cached_latents_is_audited(
    configure: Configure, config_file: ConfigFile, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = {"train": str(partly_broken(tmp_path / "data", 1, 10)), "num_validation": 2, "cache_latents": True}
    file = config_file(tmp_path, configure(tmp_path / "run", data={**data, "max_skipped": 1}))
    assert main(["train", file, "train.steps=3"]) == 0
    capfd.readouterr()
    assert main(["data", "audit", str(tmp_path / "run")]) == 0
    assert "epoch 1: 7 clips, 7 delivered, 0 skipped" in capfd.readouterr().out
