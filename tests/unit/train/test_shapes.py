"""Buckets of the clips themselves: each clip keeps its size, aspect and length under a limit of tokens."""

from __future__ import annotations

from math import log

import numpy as np
import pytest

from vidit.batching import clip_tokens
from vidit.config import Bucket, Data, Model, RunConfig, Vae
from vidit.data.buckets import NEAR, Facts, assign
from vidit.data.texts import Texts
from vidit.resolve import faults
from vidit.train.shapes import Limits, Shapes, native_shapes

CLIPS = (
    (120, 1920, 1080), (64, 1280, 720), (33, 854, 480), (20, 640, 480), (300, 1080, 1920), (1, 512, 512),
    (1, 1000, 700), (16, 100, 90), (7, 20, 12),
)  # fmt: skip
"""Frames, width, height."""


def facts(clips: tuple[tuple[int, int, int], ...] = CLIPS) -> Facts:
    frames, width, height = (np.array(column) for column in zip(*clips, strict=True))
    return Facts(Texts.of([f"clip-{i}" for i in range(len(clips))]), frames, width, height)


def config_of(**model: object) -> RunConfig:
    """A VAE of strides 4 x 8 x 8."""
    vae = Vae(spatial_down=(True, True), temporal_down=(True, True), patch=2)
    return RunConfig(name="x", vae=vae, model=Model(patch=2, relative_position="rope", **model), data=Data(train="x"))


def shapes(config: RunConfig, own: list[Facts], limits: Limits) -> list[Bucket]:
    return native_shapes(config, own, limits).buckets


def test_each_clip_goes_to_the_shape_that_was_made_for_it() -> None:
    config, limits = config_of(), Limits(tokens=8192)
    buckets = shapes(config, [facts()], limits)
    assert len(buckets) == len(CLIPS)
    assert max(clip_tokens(config, bucket) for bucket in buckets) <= limits.tokens
    for clip, place in zip(CLIPS, assign(facts(), buckets, 0, longest_first=True), strict=True):
        alone = shapes(config, [facts((clip,))], limits)[0]
        assert buckets[place] == alone, clip
    described = config.model_copy(update={"data": Data(train="x", buckets=tuple(buckets))})
    assert not [fault for fault in faults(described) if "data.buckets" in fault]


def test_sizes_are_kept_and_large_pictures_scaled() -> None:
    config = config_of()
    (small,) = shapes(config, [facts(((33, 854, 480),))], Limits(tokens=20_000))
    assert (small.num_frames, small.height, small.width) == (33, 480, 848)
    (large,) = shapes(config, [facts(((120, 1920, 1080),))], Limits(tokens=8192))
    assert large.num_frames == 117
    assert abs(log(large.width / large.height) - log(1920 / 1080)) < 3 * NEAR
    assert 0.8 * 8192 < clip_tokens(config, large) <= 8192
    (short,) = shapes(config, [facts(((120, 1920, 1080),))], Limits(tokens=8192, frames=16, side=64))
    assert short.num_frames == 13
    assert short.height % 64 == short.width % 64 == 0
    (tiny,) = shapes(config, [facts(((7, 20, 12),))], Limits(tokens=100))
    assert (tiny.num_frames, tiny.height, tiny.width) == (5, 16, 16), "a clip smaller than a token is enlarged"


def test_patches_of_several_frames_take_lengths_that_they_divide() -> None:
    config = config_of().model_copy(update={"model": Model(patch=(2, 2, 2), relative_position="rope")})
    (bucket,) = shapes(config, [facts(((20, 64, 64),))], Limits(tokens=1000))
    assert bucket.num_frames == 13, "4 latent frames"


def test_rare_shapes_are_left_out() -> None:
    many = ((33, 256, 256),) * 9 + ((33, 256, 128),)
    assert len(shapes(config_of(), [facts(many)], Limits(tokens=9000))) == 2
    (kept,) = shapes(config_of(), [facts(many[:5]), facts(many[5:])], Limits(tokens=9000, share=0.2))
    assert (kept.height, kept.width) == (256, 256)


