"""Clips that could not be used: counted, named, and too many when they pass `data.max_skipped`."""

from collections.abc import Sequence

from vidit.train.metrics import Reporter


class SkipLimitError(RuntimeError):
    """More clips failed than `data.max_skipped` allows; raised on every rank."""

    shared = True
    retry = False


class SkipCount:
    """Counts the clips that could not be used, and stops the run beyond the limit.

    Goes on from `before`, (seen, skipped), as a checkpoint has it: a start gives a run no new share to lose.
    """

    def __init__(self, limit: float, reporter: Reporter, before: tuple[int, int] = (0, 0)):
        self.limit, self.reporter = limit, reporter
        self.seen, self.skipped = before

    def add(self, num_used: int, skipped: Sequence[tuple[str, str]]) -> None:
        """Count good clips and the (key, reason) of others; SkipLimitError when too many have failed.

        A limit above 0 forgives one clip in any case, so that the first batches are not judged by a fraction.
        """
        self.seen += num_used + len(skipped)
        self.skipped += len(skipped)
        for key, reason in skipped:
            self.reporter.say(f"skipped clip {key}: {reason}")
        if self.skipped > (max(1.0, self.limit * self.seen) if self.limit else 0):
            key, reason = skipped[-1]
            raise SkipLimitError(
                f"{self.skipped} of {self.seen} clips could not be used, more than data.max_skipped="
                f"{self.limit:g} allows; the last: {key}: {reason}. Pack the dataset again, or raise data.max_skipped"
            )
