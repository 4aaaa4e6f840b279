"""How the DiT may be divided, as data beside the model: what `vidit/train/parallelize.py` hands to `parallel`.

`*` in a pattern stands for one part of a dotted name. Every parameter fits exactly one pattern of `parameters`
and every pattern at least one name, so a new parameter without a rule is an error. What the words mean stands in
`parallel/tensor.py` and `parallel/sequence.py`; nothing here imports them.
"""

from dataclasses import dataclass
from typing import Literal

from vidit.config import AnyWindow, Model
from vidit.model.flops import window_of

Kind = Literal["column", "row", "per_head", "replicate"]
QK_NORMS = ("query_norm", "key_norm")


@dataclass(frozen=True)
class Plan:
    """Where the DiT of one config is cut.

    parameters: name pattern -> how tensor parallelism divides it.
    regions: module whose work the tensor ranks share -> its arguments they share it on.
    split: module -> which outputs hold one entry a video token, and in which dim: cut after it is called.
    gather: module -> dim of its output that holds the tokens: made whole after it is called.
    counted: module around `gather` that is called with the grid, which tells how many tokens are real.
    cores: modules that mix video tokens.
    windows: attention window of every block, in order; a pipeline stage knows from it what came before.
    positions: module among `split` whose outputs say where tokens are and carry no gradient -> the argument of a block,
        and of `counted`, that holds them.
    vectors: modules whose outputs are one vector a row, which acts on every video token.
    before: modules that work on what is whole: they are done when the tokens are cut, or know nothing of tokens.
    beside: modules with parameters that work on tokens between the regions.
    means: modules whose output is a mean over heads.
    placed: modules whose outputs follow the positions, one entry a token -> in which dim of which output.
    blocks: the repeated modules: units of checkpointing, compilation and sharding.
    """

    parameters: dict[str, Kind]
    regions: dict[str, tuple[int, ...]]
    split: dict[str, dict[int, int]]
    gather: dict[str, int]
    counted: str
    cores: tuple[str, ...]
    windows: dict[str, AnyWindow]
    positions: dict[str, int]
    vectors: tuple[str, ...]
    before: tuple[str, ...]
    beside: tuple[str, ...]
    means: tuple[str, ...]
    placed: dict[str, dict[int, int]]
    blocks: str = "blocks.*"


def sharding_plan(c: Model) -> Plan:
    """The plan of a model with this config."""
    cross = any(c.crosses(layer) for layer in range(c.num_layers))
    attending = ("attn", *["cross"] * cross, *["temporal"] * c.temporal_attention)
    wide_norms = [f"blocks.*.{name}.{norm}" for name in attending for norm in QK_NORMS]
    wide_norms += [f"blocks.*.attn.text_{norm}" for norm in QK_NORMS] * (c.text_weights == "own")
    parameters = _outside(c) | _attention("attn", c)
    # The tokens, and beside them the text's: features of cross-attention, or a stream.
    regions: dict[str, tuple[int, ...]] = {"blocks.*.attn": (0, 3) if c.is_joint else (0,)}
    cores = ["blocks.*.attn.core"]
    if c.relative_position == "bias":
        parameters["blocks.*.attn.bias.table"] = "column"
    if c.temporal_attention:
        parameters |= _attention("temporal", c)
        regions["blocks.*.temporal"] = (0,)
        cores.append("blocks.*.temporal.core")
    if cross:
        parameters |= _attention("cross", c)
        regions["blocks.*.cross"] = (0, 1)
        if c.cross_keys == "video_and_text":
            cores.append("blocks.*.cross.core")
    for mlp in ("mlp", *["text_mlp"] * (c.text_weights == "own")):
        parameters |= {f"blocks.*.{mlp}.up.*": "column", f"blocks.*.{mlp}.down.*": "row"}
        regions[f"blocks.*.{mlp}"] = (0,)
    modulations = ("blocks.*.modulation", "head.modulation")
    return Plan(
        parameters=parameters,
        regions=regions,
        split={"embed.tokens": {0: 1}, "positions": {0: 0, 1: 0, 2: 0}},
        gather={"head.project": 1},
        counted="head",
        cores=tuple(cores),
        windows={f"blocks.{layer}": window_of(c, layer) for layer in range(c.num_layers)},
        positions={"positions": 3},
        vectors=() if c.frame_times else modulations,
        before=("embed", *modulations) if c.frame_times else ("embed",),
        beside=tuple(_affine_norms(c)),
        means=tuple(f"{norm}.mean" for norm in wide_norms) if c.qk_norm == "width" else (),
        placed=_placed(c),
    )


