"""What may be asked of a trained run, and what its files are called."""

import pytest

from vidit.config import ConfigError, Data, Model, RunConfig, Vae
from vidit.overrides import field_names
from vidit.sample.run import MAX_STEM_BYTES, SAMPLING, requested, stem_of

TRAINED = RunConfig(
    name="a", vae=Vae(weights="x"), model=Model(patch=2), data=Data(train="x", num_frames=17, height=64, width=96)
)
FREE = TRAINED.model_copy(update={"model": Model(patch=2, absolute_position=False)})


def faults(trained, *overrides):
    with pytest.raises(ConfigError) as caught:
        requested(trained, overrides)
    return caught.value.faults


@pytest.mark.parametrize(
    ("prompt", "stem"),
    [
        ("A cat, running!", "a-cat-running"),
        ("кот ловит мяч", "кот-ловит-мяч"),
        ("猫が走る。", "猫が走る"),
        ("बिल्ली दौड़ती है", "बिल्ली-दौड़ती-है"),
        ("cafe\u0301", "café"),
        ("../../etc/passwd\n\x00", "etc-passwd"),
        ("", "empty"),
        ("!?", "empty"),
        ("🐈", "empty"),
        ("\ud800", "empty"),
    ],
)
def test_stems(prompt, stem):
    assert stem_of(prompt) == stem


@pytest.mark.parametrize("letter", ["a", "я", "猫", "\U00020000", "a "])
def test_a_long_prompt_fits_a_file_name(letter):
    assert 20 <= len(stem_of(letter * 500).encode()) <= MAX_STEM_BYTES


def test_every_option_that_acts_is_an_option():
    assert set(SAMPLING) <= set(field_names())


def test_a_smaller_size_is_granted():
    config = requested(
        TRAINED, ["data.height=32", "data.num_frames=9", "sample.num_steps=3", "diffusion.shift=constant"]
    )
    assert (config.data.height, config.data.num_frames, config.sample.num_steps) == (32, 9, 3)
    assert requested(TRAINED, []) == TRAINED


def test_another_guidance_may_be_told_to_who_takes_one():
    told = TRAINED.model_copy(update={"model": Model(patch=2, guidance=1.0)})
    assert requested(told, ["model.guidance=6"]).model.guidance == 6
    (fault,) = faults(told, "model.guidance=0")
    assert fault.endswith("was trained with 1: it has to be told a scale; use one above 0")
    (fault,) = faults(TRAINED, "model.guidance=6")
    assert fault == "model.guidance=6 of a model that was trained with 0: it takes no scale; use sample.guidance"


def test_the_kernels_may_be_others():
    """They are no matter of the weights."""
    bare = TRAINED.model_copy(update={"model": Model(patch=2, relative_position="rope", cross_keys="text")})
    assert requested(bare, ["model.attention_backend=flash"]).model.attention_backend == "flash"


def test_every_fault_of_a_request_at_once():
    found = faults(
        TRAINED, "model.width=64", "sample.sampler=ddpm", "foo.bar=1", "data.height=33", "data.width=112", "word"
    )
    starts = ("model.width=64: model.width does not act", "sample.sampler='ddpm'", "unknown key 'foo.bar'",
              "override 'word' has no '='", "data.height=33 is not", "data.width=112 is 7 tokens")  # fmt: skip
    assert len(found) == len(starts)
    assert all(fault.startswith(start) for fault, start in zip(found, starts, strict=True)), found


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "data.num_frames=21",
            "data.num_frames=21 is 6 tokens, but the position table holds 5, for data.num_frames=17",
        ),
        ("data.height=80", "data.height=80 is 5 tokens, but the position table holds 4, for data.height=64"),
        ("data.width=112", "data.width=112 is 7 tokens, but the position table holds 6, for data.width=96"),
    ],
)
def test_position_tables_bound_the_size(override, says):
    (fault,) = faults(TRAINED, override)
    assert fault.startswith(says)
    assert "sample at most" in fault
    assert "model.absolute_position=false" in fault
    assert requested(FREE, [override])
