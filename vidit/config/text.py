"""The text encoder, and a second one beside it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from vidit.config.section import Section

# Rows of the byte encoder's table that no n-gram is hashed to: padding, begin token.
RESERVED_TEXT_ROWS = 2
# Where the caption stands in text.template.
CAPTION_MARK = "{}"


class SecondText(Section):
    """A frozen encoder beside that of `text`: what the model reads of it is `model.pooled_text` and `cross_text`."""

    kind: Literal["none", "t5", "umt5", "clip"] = "none"
    path: str | None = Field(None, description="local folder or hub name")
    revision: str | None = Field(None, description="commit of the hub repository")
    max_tokens: int = Field(77, gt=1, description="as text.max_tokens; 77 is all that CLIP takes")


class Text(Section):
    """How a caption becomes features. `bytes` is trained jointly and needs no files."""

    kind: Literal["bytes", "t5", "umt5", "clip", "llama"] = "bytes"
    path: str | None = Field(None, description="local folder or hub name of a pretrained encoder")
    revision: str | None = Field(None, description="commit of the hub repository")
    width: int = Field(256, gt=0, description="feature width E; a pretrained encoder brings its own")
    num_layers: int = Field(2, ge=0)
    num_heads: int = Field(4, gt=0)
    max_tokens: int = Field(32, gt=1, description="L, begin token included; what a template puts in front not counted")
    hash_buckets: int = Field(8192, gt=0, description="rows of the n-gram table of `bytes`, 2 of them reserved")
    template: str = Field(
        "", description="of `llama`: what the caption is put into, at {}; what stands in front is read and cut off"
    )
    hidden_layer: int = Field(
        -1, lt=0, description="of `llama`: which layer's output, from the end; -1 is the last with the final norm"
    )
    second: SecondText = SecondText()

    @property
    def has_second(self) -> bool:
        """Whether captions are read by two encoders."""
        return self.second.kind != "none"

    def faults(self) -> Iterator[str]:
        if self.has_second:
            yield from self._second_faults()
        if self.kind != "bytes":
            if not self.path:
                yield f"text.kind={self.kind} needs text.path (a local folder or hub name)"
            if self.kind == "llama" and self.template:
                yield from self._template_faults()
            return
        if self.width % self.num_heads or self.width % 2:
            legal = " ".join(str(n) for n in range(1, 65) if self.width % n == 0)
            cure = "use an even text.width" if self.width % 2 else f"use one of {legal}"
            yield f"text.width={self.width} must be even and divisible by text.num_heads={self.num_heads}; {cure}"
        if self.hash_buckets <= RESERVED_TEXT_ROWS:
            yield (
                f"text.hash_buckets={self.hash_buckets} leaves no row beside the {RESERVED_TEXT_ROWS} reserved ones; "
                f"use at least {RESERVED_TEXT_ROWS + 1}"
            )

    def _template_faults(self) -> Iterator[str]:
        count = self.template.count(CAPTION_MARK)
        if count != 1:
            yield (
                f"text.template={self.template!r} holds {CAPTION_MARK} {count} times; write it once, where the caption "
                "goes, or leave the template out for the caption alone"
            )
        elif self.template == CAPTION_MARK:
            yield f"text.template={CAPTION_MARK} has no effect: it is the caption alone, as without; leave it out"

    def _second_faults(self) -> Iterator[str]:
        second = self.second
        if not second.path:
            yield f"text.second.kind={second.kind} needs text.second.path (a local folder or hub name)"
        if self.kind == "bytes":
            yield (
                f"text.second.kind={second.kind} stands beside a frozen encoder, and text.kind=bytes is trained; set "
                "text.kind=t5, umt5, clip or llama, or leave text.second out"
            )
        elif second.path and self.path and (self.kind, Path(self.path), self.revision) == (
            second.kind, Path(second.path), second.revision,
        ):  # fmt: skip
            yield f"text.second.path={second.path} is the encoder of text once more; give another, or leave it out"
