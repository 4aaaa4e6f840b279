"""What a causal language model takes to be a text encoder: captions in a template, and the output of a chosen layer.

HunyuanVideo (2412.03603) asks a language model to describe a video and takes its hidden states at the caption. A token
sees only what stands before it, so the instruction stands in front of the caption, is read, and is cut off; what stands
behind the caption is kept. The last layers are there to name the next token, so an earlier one is taken, without the
final norm. The layers above it are dropped once the model is loaded: they would be held and computed for nothing.

Tokens are counted off in front, so the head of the template has to be the same tokens whatever follows it. A tokenizer
that joins its end with the caption's first letter would lose that word in silence, and is refused.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vidit.config.text import CAPTION_MARK

LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class Template:
    """What stands around a caption, and how many tokens in front of it are cut off, the begin token among them."""

    head: str = ""
    tail: str = ""
    num_cut: int = 0

    def around(self, caption: str) -> str:
        return f"{self.head}{caption}{self.tail}"

    def kept(self, mask_BS: Tensor) -> Tensor:
        """(B, C + L) to (B, L), True at one token a row at least: where odd blanks melt into the head, at the first."""
        mask_BL = mask_BS[:, self.num_cut :].clone()
        mask_BL[:, 0] |= ~mask_BL.any(dim=1)
        return mask_BL


WHOLE = Template()
"""The caption alone."""


def read_template(tokenizer: Any, template: str, section: str) -> Template:
    """A template, "" or with {} at the caption, with its tokens counted.

    Raises ValueError where they cannot be: where the head is other tokens before a caption than by itself.
    """
    if not template:
        return WHOLE
    head, _, tail = template.partition(CAPTION_MARK)
    own = tokenizer(head, add_special_tokens=False)["input_ids"]
    front = [*_begin(tokenizer), *own]
    for caption in ("", *LETTERS):
        found = tokenizer(f"{head}{caption}{tail}")["input_ids"][: len(front)]
        if found != front:
            raise ValueError(
                f"{section}.template: the tokenizer joins the end of {head[-20:]!r} with what follows, so its "
                f"{len(front)} tokens cannot be cut off; end it in a line break or a special token, with no blank after"
            )
    return Template(head, tail, len(front))


def _begin(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of any text."""
    letter = LETTERS[0]
    bare, whole = tokenizer(letter, add_special_tokens=False)["input_ids"], tokenizer(letter)["input_ids"]
    start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return list(whole[:start])


def keep_layers(model: Any, hidden_layer: int, section: str) -> None:
    """Let a LLaMA's last hidden state be `hidden_states[hidden_layer]` of transformers: -1 is behind the final norm.

    Raises ValueError where the model has fewer layers.
    """
    depth = len(model.layers)
    if -hidden_layer > depth:
        raise ValueError(
            f"{section}.hidden_layer={hidden_layer} lies before the first of the model's {depth} layers; "
            f"use -1 to -{depth}"
        )
    model.config.use_cache = False
    if hidden_layer < -1:
        model.layers = model.layers[: depth + 1 + hidden_layer]
        model.norm = nn.Identity()
