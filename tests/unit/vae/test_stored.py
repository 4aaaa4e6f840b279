"""The geometry of a VAE's folder in a config: what contradicts it, and that one fault hides no other."""

import pytest

from vidit.config import ConfigError, Data, Model, Parallel, RunConfig, Train, Vae
from vidit.overrides import apply_overrides
from vidit.resolve import faults as resolve_faults
from vidit.vae.stored import adopt_vae

GEOMETRY = {
    "latent_channels": 4, "base_channels": 8, "multipliers": (1, 2), "num_res_blocks": (0, 1),
    "decoder_res_blocks": (0, 1), "spatial_down": (True,), "temporal_down": (True,),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(Vae(**GEOMETRY).model_dump_json())
    return tmp_path


def run(folder, vae=(), **changes):
    data = changes.pop("data", Data(train="x"))
    return RunConfig(name="a", vae=Vae(weights=str(folder), **dict(vae)), data=data, **changes)


def faults(config):
    with pytest.raises(ConfigError) as caught:
        adopt_vae(config)
    return caught.value.faults


def test_a_default_that_was_written_down_is_a_contradiction(folder):
    default = Vae().latent_channels
    assert default != 4
    says = f"vae.latent_channels={default}, but {folder} was trained with 4; leave it out"
    assert faults(run(folder, {"latent_channels": default})) == (says,)
    assert faults(apply_overrides(run(folder), [f"vae.latent_channels={default}"])) == (says,)


def test_what_the_folder_says_too_is_no_fault(folder):
    assert adopt_vae(run(folder, {"latent_channels": 4})).vae.latent_channels == 4


def test_adopting_again_changes_nothing(folder):
    adopted = adopt_vae(run(folder))
    assert adopt_vae(adopted) == adopted
    read_back = RunConfig.model_validate_json(adopted.to_json())
    assert adopt_vae(read_back) == read_back == adopted


def test_a_whole_json_gives_only_what_differs_from_the_defaults(folder):
    read_back = RunConfig.model_validate_json(run(folder).to_json())
    assert adopt_vae(read_back).vae.latent_channels == 4


def test_a_missing_folder_hides_no_other_fault(tmp_path):
    wrong = run(
        tmp_path / "none", model=Model(width=100), train=Train(final_learning_rate=0.1), data=Data(image_rows=32)
    )
    found = "\n".join(faults(wrong))
    for part in ("holds no config.json", "model.width=100", "train.final_learning_rate=0.1", "data.train is not set",
                 "data.image_rows=32"):  # fmt: skip
        assert part in found
    assert found.count("\n") == 4, "and nothing that follows from strides that nobody knows"


def test_a_contradiction_hides_no_other_fault(folder):
    found = faults(run(folder, {"latent_channels": 9}, data=Data(train="x", height=33)))
    assert [line.partition(" ")[0] for line in found] == ["vae.latent_channels=9,", "data.height=33"]
    assert "not divisible by 2 (VAE stride 2" in found[1], "by the strides of the folder"


def test_a_damaged_folder_is_one_line(folder):
    (folder / "config.json").write_text('{"patch": 0, "colour": 1}')
    (line,) = faults(run(folder))
    assert "config.json is not a VAE config: patch Input should be greater than 0; colour Extra inputs" in line


def test_in_what_parts_it_codes_is_of_the_run(folder):
    config = apply_overrides(run(folder), ["vae.max_frames=4", "vae.tile=32", "vae.tile_overlap=8"])
    vae = adopt_vae(config).vae
    assert (vae.max_frames, vae.tile, vae.tile_overlap, vae.latent_channels) == (4, 32, 8, 4)


def test_a_limit_that_the_strides_of_the_folder_exclude(folder):
    assert [f for f in resolve_faults(adopt_vae(run(folder, {"max_frames": 1}))) if "vae.max_frames=1 is less" in f]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"norm": "group", "norm_groups": 4}, "vae.norm=group takes its statistics; use parallel.vae_context=time, or"),
        (
            {"mid_attention": True},
            "vae.mid_attention=true attends; use parallel.vae_context=time, or vae.mid_attention=",
        ),
    ],
)
def test_rows_of_a_frame_that_is_seen_whole(folder, changes, named):
    whole = Vae(**GEOMETRY, **changes, weights=str(folder))
    config = RunConfig(name="a", vae=whole, data=Data(train="x"), parallel=Parallel(sequence=2, vae_context="rows"))
    (fault,) = (f for f in resolve_faults(config) if named in f)
    assert fault.startswith("parallel.vae_context=rows divides frames")
