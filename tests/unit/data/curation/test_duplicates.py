"""Near-duplicates: copies are found whatever their size, different clips are not, and the search misses none."""

from __future__ import annotations

import random

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from vidit.data.curation.duplicates import FRACTIONS, HASH_BITS, MAX_DISTANCE, clip_hash, find_duplicates
from vidit.data.curation.frames import streamed
from vidit.data.curation.score_set import DISTANCE
from vidit.data.encode import encode_mp4
from vidit.data.scenes import render, sample_scene

Video = NDArray[np.uint8]


def moving(seed: int) -> Video:
    """24 frames of hard-edged blobs that drift."""
    rng = np.random.default_rng(seed)
    base = cv2.GaussianBlur(rng.standard_normal((120, 260, 3)), (0, 0), 8)
    base = np.where(base > 0, 200, 60).astype(np.uint8)
    return np.stack([base[:, 4 * i : 4 * i + 160] for i in range(24)])


def hash_of(frames_THWC: Video, fps: float = 12.0, crf: int = 18) -> int:
    with streamed(encode_mp4(frames_THWC, fps, crf)) as stream:
        numbers = stream.shown_at(FRACTIONS)
        pictures = {frame.index: frame.picture(480) for frame in stream if frame.index in numbers}
    return clip_hash([pictures[number] for number in numbers])


def resized(frames_THWC: Video, height: int, width: int) -> Video:
    return np.stack([cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA) for frame in frames_THWC])


def distance(a: int, b: int) -> int:
    return (a ^ b).bit_count()


def test_copies_of_another_size_rate_and_quality_are_close_and_others_are_not() -> None:
    originals = [moving(seed) for seed in range(6)]
    hashes = [hash_of(frames) for frames in originals]
    for frames, value in zip(originals, hashes, strict=True):
        assert distance(value, hash_of(resized(frames, 60, 80), crf=28)) <= DISTANCE
        assert distance(value, hash_of(resized(frames, 180, 240))) <= DISTANCE
        assert distance(value, hash_of(frames[::2], 6.0)) <= DISTANCE
        assert distance(value, hash_of(frames[::-1])) > DISTANCE, "the same pictures in another order"
    assert min(distance(a, b) for i, a in enumerate(hashes) for b in hashes[:i]) > 2 * DISTANCE


def test_scenes_differ() -> None:
    hashes = [hash_of(render(sample_scene(0, index, "train"))) for index in range(12)]
    assert find_duplicates(hashes, DISTANCE) == [None] * 12


def test_pictures_of_one_colour_are_alike_whatever_their_noise() -> None:
    noise = np.random.default_rng(0).integers(0, 2, (2, 3, 64, 64, 3), dtype=np.uint8)
    assert clip_hash(list(noise[0])) == clip_hash(list(200 + noise[1])) == 0


@pytest.mark.parametrize("max_distance", [0, 7, 11, 12, 18, MAX_DISTANCE])
def test_the_search_agrees_with_a_comparison_of_all_pairs(max_distance: int) -> None:
    chance = random.Random(max_distance)
    hashes: list[int] = []
    for _ in range(400):
        value = chance.choice(hashes) if hashes and chance.random() < 0.6 else chance.getrandbits(HASH_BITS)
        # spread evenly, so that each band has its share: the hardest case for banding
        for bit in chance.sample(range(HASH_BITS), chance.randint(0, MAX_DISTANCE + 3)):
            value ^= 1 << bit
        hashes.append(value)
    expected: list[tuple[int, int] | None] = []
    for place, value in enumerate(hashes):
        roots = (other for other in range(place) if expected[other] is None)
        near = ((other, distance(hashes[other], value)) for other in roots)
        expected.append(next((pair for pair in near if pair[1] <= max_distance), None))
    assert find_duplicates(hashes, max_distance) == expected
    assert any(expected)
    assert None in expected


def test_bits_spread_over_all_bands_are_found() -> None:
    one_in_each_band = sum(1 << 16 * band for band in range(12))
    two_in_all_but_one = sum((1 << 16 * band) | (2 << 16 * band) for band in range(11)) | 1 << 16 * 11
    assert find_duplicates([0, one_in_each_band], 12) == [None, (0, 12)]
    assert find_duplicates([0, two_in_all_but_one], 23) == [None, (0, 23)]


def test_a_distance_that_cannot_be_searched_is_refused() -> None:
    with pytest.raises(ValueError, match="24 bits cannot be searched; use 0 to 23"):
        find_duplicates([0], 24)
