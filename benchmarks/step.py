"""How long does a step take next to one of diffusers' class, and with windows next to full attention?

    python -m benchmarks.step [--repeats 15] [--ways fp32 bf16 "fp32 compiled" "bf16 compiled"] [--tokens 1 4 16]

For a small Wan, CogVideoX and Latte: forward and backward of the same latents, text and weights on one thread, ours and
theirs in turn, medians and quartiles of milliseconds of the processor, which other work on the machine disturbs less
than the clock. Both keep fp32 weights: in bf16 ours computes as `train.precision=bf16` does, theirs under autocast.
Compiled are our blocks, as by `train.compile`, and theirs one by one. Outputs are compared first. Needs the extra
`export`.

Then two of W.A.L.T.'s blocks (2312.06662; width 1024, windows 1x16x16 and 5x8x8) and two with full attention, on the
1280 tokens of 17 frames of 128x128 and on 4 and 16 times as many, fp32: milliseconds, their ratio, and that of FLOPs.
"""

import argparse
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from statistics import median, quantiles
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor, nn

from benchmarks.record import write_result
from vidit.config import AnyWindow, Model
from vidit.export.diffusers import from_diffusers
from vidit.model.context import EVERY_FRAME
from vidit.model.dit import DiT
from vidit.model.flops import forward_flops
from vidit.model.init import initialise
from vidit.model.windows import Grid

ROWS, TEXT, TOKENS, CHANNELS = 1, 128, 64, 16
LATENT = (6, 16, 24)
WAYS = ("fp32", "bf16", "fp32 compiled", "bf16 compiled")
SIZES: dict[str, dict[str, Any]] = {
    "WanTransformer3DModel": {
        "num_layers": 4, "num_attention_heads": 6, "attention_head_dim": 64, "ffn_dim": 1536, "text_dim": TEXT,
        "in_channels": CHANNELS, "out_channels": CHANNELS,
    },
    "CogVideoXTransformer3DModel": {
        "num_layers": 4, "num_attention_heads": 6, "attention_head_dim": 64, "text_embed_dim": TEXT,
        "in_channels": CHANNELS, "out_channels": CHANNELS, "use_rotary_positional_embeddings": True,
    },
    "LatteTransformer3DModel": {
        "num_layers": 2, "num_attention_heads": 6, "attention_head_dim": 64, "caption_channels": TEXT,
        "in_channels": CHANNELS, "out_channels": CHANNELS, "cross_attention_dim": 384, "sample_size": 32,
        "patch_size": 2, "activation_fn": "gelu-approximate", "attention_bias": True, "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False, "norm_eps": 1e-6, "video_length": LATENT[0],
    },
}  # fmt: skip