def test_limits_that_no_clip_fits_are_refused() -> None:
    with pytest.raises(ValueError, match="--side 40 is not divisible by 16"):
        shapes(config_of(), [facts()], Limits(tokens=100, side=40))
    with pytest.raises(ValueError, match="--max-tokens 3 is less than the 4 of a picture of 32x32"):
        shapes(config_of(), [facts()], Limits(tokens=3, side=32))
    with pytest.raises(ValueError, match="there is no clip to take shapes from"):
        shapes(config_of(), [], Limits(tokens=100))
    with pytest.raises(ValueError, match="lower --share"):
        shapes(config_of(), [facts()], Limits(tokens=100, share=0.9))
    for share in (float("nan"), -0.1, 1.1):
        with pytest.raises(ValueError, match="is no share of the clips"):
            shapes(config_of(), [facts()], Limits(tokens=100, share=share))
    paired = config_of().model_copy(update={"model": Model(patch=(2, 2, 2), relative_position="rope")})
    with pytest.raises(ValueError, match="--max-frames 4 is less than the 5"):
        shapes(paired, [facts()], Limits(tokens=100, frames=4))
    with pytest.raises(ValueError, match="the longest clip has 1 frames"):
        shapes(paired, [facts(((1, 64, 64),))], Limits(tokens=100))


def test_clips_too_short_for_whole_tokens_and_cut_ones_are_counted() -> None:
    paired = config_of().model_copy(update={"model": Model(patch=(2, 2, 2), relative_position="rope")})
    found = native_shapes(paired, [facts(((1, 64, 64), (4, 64, 64), (5, 64, 64)))], Limits(tokens=1000))
    assert ([b.num_frames for b in found.buckets], found.too_short, found.cut) == ([5], 2, 0)
    assert found.remarks() == ["of 3 clips 2 are left out: the shortest shape has 5 frames"]
    rare = native_shapes(config_of(), [facts(((5, 64, 64),) * 9 + ((33, 64, 64),))], Limits(tokens=1000, share=0.2))
    assert ([b.num_frames for b in rare.buckets], rare.too_short, rare.cut) == ([5], 0, 1)


def unfilled(config: RunConfig, own: Facts, found: Shapes) -> tuple[int, int]:
    """Buckets without clips, and clips in one that is shorter than the VAE of stride 4 can code of them."""
    place = assign(own, found.buckets, 0, longest_first=True)
    lengths = np.array([bucket.num_frames for bucket in found.buckets])[place]
    return len(found.buckets) - len(set(place.tolist())), int((lengths < 1 + (own.frames - 1) // 4 * 4).sum())


def test_a_limit_that_binds_keeps_lengths() -> None:
    """The shorter clip's shape is nearer in aspect to the longer clip than its own."""
    own = facts(((5, 84, 148), (17, 92, 160)))
    assert unfilled(config_of(), own, native_shapes(config_of(), [own], Limits(tokens=32))) == (0, 0)


@pytest.mark.parametrize("seed", range(8))
def test_no_bucket_is_empty_and_no_clip_is_cut(seed: int) -> None:
    draw = np.random.default_rng(seed)
    aspects = draw.choice([9 / 16, 3 / 4, 1.0, 4 / 3, 16 / 9], 120)
    short = draw.integers(40, 400, 120)
    clips = tuple(
        (int(t), int(s * a), int(s)) for t, s, a in zip(draw.integers(1, 66, 120), short, aspects, strict=True)
    )
    found = native_shapes(config_of(), [facts(clips)], Limits(tokens=(100, 300, 1000, 4000)[seed % 4]))
    assert unfilled(config_of(), facts(clips), found) == (0, 0)
    assert (found.too_short, found.cut) == (0, 0)
