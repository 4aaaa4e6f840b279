"""The text encoder."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from vidit.config.section import Section

# Rows of the byte encoder's table that no n-gram is hashed to: padding, begin token.
RESERVED_TEXT_ROWS = 2


class Text(Section):
    """How a caption becomes features. `bytes` is trained jointly and needs no files."""

    kind: Literal["bytes", "t5", "umt5", "clip"] = "bytes"
    path: str | None = Field(None, description="local folder or hub name of a pretrained encoder")
    revision: str | None = Field(None, description="commit of the hub repository")
    width: int = Field(256, gt=0, description="feature width E; a pretrained encoder brings its own")
    num_layers: int = Field(2, ge=0)
    num_heads: int = Field(4, gt=0)
    max_tokens: int = Field(32, gt=1, description="L, begin token included")
    hash_buckets: int = Field(8192, gt=0, description="rows of the n-gram table of `bytes`, 2 of them reserved")

    def faults(self) -> Iterator[str]:
        if self.kind != "bytes":
            if not self.path:
                yield f"text.kind={self.kind} needs text.path (a local folder or hub name)"
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
