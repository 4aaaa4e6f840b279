"""Packed rows: clips of several shapes side by side in one sequence of tokens (NaViT, 2307.06304, section 2; Sora).

A row (B = 1) holds the tokens of n clips, one clip after the other. Only attention and what is added to tokens or
scales them knows of clips: each attends within itself and to its own text, has its own places, and is modulated by its
own row of the conditioning, of which there are n. So a packed row gives what its clips give one by one, whatever lies
beside them, and nothing is padded.

Its latent is (1, S, P, C): the C channels of the P places of a patch, for each token. Neighbours of one shape, a run,
are worked on as rows of a batch.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vidit.config import Window
from vidit.model.spread import spread
from vidit.model.windows import Grid


class Run(NamedTuple):
    """Neighbours of one shape: where their tokens are, which clips they are, and their grid as rows of a batch."""

    tokens: slice
    clips: slice
    grid: Grid


class FirstToken:
    """Which token of a packed row is the first that this rank holds; read from the device once in a forward.

    Made with the positions of the whole row and carried beside them, so it is asked when they are cut.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def among(self, position_S4: Tensor, grid: Grid) -> int:
        """Its number in the row; 0 for a rank of padding alone, whose positions are zeros."""
        if self.number is None:
            t, h, w, clip = (int(n) for n in position_S4[0].tolist())
            before = sum(frames * height * width for frames, height, width in grid.clips[:clip])
            _, height, width = grid.clips[clip]
            self.number = before + (t * height + h) * width + w
        return self.number


def packed(clips: Sequence[Window]) -> Grid:
    """The grid of clips of these shapes side by side, in tokens."""
    return Grid(1, 1, sum(t * h * w for t, h, w in clips), clips=tuple(clips))


def runs(grid: Grid) -> Iterator[Run]:
    """The clips of a packed row, neighbours of one shape together."""
    token = clip = 0
    for shape, of_shape in groupby(grid.clips):
        num = len(list(of_shape))
        clips = slice(clip, clip + num)
        own = Grid(*shape, image_B=None if grid.image_B is None else grid.image_B[clips])
        yield Run(slice(token, token + num * own.num_tokens), clips, own)
        token, clip = token + num * own.num_tokens, clip + num


