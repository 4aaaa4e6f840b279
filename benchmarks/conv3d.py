"""In which formulation is a causal 3D convolution fastest on this CPU, forward and with its gradients?

    python -m benchmarks.conv3d

GFLOP/s, counted as of the plain sum, of F.conv3d in both memory formats, of `vidit.vae.convolution.conv3d`, which goes
in pairs of frames forward, and of what it was chosen from: k_t convolutions of two dimensions over all frames, the same
with the frames stacked as channels, and a matrix product for each tap of the kernel. All of them in fp32 and bf16, with
the largest error against fp64. Rows come in turn, the best of a few repeats counts, so that a busy machine slows all
alike.
"""

import argparse
import json
import os
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.record import write_result
from vidit.vae.convolution import channels_last, conv3d

# rows, channels, channels out, frames with those in front, side. What streams, what trains, the two ends.
SHAPES = (
    (1, 16, 16, 6, 64), (1, 32, 32, 3, 128), (1, 64, 64, 4, 64), (1, 128, 128, 3, 32), (1, 256, 256, 3, 16),
    (1, 32, 32, 19, 64), (1, 128, 128, 19, 32), (4, 16, 16, 11, 32), (4, 64, 64, 7, 16), (1, 3, 32, 6, 128),
    (1, 32, 3, 6, 128),
)  # fmt: skip
Form = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.conv3d(x, w, b, padding=(0, 1, 1))


def ours(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return conv3d(x, w, b, (1, 1, 1), (1, 1))


def over_frames(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """k_t two-dimensional convolutions of all frames, summed."""
    n = x.shape[2] - 2
    terms = [F.conv2d(x[:, :, k : k + n].transpose(1, 2).flatten(0, 1), w[:, :, k], padding=1) for k in range(3)]
    out = terms[0] + terms[1] + terms[2] + b.view(-1, 1, 1)
    return out.unflatten(0, (len(x), n)).transpose(1, 2)


def stacked(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """One two-dimensional convolution of 3 frames as channels."""
    n = x.shape[2] - 2
    frames = torch.cat([x[:, :, k : k + n] for k in range(3)], 1).transpose(1, 2).flatten(0, 1)
    out = F.conv2d(frames, w.transpose(1, 2).flatten(1, 2), b, padding=1)
    return out.unflatten(0, (len(x), n)).transpose(1, 2)


def taps(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """27 matrix products."""
    n, height, width = x.shape[2] - 2, *x.shape[3:]
    last = F.pad(x, (1, 1, 1, 1)).movedim(1, -1)
    out = b.expand(len(x), n, height, width, -1)
    for k in range(3):
        for i in range(3):
            for j in range(3):
                out = out + last[:, k : k + n, i : i + height, j : j + width] @ w[:, :, k, i, j].T
    return out.movedim(-1, 1)


# name -> how it is written, whether the channels lie innermost
FORMS: dict[str, tuple[Form, bool]] = {
    "conv3d": (plain, False), "conv3d, channels last": (plain, True), "ours": (ours, True),
    "2d over frames": (over_frames, False), "2d over frames, channels last": (over_frames, True),
    "2d of stacked frames, channels last": (stacked, True), "a product for each tap": (taps, True),
}  # fmt: skip


def best_s(call: Callable[[], object], repeats: int) -> float:
    """The shortest of some calls, after one that does not count."""
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measure(shape: tuple[int, ...], dtype: torch.dtype, form: Form, last: bool, repeats: int) -> dict[str, float]:
    """GFLOP/s forward, and of forward and backward together; the largest error over the largest value."""
    rows, channels, outs, frames, side = shape
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, channels, frames, side, side, generator=g).to(dtype)
    w, b = (torch.randn(s, generator=g).mul(0.05).to(dtype) for s in ((outs, channels, 3, 3, 3), (outs,)))
    x = channels_last(x) if last else x
    flop = 2 * 27 * channels * outs * rows * (frames - 2) * side**2
    with torch.no_grad():
        exact = plain(x.double(), w.double(), b.double())
        error = float((form(x, w, b) - exact).abs().max() / exact.abs().max())
        forward = best_s(lambda: form(x, w, b), repeats)
    leaves = [t.detach().requires_grad_() for t in (x, w, b)]
    grad = channels_last(torch.randn(exact.shape, generator=g).to(dtype))

    def both() -> object:
        return torch.autograd.grad(form(*leaves), leaves, grad)

    return {
        "forward_gflop_s": round(flop / forward / 1e9, 1),
        "train_gflop_s": round(3 * flop / best_s(both, repeats) / 1e9, 1),
        "error": error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=4)
    arguments = parser.parse_args()
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            found = {name: measure(shape, dtype, *form, arguments.repeats) for name, form in FORMS.items()}
            rows.append({"shape": shape, "dtype": str(dtype).removeprefix("torch."), **found})
            speeds = {name: (v["forward_gflop_s"], v["train_gflop_s"]) for name, v in found.items()}
            print(rows[-1]["dtype"], *shape, json.dumps(speeds), flush=True)
    print(write_result("conv3d", {"threads": torch.get_num_threads(), "load": os.getloadavg()[0], "rows": rows}))


if __name__ == "__main__":
    main()
