"""How much of written text does `text_area` find, and how much that is none does it take for text?

    python -m benchmarks.text_area VIDEOS

Writes a caption of 6 to 21 letters in white with a black edge, in one of three fonts and sizes, over 5 stills of each
video of the folder; found is one whose area grows by 40 % of the caption's or more. Pictures of signs count as none.
"""

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from benchmarks.record import write_result
from vidit.data.curation.frames import streamed
from vidit.data.curation.text_area import text_area
from vidit.data.tar import VIDEO_SUFFIXES

STILLS, SIDE = 5, 480
FONTS = (cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_DUPLEX, cv2.FONT_HERSHEY_COMPLEX)
SIZES = (0.4, 0.6, 0.9)
Picture = NDArray[np.uint8]


def stills(video: bytes) -> list[Picture]:
    with streamed(video) as stream:
        wanted = stream.shown_at([(i + 0.5) / STILLS for i in range(STILLS)])
        return [frame.picture(SIDE) for frame in stream if frame.index in wanted]


def written(picture: Picture, rng: np.random.Generator) -> tuple[Picture, float]:
    """(the picture with a caption, the share that the caption takes)."""
    text, size = "a caption of this clip"[: rng.integers(6, 22)], float(rng.choice(SIZES))
    font, thickness = int(rng.choice(FONTS)), 1 + (size > 0.5)
    (width, height), below = cv2.getTextSize(text, font, size, thickness)
    out, (rows, columns) = picture.copy(), picture.shape[:2]
    corner = max(0, (columns - width) // 2), int(0.85 * rows)
    for grey, extra in ((0, 2), (255, 0)):
        cv2.putText(out, text, corner, font, size, (grey,) * 3, thickness + extra, cv2.LINE_AA)
    return out, min(width, columns) * (height + below) / (rows * columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", type=Path)
    rng, plain, grown = np.random.default_rng(0), dict[str, float](), list[float]()
    for path in sorted(parser.parse_args().videos.iterdir()):
        if path.suffix[1:].lower() not in VIDEO_SUFFIXES:
            continue
        areas = []
        for picture in stills(path.read_bytes()):
            areas.append(text_area(picture))
            with_text, share = written(picture, rng)
            grown.append((text_area(with_text) - areas[-1]) / share)
        plain[path.name] = float(np.mean(areas))
    result = {
        "videos": len(plain), "captions": len(grown), "found": float(np.mean(np.array(grown) >= 0.4)),
        "plain": {"mean": float(np.mean(list(plain.values()))), "median": float(np.median(list(plain.values()))),
                  "most": max(plain.items(), key=lambda item: item[1])},
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    print(write_result("text-area", result))


if __name__ == "__main__":
    main()