def _placed(c: Model) -> dict[str, dict[int, int]]:
    """Sinusoids of time, and the vectors of frames."""
    placed = {} if c.time_layer is None else {f"blocks.{c.time_layer}.time": {0: 1}}
    if c.frame_times:
        placed |= {"blocks.*.frames": dict.fromkeys(range(c.num_vectors), 1), "head.frames": {0: 1, 1: 1}}
    return placed


def _outside(c: Model) -> dict[str, Kind]:
    """What every tensor rank computes alike: narrow next to the blocks, or one vector a row."""
    table = c.modulation == "table"
    patterns = ["embed.patch.project.*", "embed.conditioning.time.*.*", "head.*.*"]
    patterns += ["embed.patch.given.*"] * c.given_channels
    patterns += ["embed.conditioning.guidance.*.*"] * (c.guidance > 0)
    pooled = "embed.conditioning.pooled.*" + ".*" * (c.pooled_embedding == "mlp")
    patterns += [pooled] * c.pooled_text
    patterns += ["embed.conditioning.frame_rate.*.*"] * c.frame_rate
    for text in ("text", *["second_text"] * (c.interleaves_text)) if c.embeds_text else ():
        patterns += [f"embed.{text}.*.*"]
        refiner = [f"embed.{text}.refiner.*.*.*", f"embed.{text}.refiner.blocks.*.*.*"]
        patterns += refiner * (c.num_refiner_layers > 0)
    patterns += ["embed.position.*"] * (c.absolute_position == "learned")
    patterns += ["embed.conditioning.shared.*"] * c.shares_modulation
    patterns += ["blocks.*.modulation.table" if table else "blocks.*.modulation.*.*"]
    patterns += [f"{norm}.*" for norm in _affine_norms(c) if norm.startswith("blocks")]
    return dict.fromkeys(patterns, "replicate")


def _affine_norms(c: Model) -> list[str]:
    """Norms of tokens with scale and shift."""
    cross = any(c.crosses(layer) for layer in range(c.num_layers))
    single = ["blocks.*.norm"] * (c.num_single_layers > 0)
    double = ["blocks.*.attn_norm", "blocks.*.mlp_norm"] * (c.num_double_layers > 0)
    own = [*double, *single, "head.final_norm", "head.norm"] * c.norm_affine
    own += ["blocks.*.temporal_norm"] * (c.norm_affine and c.temporal_attention)
    return own + ["blocks.*.cross_norm"] * (cross and c.cross_norm == "affine")


def _attention(name: str, c: Model) -> dict[str, Kind]:
    kinds: dict[str, Kind] = {f"blocks.*.{name}.{part}.*": "column" for part in ("query", "key", "value")}
    kinds[f"blocks.*.{name}.out.*"] = "row"
    if c.qk_norm != "none":
        kind: Kind = "column" if c.qk_norm == "width" else "per_head"
        own = ("weight", "bias") if c.qk_norm == "head_affine" else ("weight",)
        kinds |= {f"blocks.*.{name}.{norm}.{parameter}": kind for norm in QK_NORMS for parameter in own}
    if name == "attn" and c.text_weights == "own":
        kinds |= {f"blocks.*.attn.text_{pattern.split('.', 3)[3]}": kind for pattern, kind in kinds.items()}
    return kinds
