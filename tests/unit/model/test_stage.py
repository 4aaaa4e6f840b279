"""A stage is a DiT with less in it: the same names and parameters, and in a row the same function."""

import re

import pytest
import torch

from vidit.config import Model
from vidit.model.context import EVERY_FRAME
from vidit.model.dit import DiT
from vidit.model.init import initialise
from vidit.model.plan import sharding_plan
from vidit.model.stage import SHARED, keep_stages, plan_of_stages, shared_parameters, view_of_stage
from vidit.model.windows import Grid

C = Model(num_layers=4, width=32, num_heads=2, mlp_width=48, windows=((1, 0, 0), (0, 2, 4)), pooled_text=True)
GRID, TEXT, CHANNELS = (3, 4, 6), 10, 3


def build() -> DiT:
    model = DiT(C, CHANNELS, GRID, TEXT)
    initialise(model, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return model


def inputs() -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    x, previous = torch.randn(2, 2, CHANNELS, *GRID, generator=g)
    text = torch.randn(2, 5, TEXT, generator=g)
    return x, [torch.tensor([100.0, 700.0]), text, torch.full((2, 5), EVERY_FRAME), text.mean(1)], previous


@pytest.mark.parametrize(
    "cut", [[range(4)], [range(1), range(1, 4)], [range(1), range(1, 2), range(2, 3), range(3, 4)]]
)
def test_stages_in_a_row_are_the_model(cut: list[range]) -> None:
    whole, (x, rest, previous) = build(), inputs()
    expected = whole(x, Grid(*GRID), *rest, previous)
    tokens = x
    for layers in cut:
        tokens = view_of_stage(whole, layers, 4)(tokens, Grid(*GRID), *rest, previous)
    assert torch.equal(tokens, expected)
    assert torch.equal(whole(x, Grid(*GRID), *rest, previous), expected), "views leave the model as it was"


def test_a_rank_keeps_names_and_what_all_stages_share() -> None:
    names = set(build().state_dict())
    first, middle, last = build(), build(), build()
    keep_stages(first, [range(1), range(2, 3)])
    keep_stages(middle, [range(1, 2)])
    keep_stages(last, [range(3, 4)])
    held = [set(rank.state_dict()) for rank in (first, middle, last)]
    assert set().union(*held) == names
    shared = {name for name in names if name.startswith(SHARED)}
    assert held[0] & held[1] == held[1] & held[2] == shared
    assert held[1] == shared | {name for name in names if name.startswith("blocks.1.")}
    assert {name for name in held[0] if re.match("embed.(patch|position)|blocks.[02]", name)} == held[0] - shared
    assert len(shared_parameters(middle)) == len(shared)


def test_a_view_holds_the_same_objects() -> None:
    whole = build()
    calls: list[int] = []
    whole.embed.register_forward_hook(lambda *_: calls.append(1))
    view = view_of_stage(whole, range(1, 3), 4)
    own = dict(whole.named_parameters())
    assert all(p is own[name] for name, p in view.named_parameters())
    rest = inputs()[1]
    assert view(torch.zeros(2, 72, C.width), Grid(*GRID), *rest).shape == (2, 72, C.width)
    assert calls == [1], "hooks of the whole model act in its stages"


@pytest.mark.parametrize("layers", [[range(1)], [range(1, 2)], [range(3, 4)], [range(1), range(3, 4)]])
def test_the_plan_of_a_rank_fits_it(layers: list[range]) -> None:
    part = build()
    keep_stages(part, layers)
    plan = plan_of_stages(sharding_plan(C), part)
    names = [name for name, _ in part.named_parameters()]

    def fits(pattern: str, name: str) -> bool:
        return re.fullmatch(pattern.replace(".", r"\.").replace("*", r"[^.]+"), name) is not None

    assert all(sum(fits(pattern, name) for pattern in plan.parameters) == 1 for name in names)
    assert all(any(fits(pattern, name) for name in names) for pattern in plan.parameters)
    assert ("embed.tokens" in plan.split) == any(own.start == 0 for own in layers)
    assert bool(plan.gather) == any(own.stop == 4 for own in layers)