def pair(cls: str) -> tuple[nn.Module, nn.Module, Callable[[], Tensor], Callable[[], Tensor]]:
    """Ours, theirs, and a forward pass of each on the same inputs."""
    torch.manual_seed(0)
    theirs: Any = getattr(diffusers, cls)(**SIZES[cls])
    ours = from_diffusers(theirs)
    x, text = torch.randn(ROWS, CHANNELS, *LATENT), torch.randn(ROWS, TOKENS, TEXT)
    when, seen = torch.full((ROWS,), 500.0), torch.full((ROWS, TOKENS), EVERY_FRAME)
    grid = Grid(LATENT[0], LATENT[1] // 2, LATENT[2] // 2)
    more: dict[str, Any] = {}
    frames_first = cls.startswith("CogVideoX")
    if frames_first:
        plane = (grid.height, grid.width)
        more["image_rotary_emb"] = get_3d_rotary_pos_embed(64, ((0, 0), plane), plane, grid.frames)

    def call_theirs() -> Tensor:
        given = x.transpose(1, 2) if frames_first else x
        out: Tensor = theirs(given, timestep=when, encoder_hidden_states=text, return_dict=False, **more)[0]
        return out.transpose(1, 2) if frames_first else out

    def call_ours() -> Tensor:
        out: Tensor = ours(x, grid, when, text, seen)
        return out

    return ours, theirs, call_ours, call_theirs


def repeated(model: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer of either kind."""
    lists = [child for child in model.children() if isinstance(child, nn.ModuleList | nn.ModuleDict)]
    return [block for found in lists for block in found.children()]


def timed(module: nn.Module, call: Callable[[], Tensor], around: AbstractContextManager[Any]) -> float:
    """Milliseconds of the processor for a forward and backward pass."""
    module.zero_grad(set_to_none=True)
    began = time.process_time()
    with around:
        out = call()
    out.float().square().mean().backward()
    return (time.process_time() - began) * 1000


def measure(cls: str, way: str, repeats: int) -> dict[str, Any]:
    ours, theirs, call_ours, call_theirs = pair(cls)
    with torch.no_grad():
        expected = call_theirs()
    calls: dict[str, tuple[nn.Module, Callable[[], Tensor], AbstractContextManager[Any]]]
    calls = {"ours": (ours, call_ours, nullcontext()), "theirs": (theirs, call_theirs, nullcontext())}
    if "bf16" in way:
        ours.dtype = torch.bfloat16
        calls["theirs"] = theirs, call_theirs, torch.autocast("cpu", torch.bfloat16)
    if "compiled" in way:
        torch._dynamo.reset()
        for model in (ours, theirs):
            for block in repeated(model):
                block.compile()
    errors = {}
    for name, (module, call, around) in calls.items():
        with torch.no_grad(), around:
            errors[name] = float((call().float() - expected).abs().max() / expected.abs().max())
        timed(module, call, around)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, own in times.items():
            own.append(timed(*calls[name]))
    quarters = {name: [round(q, 1) for q in quantiles(own, n=4)] for name, own in times.items()}
    ratio = round(quarters["ours"][1] / quarters["theirs"][1], 3)
    return {"class": cls, "way": way, "errors": errors, **quarters, "ours / theirs": ratio}


def walt(windows: tuple[AnyWindow, ...], grid: Grid) -> tuple[DiT, Callable[[], Tensor], float]:
    """Two blocks of W.A.L.T.'s L with these windows, a forward pass, and its FLOPs, all without text."""
    c = Model.preset(
        "L", num_layers=2, windows=windows, relative_position="rope", absolute_position="none", cross_attention="none",
        self_conditioning=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    dit = DiT(c, CHANNELS, grid.shape, TEXT)
    initialise(dit, 0)
    x, when = torch.randn(1, CHANNELS, *grid.shape), torch.full((1,), 500.0)
    text, seen = torch.zeros(1, 1, TEXT), torch.full((1, 1), EVERY_FRAME)

    def call() -> Tensor:
        out: Tensor = dit(x, grid, when, text, seen)
        return out

    return dit, call, float(forward_flops(c, grid.shape, CHANNELS, TEXT, 1))


def measure_windows(scale: int, repeats: int) -> dict[str, Any]:
    side = 16 * math.isqrt(scale)
    grid = Grid(5, side, side)
    row: dict[str, Any] = {"tokens": grid.num_tokens}
    models = {"windows": walt(((1, 16, 16), (5, 8, 8)), grid), "full": walt(((0, 0, 0),), grid)}
    times: dict[str, list[float]] = {name: [] for name in models}
    for number in range(repeats + 1):
        for name, (dit, call, _) in models.items():
            taken = timed(dit, call, nullcontext())
            if number:  # the first warms up
                times[name].append(taken)
    row |= {name: round(median(own), 1) for name, own in times.items()}
    row |= {"full / windows": round(row["full"] / row["windows"], 2)}
    row["of FLOPs"] = round(models["full"][2] / models["windows"][2], 2)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--ways", nargs="*", default=WAYS, choices=WAYS)
    parser.add_argument("--tokens", nargs="*", type=int, default=(1, 4, 16), help="times 1280, squares")
    arguments = parser.parse_args()
    if arguments.repeats < 2 or any(math.isqrt(scale) ** 2 != scale for scale in arguments.tokens):
        parser.error(f"--repeats={arguments.repeats} --tokens={arguments.tokens}: at least 2 repeats, and squares")
    torch.set_num_threads(1)
    rows, windows = [], []
    for cls in SIZES:
        for way in arguments.ways:
            row = measure(cls, way, arguments.repeats)
            rows.append(row)
            shown = [f"{name} {row[name][1]} ms ({row[name][0]}-{row[name][2]})" for name in ("ours", "theirs")]
            print(f"{cls}, {way}: {', '.join(shown)}, {row['ours / theirs']}; from fp32 {row['errors']}", flush=True)
    for scale in arguments.tokens:
        windows.append(measure_windows(scale, max(2, arguments.repeats // scale)))
        print(windows[-1], flush=True)
    write_result("step", {"classes": rows, "windows": windows, "repeats": arguments.repeats})


if __name__ == "__main__":
    main()
