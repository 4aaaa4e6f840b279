"""A rank's share of the tokens where every rank has equally many: ceil(S / n), the last ones padded."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor


def share(tokens: int, size: int) -> int:
    """Tokens of each of `size` ranks, padding included."""
    return -(-tokens // size)


def pad_to(x: Tensor, dim: int, length: int) -> Tensor:
    """x with zeros appended in `dim` up to `length`."""
    missing = length - x.shape[dim]
    if not missing:
        return x
    return F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, missing))


def grid_of(args: tuple[Any, ...]) -> Any:
    """The grid of the whole row among the positional arguments of a module: what tells `num_tokens`."""
    for arg in args:
        if isinstance(getattr(arg, "num_tokens", None), int):
            return arg
    raise RuntimeError(
        f"none of {len(args)} positional arguments tells num_tokens, so padding cannot be told from tokens; "
        "pass the grid by position"
    )


def num_tokens(args: tuple[Any, ...]) -> int:
    """Tokens of the whole row, as the grid among the arguments tells."""
    return int(grid_of(args).num_tokens)
