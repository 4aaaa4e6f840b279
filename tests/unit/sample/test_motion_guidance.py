"""`sample.motion_guidance`: a third pass, of the clip without motion; at 1 there is none and nothing changes."""

import pytest
import torch

from vidit.config import ConfigError
from vidit.sample.run import open_trained
from vidit.train.run import run

MODEL = {"temporal_attention": True, "relative_position": "rope", "motion_free": 0.5}


@pytest.fixture(scope="module")
def trained(configure, tmp_path_factory):
    folder = tmp_path_factory.mktemp("still") / "run"
    assert run(configure(folder, model=MODEL, train={"steps": 2, "learning_rate": 1e-2}, sample={"prompts": ()}))
    return folder


def passes(trained, *overrides):
    """(rows, those without motion) of every pass, and the video."""
    opened, seen = open_trained(trained, ["sample.num_steps=2", *overrides]), []
    with torch.no_grad():
        for name, p in opened.model.named_parameters():
            if "temporal.out" in name or "head.project" in name:
                p.add_(torch.linspace(-0.3, 0.3, p.numel()).reshape(p.shape))
    opened.model["dit"].register_forward_pre_hook(lambda _, args: seen.append((len(args[0]), args[1].still_B)))
    (video,) = opened.draw(["a red circle"], 0)
    return [(rows, None if still is None else still.tolist()) for rows, still in seen], video


def test_passes(trained):
    plain, video = passes(trained, "sample.guidance=3")
    assert plain == [(2, None)] * 2
    guided, moved = passes(trained, "sample.guidance=3", "sample.motion_guidance=1.3")
    assert guided == [(3, [True, False, False])] * 2
    assert not torch.equal(video, moved)
    again, same = passes(trained, "sample.guidance=3", "sample.motion_guidance=1.0")
    assert again == plain
    assert torch.equal(video, same)


def test_a_model_that_did_not_learn_it_has_no_such_scale(configure, tmp_path):
    model = {"temporal_attention": True, "relative_position": "rope"}
    with pytest.raises(
        ConfigError, match=r"sample\.motion_guidance=1\.3 has no effect without a model that learned it"
    ):
        run(configure(tmp_path, model=model, sample={"prompts": (), "motion_guidance": 1.3}))
