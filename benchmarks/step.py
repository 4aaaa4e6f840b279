"""How long does a step take next to one of diffusers' class, and with windows next to full attention?

    python -m benchmarks.step [--repeats 15] [--ways fp32 bf16 "fp32 compiled" "bf16 compiled"] [--tokens 1 4 16]
    python -m benchmarks.step --device cuda --ways bf16 "bf16 compiled"

For a Wan, a CogVideoX and a Latte of few layers: forward and backward of the same latents, text and weights, ours and
theirs in turn, medians and quartiles. On a CPU they are small and run on one thread, and milliseconds are those of the
processor, which other work on the machine disturbs less than the clock; on CUDA widths and latents are those of
Wan 2.1 1.3B (41 frames of 480x832), CogVideoX-2B (25 frames of 480x720) and Latte-1 (16 frames of 512x512),
milliseconds are the device's, and peak memory is that above the weights. Both keep fp32 weights: in bf16 ours computes
as `train.precision=bf16` does, theirs under autocast. Compiled are our blocks, as by `train.compile`, and theirs one by
one. Outputs are compared first. Needs the extra `export`.

Then two of W.A.L.T.'s blocks (2312.06662; width 1024, windows 1x16x16 and 5x8x8) and two with full attention, on the
1280 tokens of 17 frames of 128x128 and on 4 and 16 times as many, fp32 or, on CUDA, bf16: milliseconds, their ratio,
and that of FLOPs.
"""

import argparse
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
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

CHANNELS, TEXT = 16, 128
WAYS = ("fp32", "bf16", "fp32 compiled", "bf16 compiled")
LATTE: dict[str, Any] = {
    "patch_size": 2, "activation_fn": "gelu-approximate", "attention_bias": True, "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False, "norm_eps": 1e-6,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A class of diffusers, its latent (frames, height, width), and how long and wide the text is."""

    cls: str
    latent: tuple[int, int, int]
    tokens: int
    text: int
    geometry: dict[str, Any]


CASES = {
    "cpu": (
        Case("WanTransformer3DModel", (6, 16, 24), 64, TEXT, {
            "num_layers": 4, "num_attention_heads": 6, "attention_head_dim": 64, "ffn_dim": 1536, "text_dim": TEXT,
        }),
        Case("CogVideoXTransformer3DModel", (6, 16, 24), 64, TEXT, {
            "num_layers": 4, "num_attention_heads": 6, "attention_head_dim": 64, "text_embed_dim": TEXT,
            "use_rotary_positional_embeddings": True,
        }),
        Case("LatteTransformer3DModel", (6, 16, 24), 64, TEXT, LATTE | {
            "num_layers": 2, "num_attention_heads": 6, "attention_head_dim": 64, "caption_channels": TEXT,
            "cross_attention_dim": 384, "sample_size": 32, "video_length": 6,
        }),
    ),
    "cuda": (
        Case("WanTransformer3DModel", (11, 60, 104), 512, 4096, {
            "num_layers": 4, "num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "text_dim": 4096,
        }),
        Case("CogVideoXTransformer3DModel", (7, 60, 90), 226, 4096, {
            "num_layers": 4, "num_attention_heads": 30, "attention_head_dim": 64, "text_embed_dim": 4096,
            "use_rotary_positional_embeddings": True,
        }),
        Case("LatteTransformer3DModel", (16, 64, 64), 120, 4096, LATTE | {
            "num_layers": 4, "num_attention_heads": 16, "attention_head_dim": 72, "caption_channels": 4096,
            "cross_attention_dim": 1152, "sample_size": 64, "video_length": 16,
        }),
    ),
}  # fmt: skip


def pair(case: Case, device: torch.device) -> tuple[nn.Module, nn.Module, Callable[[], Tensor], Callable[[], Tensor]]:
    """Ours, theirs, and a forward pass of each on the same inputs."""
    torch.manual_seed(0)
    theirs: Any = getattr(diffusers, case.cls)(in_channels=CHANNELS, out_channels=CHANNELS, **case.geometry)
    ours = from_diffusers(theirs).to(device)
    theirs.to(device)
    x = torch.randn(1, CHANNELS, *case.latent, device=device)
    text = torch.randn(1, case.tokens, case.text, device=device)
    when, seen = torch.full((1,), 500.0, device=device), torch.full((1, case.tokens), EVERY_FRAME, device=device)
    grid = Grid(case.latent[0], case.latent[1] // 2, case.latent[2] // 2)
    more: dict[str, Any] = {}
    frames_first = case.cls.startswith("CogVideoX")
    if frames_first:
        plane = (grid.height, grid.width)
        more["image_rotary_emb"] = get_3d_rotary_pos_embed(64, ((0, 0), plane), plane, grid.frames, device=device)

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
    """Milliseconds, of the processor or of the device, for a forward and backward pass."""
    module.zero_grad(set_to_none=True)
    cuda = next(module.parameters()).is_cuda
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2)) if cuda else (None, None)
    began = time.process_time()
    if start:
        torch.cuda.synchronize()
        start.record()
    with around:
        out = call()
    out.float().square().mean().backward()
    if start and end:
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    return (time.process_time() - began) * 1000


