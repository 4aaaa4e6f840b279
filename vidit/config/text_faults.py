"""What is wrong with how a model reads text: faults of the section `model`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vidit.config.model import Model


def text_faults(c: Model) -> Iterator[str]:
    """Parts for text that exclude each other, one line each."""
    if c.text_padding == "seen" and c.cross_attention in ("per_frame", "all") and c.cross_keys != "text":
        yield "model.text_padding=seen is for text alone among the keys; set model.cross_keys=text"
    if c.num_refiner_layers and c.text_embedding != "linear":
        yield (
            f"model.num_refiner_layers={c.num_refiner_layers} refines what text_embedding=linear gives, not "
            f"{c.text_embedding}; set that, or num_refiner_layers=0"
        )
    if c.text_embedding == "none" and (c.is_joint or (c.cross_attention != "none" and c.cross_keys != "text")):
        yield (
            "model.text_embedding=none leaves text features as wide as their encoder makes them, but the same "
            "projections are for video tokens; set model.cross_attention=all, model.cross_keys=text"
        )
    parities = {layer % 2 for layer in range(c.num_layers) if c.crosses(layer)}
    if c.cross_text == "interleaved" and len(parities) == 1:
        yield (
            f"model.cross_text=interleaved, but only {'odd' if 1 in parities else 'even'} blocks attend to text (model."
            f"num_layers={c.num_layers}, windows={c.windows}): one encoder would not be read; use cross_attention=all "
            "and at least 2 layers, or cross_text=first"
        )