def runs_within(grid: Grid, first: int, num: int) -> Iterator[Run]:
    """The same of the `num` tokens from `first` on, by their numbers among these; a clip that is cut is a run.

    Tokens behind the end of the row, its padding, are in none.
    """
    for run in runs(grid):
        size, start = run.grid.num_tokens, run.tokens.start
        begin, end = max(start, first), min(run.tokens.stop, first + num)
        if begin >= end:
            continue
        whole = min(end, start - (start - begin) // size * size)  # where the first whole clip begins, rounded up
        rest = max(whole, start + (end - start) // size * size)
        for a, b in ((begin, whole), (whole, rest), (rest, end)):
            if a < b:
                clips = slice(run.clips.start + (a - start) // size, run.clips.start - (start - b) // size)
                yield Run(slice(a - first, b - first), clips, run.grid)


def tokens_of_runs(x_1S: Tensor, each: Sequence[Run]) -> list[Tensor]:
    """The tokens of neighbouring runs, a clip a row: (1, S, ...) -> (clips, tokens of a clip, ...) of each."""
    parts = _cut(x_1S.flatten(0, 1), [run.tokens for run in each])
    return [x.unflatten(0, (run.clips.stop - run.clips.start, -1)) for x, run in zip(parts, each, strict=True)]


def clips_of_runs(x_n: Tensor, each: Sequence[Run]) -> list[Tensor]:
    """What clips have, (n, ...), of neighbouring runs."""
    return _cut(x_n, [run.clips for run in each])


def _cut(x: Tensor, each: list[slice]) -> list[Tensor]:
    """By one split: the gradients of single slices would each be laid into zeros of the size of the whole."""
    first, last = each[0].start, each[-1].stop
    here = x if (first, last) == (0, len(x)) else x[first:last]
    return list(here.split([part.stop - part.start for part in each]))


def tokens_of(x_BCTHW: Tensor, patch: Window) -> Tensor:
    """The numbers of each patch side by side: (B, S, P, C)."""
    b, c, t, h, w = x_BCTHW.shape
    pt, ph, pw = patch
    x = x_BCTHW.reshape(b, c, t // pt, pt, h // ph, ph, w // pw, pw).permute(0, 2, 4, 6, 3, 5, 7, 1)
    return x.flatten(4, 6).flatten(1, 3)


def clip_by_clip(core: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, grid: Grid, text: Any = None) -> Any:
    """What a core gives for each run of a packed row, side by side; of its text each clip is given its own row.

    A core that answers to the text as well gives a pair: its video's output, and its text's, a clip a row.
    """
    each = list(runs(grid))
    rows = zip(*(tokens_of_runs(x, each) for x in (q, k, v)), strict=True)
    texts: list[Any] = [None] * len(each)
    if text is not None:
        parts = [[None] * len(each) if x is None else clips_of_runs(x, each) for x in text]
        texts = [type(text)(*own) for own in zip(*parts, strict=True)]
    found = [core(*own, run.grid, None, said) for own, run, said in zip(rows, each, texts, strict=True)]
    if isinstance(found[0], Tensor):
        return side_by_side(found)
    videos, said = zip(*found, strict=True)
    return side_by_side(videos), torch.cat(said)


def side_by_side(found: Sequence[Tensor]) -> Tensor:
    """Rows of runs as one packed row: (clips, tokens of a clip, ...) each -> (1, S, ...)."""
    return torch.cat([x.flatten(0, 1) for x in found])[None]


def numbers(values: Iterable[int], device: torch.device) -> Tensor:
    """As a tensor on the device, for which the host does not wait: blocks ask for these again and again."""
    return torch.tensor(list(values), dtype=torch.int64).to(device, non_blocking=True)


def starts(grid: Grid, device: torch.device) -> Tensor:
    """Which token of the row is the first of each clip, and last how many there are: (n + 1,), int32."""
    return numbers(accumulate((t * h * w for t, h, w in grid.clips), initial=0), device).int()


def clip_of(position_S4: Tensor) -> Tensor:
    """The number of the clip of each token of this rank, (S,): what packed positions have behind a place."""
    return position_S4[:, 3]


def frame_of(position_S4: Tensor, grid: Grid) -> Tensor:
    """The number of each token's latent frame among those of all clips of the row, (S,)."""
    first = numbers(accumulate((t for t, _, _ in grid.clips[:-1]), initial=0), position_S4.device)
    return first[clip_of(position_S4)] + position_S4[:, 0]


def is_image(position_S4: Tensor, grid: Grid) -> Tensor:
    """Whether each token is of a clip of one latent frame, (S,)."""
    return numbers((t == 1 for t, _, _ in grid.clips), position_S4.device).bool()[clip_of(position_S4)]


def of_clips(vectors: tuple[Tensor, ...], position_S4: Tensor) -> tuple[Tensor, ...]:
    """Vectors of clips, each (n, 1, D) -> those of the tokens of this rank, each (1, S, D)."""
    clip_S = clip_of(position_S4)
    return tuple(spread(v.flatten(0, 1), clip_S)[None] for v in vectors)


def per_frame(x_n: Tensor, grid: Grid) -> Tensor:
    """Numbers of clips (n, ...) repeated for each of their latent frames, (F, ...) over the row."""
    return _repeated(x_n, [t for t, _, _ in grid.clips])


def per_token(x: Tensor, grid: Grid) -> Tensor:
    """Numbers of clips (n, ...) or of latent frames (F, ...) of a packed row repeated for each token, (S, ...)."""
    sizes = [t * h * w for t, h, w in grid.clips]
    if len(x) != len(grid.clips):
        sizes = [h * w for t, h, w in grid.clips for _ in range(t)]
    return _repeated(x, sizes)


def _repeated(x: Tensor, times: list[int]) -> Tensor:
    return x.repeat_interleave(numbers(times, x.device), 0, output_size=sum(times))


def clip_means(x_S: Tensor, grid: Grid, counted_S: Tensor | None = None) -> Tensor:
    """The mean over the tokens of each clip, of those that count: (S,) -> (n,)."""
    sizes, means = [t * h * w for t, h, w in grid.clips], []
    weights = [None] * len(sizes) if counted_S is None else counted_S.to(x_S.dtype).split(sizes)
    for own, weight in zip(x_S.split(sizes), weights, strict=True):
        means.append(own.mean() if weight is None else (own * weight).sum() / weight.sum())
    return torch.stack(means)