def peak_gib(module: nn.Module, call: Callable[[], Tensor], around: AbstractContextManager[Any]) -> float:
    """What a pass takes of the device's memory above what was there before; the gradients count."""
    module.zero_grad(set_to_none=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    timed(module, call, around)
    module.zero_grad(set_to_none=True)
    return round((torch.cuda.max_memory_allocated() - before) / 2**30, 2)


def measure(case: Case, way: str, repeats: int, device: torch.device) -> dict[str, Any]:
    ours, theirs, call_ours, call_theirs = pair(case, device)
    with torch.no_grad():
        expected = call_theirs()
    calls: dict[str, tuple[nn.Module, Callable[[], Tensor], AbstractContextManager[Any]]]
    calls = {"ours": (ours, call_ours, nullcontext()), "theirs": (theirs, call_theirs, nullcontext())}
    if "bf16" in way:
        ours.dtype = torch.bfloat16
        calls["theirs"] = theirs, call_theirs, torch.autocast(device.type, torch.bfloat16)
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
    row = {"class": case.cls, "way": way, "errors": errors, **quarters, "ours / theirs": ratio}
    if device.type == "cuda":
        row["peak_gib"] = {name: peak_gib(*call) for name, call in calls.items()}
    return row


def walt(windows: tuple[AnyWindow, ...], grid: Grid, device: torch.device) -> tuple[DiT, Callable[[], Tensor], float]:
    """Two blocks of W.A.L.T.'s L with these windows, a forward pass, and its FLOPs, all without text."""
    c = Model.preset(
        "L", num_layers=2, windows=windows, relative_position="rope", absolute_position="none", cross_attention="none",
        self_conditioning=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    dit = DiT(c, CHANNELS, grid.shape, TEXT)
    initialise(dit, 0)
    dit.to(device)
    dit.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    x, when = torch.randn(1, CHANNELS, *grid.shape, device=device), torch.full((1,), 500.0, device=device)
    text, seen = torch.zeros(1, 1, TEXT, device=device), torch.full((1, 1), EVERY_FRAME, device=device)

    def call() -> Tensor:
        out: Tensor = dit(x, grid, when, text, seen)
        return out

    return dit, call, float(forward_flops(c, grid.shape, CHANNELS, TEXT, 1))


def measure_windows(scale: int, repeats: int, device: torch.device) -> dict[str, Any]:
    side = 16 * math.isqrt(scale)
    grid = Grid(5, side, side)
    row: dict[str, Any] = {"tokens": grid.num_tokens}
    models = {"windows": walt(((1, 16, 16), (5, 8, 8)), grid, device), "full": walt(((0, 0, 0),), grid, device)}
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
    parser.add_argument("--device", default="cpu", choices=CASES)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--ways", nargs="*", default=WAYS, choices=WAYS)
    parser.add_argument("--tokens", nargs="*", type=int, default=(1, 4, 16), help="times 1280, squares")
    arguments = parser.parse_args()
    if arguments.repeats < 2 or any(math.isqrt(scale) ** 2 != scale for scale in arguments.tokens):
        parser.error(f"--repeats={arguments.repeats} --tokens={arguments.tokens}: at least 2 repeats, and squares")
    torch.set_num_threads(1)
    device, rows, windows = torch.device(arguments.device), [], []
    for case in CASES[arguments.device]:
        for way in arguments.ways:
            row = measure(case, way, arguments.repeats, device)
            rows.append(row)
            shown = [f"{name} {row[name][1]} ms ({row[name][0]}-{row[name][2]})" for name in ("ours", "theirs")]
            shown += [f"GiB {row['peak_gib']}"] if "peak_gib" in row else []
            print(
                f"{case.cls}, {way}: {', '.join(shown)}, {row['ours / theirs']}; from fp32 {row['errors']}", flush=True
            )
    for scale in arguments.tokens:
        windows.append(measure_windows(scale, max(2, arguments.repeats // scale), device))
        print(windows[-1], flush=True)
    name = "step" if device.type == "cpu" else "gpu-step-classes"
    print(write_result(name, {"classes": rows, "windows": windows, "repeats": arguments.repeats}))


if __name__ == "__main__":
    main()
