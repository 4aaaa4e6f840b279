"""Which parameters a run trains: all, those of `train.trainable`, or all but those of `train.frozen`.

A pattern is of whole names, such as `unet.*.temporal_*`; `*` stands for any text. One that fits no parameter is an
error: a layer that was to be frozen would be trained without a word. What is frozen has no gradient, no moments and no
average, in any layout; checkpoints and exports hold it as it is.
"""

from fnmatch import fnmatchcase

from torch import nn

from vidit.config import Train


def freeze(module: nn.Module, c: Train) -> None:
    """Let no gradient reach what `c` does not train. ValueError where a pattern fits nothing, or nothing is left."""
    patterns = c.trainable or c.frozen
    if not patterns:
        return
    option = "trainable" if c.trainable else "frozen"
    named = dict(module.named_parameters())
    chosen = {pattern: {name for name in named if fnmatchcase(name, pattern)} for pattern in patterns}
    if idle := [pattern for pattern, fitting in chosen.items() if not fitting]:
        raise ValueError(
            f"train.{option}: {', '.join(idle)} fits none of {len(named)} parameters; they are called as "
            f"{next(iter(named))}, and * stands for any text: correct the pattern"
        )
    fitting = set().union(*chosen.values())
    trained = fitting if c.trainable else named.keys() - fitting
    if not trained:
        raise ValueError(f"train.frozen={list(c.frozen)} leaves none of {len(named)} parameters to train; freeze fewer")
    for name, parameter in named.items():
        parameter.requires_grad_(parameter.requires_grad and name in trained)
