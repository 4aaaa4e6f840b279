"""Which blocks a pipeline stage holds, which rank holds a stage, and whether a schedule fits: arithmetic, no torch.

A stage is a run of neighbouring blocks; the slowest stage sets the pace, so the cut makes the largest one as small as
can be. Ranks hold stages in a loop (rank r: r, r + p, r + 2p, ...; Megatron-LM, 2104.04473, section 2.2) or in a V
(rank r: r and 2p - 1 - r; Zero Bubble, 2401.10241, section 6), where the last stage is on the rank of the first.

| schedule    | stages a rank | micro-batches M, p ranks             | paper                                    |
|-------------|---------------|--------------------------------------|------------------------------------------|
| gpipe       | 1             | any                                  | GPipe (1811.06965)                       |
| 1f1b        | 1             | M >= p                               | PipeDream-flush (2006.09503)             |
| interleaved | 2 or more     | M is a multiple of max(1, M // p)    | Megatron-LM (2104.04473)                 |
| zero_bubble | 1: ZB-1P      | as interleaved                       | Zero Bubble (2401.10241), section 3      |
| zero_bubble | 2: ZB-V       | any                                  | the same, section 6                      |
"""

from collections.abc import Iterator, Sequence
from typing import Literal

from parallel.layout import words

Schedule = Literal["gpipe", "1f1b", "interleaved", "zero_bubble"]
NEAR = 6  # legal numbers of micro-batches that a message offers


def cut(costs: Sequence[float], num_stages: int, first: float = 0, last: float = 0) -> list[range]:
    """The blocks of each stage, in order: the largest stage as small as possible, and every stage at least one block.

    Exact, by dynamic programming over the number of stages; among equal cuts a more even one.

    Args:
        costs: of each block, in any unit.
        first, last: what the first and the last stage do besides (embedding, head), in the same unit.

    Raises ValueError where there are more stages than blocks.
    """
    n = len(costs)
    if not 1 <= num_stages <= n:
        raise ValueError(f"{n} blocks cannot be cut into {num_stages} stages of at least 1; use 1 to {n}")
    total = [first]
    for cost in costs:
        total.append(total[-1] + cost)
    total[0], total[n] = 0.0, total[n] + last
    best: list[dict[int, tuple[float, float, int]]] = [{0: (0.0, 0.0, 0)}]
    for stage in range(1, num_stages + 1):
        row = {}
        for end in range(stage, n - (num_stages - stage) + 1):
            options = []
            for start, (most, squares, _) in best[-1].items():
                if start < end:
                    own = total[end] - total[start]
                    options.append((max(most, own), squares + own * own, start))
            row[end] = min(options)
        best.append(row)
    stages: list[range] = []
    end = n
    for row in reversed(best[1:]):
        stages.insert(0, range(row[end][2], end))
        end = row[end][2]
    return stages


def is_v(schedule: Schedule, stages_per_rank: int) -> bool:
    """Whether the ranks hold their stages in a V."""
    return schedule == "zero_bubble" and stages_per_rank == 2


def rank_of_stage(schedule: Schedule, pipeline: int, stages_per_rank: int) -> list[int]:
    """Pipeline rank of each stage."""
    if is_v(schedule, stages_per_rank):
        return [*range(pipeline), *reversed(range(pipeline))]
    return list(range(pipeline)) * stages_per_rank


def stage_faults(num_blocks: int, schedule: Schedule, pipeline: int, stages_per_rank: int) -> Iterator[str]:
    """What keeps blocks from being divided into the stages that a layout asks for."""
    if pipeline == 1:
        if stages_per_rank != 1:
            yield f"parallel.stages_per_rank={stages_per_rank} has no effect with parallel.pipeline=1; set it to 1"
        return
    if schedule in ("gpipe", "1f1b") and stages_per_rank != 1:
        yield (
            f"parallel.stages_per_rank={stages_per_rank} has no place in parallel.schedule={schedule}, which holds 1 "
            "stage on a rank; set it to 1, or use parallel.schedule=interleaved"
        )
    elif schedule == "interleaved" and stages_per_rank < 2:
        yield (
            f"parallel.schedule=interleaved with parallel.stages_per_rank={stages_per_rank} interleaves nothing; "
            "use 2 or more, or parallel.schedule=1f1b"
        )
    elif schedule == "zero_bubble" and stages_per_rank not in (1, 2):
        yield (
            f"parallel.schedule=zero_bubble takes 1 stage on a rank (ZB-1P) or 2 (ZB-V), not "
            f"parallel.stages_per_rank={stages_per_rank}; use 1 or 2"
        )
    stages = pipeline * stages_per_rank
    if stages > num_blocks:
        most = max(1, num_blocks // stages_per_rank)
        yield (
            f"parallel.pipeline={pipeline} x parallel.stages_per_rank={stages_per_rank} = {stages} stages, but the "
            f"model has {num_blocks} blocks and a stage holds at least 1; use parallel.pipeline of at most {most}"
        )


def micro_batch_faults(
    schedule: Schedule, pipeline: int, stages_per_rank: int, micro_batches: int, rows: int
) -> Iterator[str]:
    """What a schedule asks of the micro-batches of a step, each of `rows` rows over all data ranks."""
    if _fits(schedule, pipeline, stages_per_rank, micro_batches):
        return
    every = range(1, 4 * micro_batches + 4 * pipeline)
    legal = [n for n in every if _fits(schedule, pipeline, stages_per_rank, n)]
    near = sorted(sorted(legal, key=lambda n: abs(n - micro_batches))[:NEAR])
    rule = (
        f"at least {pipeline}, one for each stage"
        if schedule == "1f1b"
        else f"a multiple of max(1, M // {pipeline}) = {max(1, micro_batches // pipeline)} of them"
    )
    yield (
        f"parallel.schedule={schedule} with parallel.pipeline={pipeline} gets {micro_batches} micro-batches a step "
        f"and needs {rule}; use one of {words(near)}, that is train.global_batch of one of "
        f"{words([n * rows for n in near])}, or change train.micro_batch"
    )


def _fits(schedule: Schedule, pipeline: int, stages_per_rank: int, micro_batches: int) -> bool:
    if pipeline == 1 or schedule == "gpipe" or is_v(schedule, stages_per_rank):
        return True
    if schedule == "1f1b":
        return micro_batches >= pipeline
    return micro_batches % max(1, micro_batches // pipeline) == 0
