"""How the VAE may be divided over time or rows, as data beside it: what `parallel.context.apply_context` is handed.

What the words mean stands in `parallel/context.py`; nothing here imports it.
"""

from dataclasses import dataclass

from vidit.config import Vae


@dataclass(frozen=True)
class ContextPlan:
    """Where the VAE of one config is divided.

    fronts: modules that give the frames in front of a part; what the first frame is repeated for.
    drops: modules that drop frames where the video starts.
    convolutions: those that look at neighbouring frames and rows.
    time, rows: module -> frames or rows for each latent one, of its input and of its output.
    """

    fronts: tuple[str, ...]
    drops: tuple[str, ...]
    convolutions: tuple[str, ...]
    time: dict[str, tuple[int, int]]
    rows: dict[str, tuple[int, int]]


def context_plan(c: Vae) -> ContextPlan:
    """The plan of a VAE with this config."""
    t, s = c.temporal_stride, c.spatial_stride
    blocks = [part for part, n in (("encoder", c.num_res_blocks), ("decoder", c.decoder_res_blocks)) if any(n)]
    convolutions = ["encoder.first", "decoder.first", "decoder.last"]
    convolutions += [f"{part}.layers.*.{conv}" for part in blocks for conv in ("conv1", "conv2")]
    joints, folded, ldm = len(c.multipliers) > 1, c.patch_frames > 1, c.layers == "ldm"
    convolutions += ["encoder.layers.*.conv"] * joints
    convolutions += ["encoder.last"] * ldm + ["decoder.layers.*.conv"] * (ldm and joints)
    return ContextPlan(
        fronts=(
            *(f"{name}.front" for name in convolutions),
            *["encoder.layers.*.pair"] * (joints and not ldm),
            *["encoder.fold.front"] * folded,
        ),
        drops=(*["decoder.layers.*.drop"] * joints, *["decoder.unfold.drop"] * folded),
        convolutions=tuple(convolutions),
        time={"encoder": (t, 1), "decoder": (1, t)},
        rows={"encoder": (s, 1), "decoder": (1, s)},
    )
