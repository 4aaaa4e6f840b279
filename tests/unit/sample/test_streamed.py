"""`vae.max_frames` and `vae.tile` change how a clip is coded, in training and sampling, and not what comes out."""

import pytest
import torch

from vidit.sample.run import open_trained
from vidit.train.run import run
from vidit.vae.streaming import DecodeStream, EncodeStream


@pytest.fixture
def pushed(monkeypatch):
    """The number of frames of each part that a stream is given."""
    seen = {"encode": [], "decode": []}
    for name, stream in (("encode", EncodeStream), ("decode", DecodeStream)):
        right = stream.push
        monkeypatch.setattr(
            stream, "push", lambda self, x, n=name, r=right: (seen[n].append(x.shape[2]), r(self, x))[1]
        )
    return seen


def test_a_run_with_limits_is_the_run_without(configure, tmp_path, pushed):
    losses = []
    for name, vae in (("whole", {}), ("parts", {"max_frames": 2})):
        config = configure(tmp_path / name, train={"steps": 2}, sample={"prompts": ()}, vae=vae)
        assert run(config)
        assert bool(pushed["encode"]) == bool(vae)
        losses.append(open_trained(tmp_path / name).model["dit"].state_dict())
    assert set(pushed["encode"]) == {1, 2}
    for name, p in losses[0].items():
        torch.testing.assert_close(losses[1][name], p, rtol=1e-4, atol=1e-5)

    whole = open_trained(tmp_path / "whole").draw(["a red circle"], 0)[0]
    assert not pushed["decode"]
    parts = open_trained(tmp_path / "whole", ["vae.max_frames=2", "vae.tile=8"]).draw(["a red circle"], 0)[0]
    assert set(pushed["decode"]) == {1}
    assert (whole.int() - parts.int()).abs().max() <= 1
