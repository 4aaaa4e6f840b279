"""A video in TensorBoard without moviepy: an animated GIF in an image summary, as TensorBoard itself stores it."""

import io

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from vidit.data.encode import write_gif


def add_video(board: SummaryWriter, name: str, video_THW3: NDArray[np.uint8], step: int, fps: float) -> None:
    """Show (T, H, W, 3) uint8 frames under `name`, at `fps`."""
    _, height, width, _ = video_THW3.shape
    picture = io.BytesIO()
    write_gif(picture, video_THW3, fps)
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=picture.getvalue())
    board._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)
