"""Videos in TensorBoard."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vidit.train.metrics import Reporter


@pytest.mark.parametrize(("fps", "frame_ms"), [(8.0, 120), (50.0, 20), (60.0, 20), (240.0, 20)])
def test_a_clip_of_any_rate_is_shown_no_faster_than_a_gif_can(tmp_path: Path, fps: float, frame_ms: int) -> None:
    with Reporter(tmp_path, 1, 0) as reporter:
        frames = torch.arange(4, dtype=torch.uint8).mul(60).view(4, 1, 1, 1).expand(4, 8, 12, 3)
        reporter.video(3, "sample/0", frames, fps)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    (event,) = board.Images("sample/0")
    assert (event.step, event.width, event.height) == (3, 12, 8)
    with Image.open(io.BytesIO(event.encoded_image_string)) as image:
        assert image.info["duration"] == frame_ms
