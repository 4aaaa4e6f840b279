"""A video in TensorBoard without moviepy: an animated GIF in an image summary, as TensorBoard itself stores it."""

import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from vidit.data.encode import write_gif

MAX_GIF_FPS = 50.0


def add_video(board: SummaryWriter, name: str, video_THW3: NDArray[np.uint8], step: int, fps: float) -> None:
    """Show (T, H, W, 3) uint8 frames under `name`, at `fps` or as fast as a GIF can."""
    _, height, width, _ = video_THW3.shape
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.gif"
        write_gif(path, video_THW3, min(fps, MAX_GIF_FPS))
        data = path.read_bytes()
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
    board._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)
