"""The score reads compressed videos right, marks wrong ones wrong and raises for none."""

import io

import av
import numpy as np
import pytest

from vidit.data.scenes import Scene, Split, render, sample_scene
from vidit.evaluate.scene_score import read_things, score_scene

SPLITS: tuple[Split, ...] = ("train", "held_out")
# The next hue in place of each: red -> yellow -> green ... by turning the channels.
TURN_CHANNELS = [2, 0, 1]


def h264(frames_THW3: np.ndarray) -> np.ndarray:
    """What is left of a video after H.264 as it is stored: yuv420p, crf 18."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "18"})
        stream.height, stream.width = frames_THW3.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames_THW3:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    buffer.seek(0)
    with av.open(buffer, "r") as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def single(index: int) -> Scene:
    return sample_scene(11, index, "train", count_odds=(1,))


def moving(number: int) -> list[Scene]:
    found = (scene for scene in map(single, range(10**6)) if scene.things[0].direction not in ("still", None))
    return [next(found) for _ in range(number)]


def test_two_hundred_compressed_scenes_are_read_right() -> None:
    right = {"colour": 0.0, "shape": 0.0, "direction": 0.0, "count": 0.0}
    out_of = dict.fromkeys(right, 0)
    for index in range(200):
        scene = sample_scene(5, index, SPLITS[index % 2])
        score = score_scene(scene, h264(render(scene)))
        for name in right:
            mark = getattr(score, name)
            out_of[name] += mark is not None
            right[name] += mark or 0.0
    accuracy = {name: right[name] / out_of[name] for name in right}
    assert min(accuracy.values()) >= 0.99, accuracy


def test_a_reading_tells_where_and_how_large() -> None:
    for scene in moving(10):
        thing = scene.things[0]
        (found,) = read_things(render(scene))
        first, last = thing.at(np.array([0.0, 1.0]))
        assert found.displacement == pytest.approx((last - first)[:2] / 64, abs=0.01)
        assert found.num_frames == scene.num_frames
        assert found.area < 3.3 * (thing.poses[0].radius / 64) ** 2


def test_permuted_colours_score_wrong_in_colour_alone() -> None:
    for scene in map(single, range(20)):
        score = score_scene(scene, render(scene)[..., TURN_CHANNELS])
        assert (score.colour, score.shape, score.direction, score.count) == (0, 1, 1, True)


def test_a_video_played_backwards_scores_wrong_in_direction_alone() -> None:
    for scene in moving(20):
        score = score_scene(scene, render(scene)[::-1])
        assert (score.colour, score.shape, score.direction, score.count) == (1, 1, 0, True)


def test_a_frozen_video_has_no_direction() -> None:
    for scene in moving(10):
        frozen = np.repeat(render(scene)[:1], scene.num_frames, axis=0)
        assert score_scene(scene, frozen).direction == 0


def test_another_thing_scores_wrong() -> None:
    every = list(map(single, range(60)))
    for other in every[:30]:
        here, video = other.things[0], render(other)
        for scene in every[:: len(every) // 10]:
            thing = scene.things[0]
            score = score_scene(scene, video)
            assert score.colour == (here.colour == thing.colour)
            assert score.shape == (here.shape == thing.shape)
            assert score.direction == (here.direction == thing.direction)


def test_a_missing_and_a_surplus_thing_are_noticed() -> None:
    pair = sample_scene(11, 0, "train", count_odds=(0, 1))
    lone = Scene(**{**vars(pair), "things": pair.things[:1]})
    missing = score_scene(pair, render(lone))
    assert not missing.count
    assert missing.colour == missing.shape == 0.5
    surplus = score_scene(lone, render(pair))
    assert not surplus.count
    assert surplus.colour == surplus.shape == 1


def test_two_things_of_one_colour_are_two() -> None:
    thing = single(0).things[0]
    beside = np.concatenate([render(single(0))] * 2, axis=2)
    assert [found.colour for found in read_things(beside)] == [thing.colour] * 2


@pytest.mark.parametrize("level", [0, 128, 255])
def test_an_empty_video_scores_nothing(level: int) -> None:
    score = score_scene(single(0), np.full((9, 64, 64, 3), level, dtype=np.uint8))
    assert (score.colour, score.shape, score.direction, score.count) == (0, 0, 0, False)


def test_no_video_raises() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, size=(9, 64, 64, 3), dtype=np.uint8)
    coarse = noise[:, ::8, ::8].repeat(8, axis=1).repeat(8, axis=2)
    flood = np.broadcast_to(np.array([255, 0, 0], dtype=np.uint8), (9, 64, 64, 3))
    for video in (noise, coarse, flood, noise[:1], noise[:0], noise[:, :5, :3], coarse[:, :, :20]):
        score_scene(single(0), video)
    assert read_things(flood) == []
    assert read_things(noise) == []


def test_a_blurred_and_noisy_video_is_still_read() -> None:
    rng = np.random.default_rng(0)
    right = 0
    for scene in map(single, range(40)):
        video = render(scene).astype(float)
        for axis in (1, 2):
            video = (np.roll(video, 1, axis) + video + np.roll(video, -1, axis)) / 3
        video = (video + rng.normal(0, 6, size=video.shape)).clip(0, 255).astype(np.uint8)
        score = score_scene(scene, video)
        right += score.colour == score.shape == score.direction == score.count == 1
    assert right >= 38


def test_an_array_that_is_no_video_is_refused() -> None:
    with pytest.raises(ValueError, match="give uint8"):
        read_things(np.zeros((9, 64, 64, 3)))
