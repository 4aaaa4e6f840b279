"""The DiT on one rank of a pipeline: the same class, with less in it.

A rank's DiT has the blocks of its stages under their own numbers, so every parameter keeps its name. It keeps what all
stages need (`SHARED`: conditioning and text, recomputed by each of them, which is cheaper than sending and
simpler than returning its gradient), but patches and positions only with the first stage and the head only with the
last. Where they are missing their input passes through, so the tokens of the stage before take the latent's place.
In a joint model the text's tokens travel too, in front of the video's, so its embedding is the first stage's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vidit.model.dit import DiT
from vidit.model.joint import Streams
from vidit.model.plan import Plan

SHARED = ("embed.conditioning", "embed.text", "embed.second_text")

M = TypeVar("M", bound=nn.Module)
V = TypeVar("V")


class Passed(nn.Module):
    """Stands for a module that another stage has: the first argument, unchanged."""

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        return x


def keep_stages(dit: DiT, layers: Sequence[range]) -> None:
    """Take out of a whole DiT (best on meta) what is not of these stages of a rank, in place."""
    kept = {str(layer) for own in layers for layer in own}
    _limit(dit, kept, holds_first(layers), holds_last(layers, len(dit.blocks)))


def view_of_stage(dit: DiT, layers: range, num_layers: int) -> DiT:
    """One stage of a rank's DiT: modules, parameters and hooks are the same objects, and fewer of them.

    Made when everything is applied to `dit`. A call of it is a call of `dit` that runs this stage alone.
    """
    view = _copied(dit, DiT)
    view.embed = _copied(dit.embed, type(dit.embed))
    view.blocks = nn.ModuleDict(dict(dit.blocks.items()))
    _limit(view, {str(layer) for layer in layers}, holds_first([layers]), holds_last([layers], num_layers))
    return view


def shared_parameters(dit: DiT) -> list[nn.Parameter]:
    """The parameters that every stage holds, in the same order on each."""
    modules = (dit.embed.conditioning, None if dit.config.is_joint else dit.embed.text, dit.embed.second_text)
    return [p for module in modules if module is not None for p in module.parameters()]


def plan_of_stages(plan: Plan, dit: DiT) -> Plan:
    """The plan without what this rank's stages do not have: patterns that fit no module and no parameter of `dit`."""
    modules = [name for name, _ in dit.named_modules()]
    parameters = [name for name, _ in dit.named_parameters()]
    return replace(
        plan,
        parameters=_fitting(plan.parameters, parameters),
        regions=_fitting(plan.regions, modules),
        split=_fitting(plan.split, modules) if not isinstance(dit.embed.patch, Passed) else _later(plan.split),
        gather=_fitting(plan.gather, modules),
        cores=tuple(_fitting(dict.fromkeys(plan.cores), modules)),
        vectors=tuple(_fitting(dict.fromkeys(plan.vectors), modules)),
        before=tuple(_fitting(dict.fromkeys(plan.before), modules)),
        beside=tuple(_fitting(dict.fromkeys(plan.beside), modules)),
        means=tuple(_fitting(dict.fromkeys(plan.means), modules)),
        placed=_fitting(plan.placed, modules),
    )


def holds_first(layers: Sequence[range]) -> bool:
    """Whether one of these stages is the first."""
    return any(own.start == 0 for own in layers)


def holds_last(layers: Sequence[range], num_layers: int) -> bool:
    """Whether one of these stages is the last."""
    return any(own.stop == num_layers for own in layers)


def entering(dit: DiT, x: Tensor, num_text: int) -> Tensor | Streams:
    """What a stage is given, as its DiT takes it; `num_text` tokens of it are the text's, in a joint model."""
    if not (dit.config.is_joint and isinstance(dit.embed.patch, Passed)):
        return x
    return Streams(x[:, num_text:], x[:, :num_text])


def leaving(out: Tensor | Streams) -> Tensor:
    """What a stage hands on, as one tensor."""
    return out if isinstance(out, Tensor) else torch.cat((out.text_BLD, out.video_BSD), dim=1)


def _limit(dit: DiT, kept: set[str], first: bool, last: bool) -> None:
    for layer in list(dit.blocks):
        if layer not in kept:
            del dit.blocks[layer]
    if not first:
        dit.embed.patch = Passed()
        dit.embed.position = None
        dit.embed.tokens = Passed()  # without the hooks that divide them
        if dit.config.is_joint:
            dit.embed.text = None
    if not last:
        dit.head = Passed()


def _copied(module: nn.Module, kind: type[M]) -> M:
    """A module with the same content, of its plain class: FSDP's subclass goes with the original object."""
    view = object.__new__(kind)
    view.__dict__.update(module.__dict__, _modules=dict(module._modules))
    return view


def _later(split: Mapping[str, V]) -> dict[str, V]:
    """Tokens come divided from the stage before."""
    return {name: value for name, value in split.items() if name != "embed.tokens"}


def _fitting(patterns: Mapping[str, V], names: Sequence[str]) -> dict[str, V]:
    parts = [name.split(".") for name in names]
    return {
        pattern: value for pattern, value in patterns.items() if any(_fits(pattern.split("."), own) for own in parts)
    }


def _fits(pattern: Sequence[str], name: Sequence[str]) -> bool:
    return len(pattern) == len(name) and all(p in ("*", n) for p, n in zip(pattern, name, strict=True))
