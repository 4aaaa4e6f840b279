"""The VAE as programs: what is loaded gives what the module gives, for other batches, lengths and sizes."""

import json
import subprocess
import sys

import pytest
import torch

from vidit.cli import main
from vidit.export.programs import export_vae
from vidit.vae.store import load_vae


@pytest.fixture(scope="module")
def exported(tiny_vae, tmp_path_factory):
    out = tmp_path_factory.mktemp("programs") / "out"
    assert {path.name for path in export_vae(tiny_vae, out)} == {"config.json", "decode.pt2", "encode.pt2"}
    return out


@pytest.mark.parametrize(("rows", "frames", "height", "width"), [(1, 3, 8, 8), (2, 9, 16, 8), (3, 5, 12, 20)])
@torch.no_grad()
def test_the_loaded_programs_are_the_module(exported, tiny_vae, rows, frames, height, width):
    vae = load_vae(tiny_vae, torch.device("cpu"), torch.float32)
    encode, decode = (torch.export.load(exported / f"{name}.pt2").module() for name in ("encode", "decode"))
    x = torch.rand(rows, 3, frames, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    z = vae.whiten(vae.encode(x).mean)
    torch.testing.assert_close(encode(x), z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(decode(z), vae.decode(vae.unwhiten(z)), rtol=1e-5, atol=1e-5)


def test_they_run_without_this_project(exported, tmp_path):
    code = (
        "import sys, torch; m = torch.export.load(sys.argv[1]).module(); "
        "y = m(torch.zeros(1, 3, 3, 8, 8)); print(tuple(y.shape), 'vidit' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, exported / "encode.pt2"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "(1, 4, 2, 2, 2) False"


def test_config_has_the_geometry(exported):
    about = json.loads((exported / "config.json").read_text())
    assert about["dtype"] == "fp32"
    assert about["vae"]["latent_channels"] == 4
    assert about["vae"]["weights"] is None


def test_command(tiny_vae, tmp_path, capsys):
    assert main(["export", str(tiny_vae), "--vae-program", "--out", str(tmp_path / "a"), "--dtype", "bf16"]) == 0
    assert str(tmp_path / "a" / "encode.pt2") in capsys.readouterr().out
    assert main(["export", str(tiny_vae), "--vae-program", "--out", str(tmp_path / "a")]) == 1
    assert "is there already" in capsys.readouterr().err
    assert main(["export", str(tiny_vae), "--vae-program", "--out", str(tmp_path / "b"), "--step", "3"]) == 1
    assert "--step has no effect with --vae-program" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_no_vae(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        export_vae(tmp_path, tmp_path / "out")
