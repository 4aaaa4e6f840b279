"""The driver of a run on Ray: takes nodes, starts the ranks on them, and starts all again after a failure.

    python -m launch.ray_driver --nodes=2 ... -- vidit train CONFIG     (job.sh of a submission has the whole line)

Every start goes on from the last checkpoint, on as many nodes as there are, between --min-nodes and --nodes: a run has
the same losses on any number of ranks. It is given up after --restarts failures in a row without a new checkpoint.
SIGTERM (`ray job stop`, `vidit cancel`) lets the ranks save and leave. What happens is told on standard output and in
the output of the first rank. Needs Ray, in the cluster's version; no torch.
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType

from launch.ending import Ending, ending_of
from launch.marker import fails_again, is_done
from launch.rank import ORPHAN_S, SIGNALS, is_held
from launch.ray_gang import Gang, LostError, form, node_resources
from launch.ray_nodes import config_of, has, node_counts, refusal
from launch.ray_order import Order, parse
from launch.restart import Restarts, newest_step

TRY_S = 5.0  # for nodes that seem to be there
FREE_S = ORPHAN_S + 15.0  # ranks that lost their launcher are gone by then
STOPPED = 128 + signal.SIGTERM


class Driver:
    """Runs an order to its end. Environment: that of its ranks, where the order names variables of it."""

    def __init__(self, order: Order, environment: Mapping[str, str]):
        self.order = order
        self.submission = f"{order.folder.name}/{order.task}.{os.getpid()}-{int(time.time())}"
        self.variables = {name: environment[name] for name in order.exports if name in environment}
        self.variables.setdefault("OMP_NUM_THREADS", str(order.cpus_per_device))
        self.restarts = Restarts(order.restarts, order.run_dir / "checkpoints", "--restarts")
        self.starts = 0
        self.asked = ""

    def run(self) -> int:
        """The exit code: 0 when the run is done, STOPPED after a request to stop."""
        order = self.order
        counts = node_counts(config_of(order.command), order.nodes, order.min_nodes, order.devices)
        self.restarts.begin()
        while True:
            gang = None if self.stopped() else self._gang(counts)
            if gang is None:
                self.say(f"stopped by {self.asked}")
                return STOPPED
            self.starts += 1
            try:
                why = self._train(gang)
            finally:
                gang.close()
            if why is None:
                return 0
            if self.stopped():
                self.say(f"stopped by {self.asked}, newest checkpoint: {self._newest()}")
                return STOPPED
            decision = self.restarts.decide(why, stop_requested=False)
            if not decision.again:
                raise RuntimeError(f"{why.who}{why.message}; {decision.why}")
            self.say(f"{why.who}{why.message}; {decision.why}")

    def stopped(self) -> bool:
        return bool(self.asked)

    def ask(self, number: int, _: FrameType | None) -> None:
        """The handler of signals."""
        self.asked = signal.Signals(number).name

    def _gang(self, counts: Sequence[int]) -> Gang | None:
        """A gang of the largest of `counts` that is to be had; None after a request to stop. RuntimeError after
        `wait_s` without."""
        order, until = self.order, time.monotonic() + self.order.wait_s
        if self._num_large() < counts[0]:
            self.say(f"waiting for nodes: {self._num_large()} of {counts[0]} are there")
        while True:
            for count in counts:
                first = count == counts[0]
                patience = TRY_S if not first else order.settle_s if len(counts) > 1 else order.wait_s
                if not first and self._num_large() < count:
                    continue
                gang = form(order, count, min(patience, max(until - time.monotonic(), 1)), self.stopped)
                if gang or self.stopped():
                    return gang
            if time.monotonic() >= until:
                raise RuntimeError(refusal(counts[-1], order.bundle, node_resources(), order.wait_s))

    def _num_large(self) -> int:
        """How many nodes are large enough, whatever runs there now."""
        return sum(has(node, self.order.bundle) for node in node_resources())

    def _train(self, gang: Gang) -> Ending | None:
        """One start, watched to its end: None when the run is done, else how it ended."""
        order, attempt = self.order, f"{self.submission}.{self.starts}"
        self._wait_for_lock()
        self.say(f"start {self.starts} of {order.run_dir}: {gang.count * order.devices} ranks on "
                 f"{' '.join(gang.addresses)}")  # fmt: skip
        try:
            gang.start({**self.variables, "VIDIT_ATTEMPT": attempt})
        except LostError as error:
            return Ending(None, str(error))
        endings = gang.watch(self.stopped)
        if is_done(order.run_dir, attempt):
            self.say(f"{order.run_dir} is done")
            return None
        return ending_of(endings)._replace(retry=not fails_again(order.run_dir, attempt))

    def _wait_for_lock(self) -> None:
        """Ranks of the start before may still be about to leave, where nobody can reach them."""
        lock, deadline = self.order.run_dir / "lock", time.monotonic() + FREE_S
        while is_held(lock) and not self.stopped():
            if time.monotonic() > deadline:
                holder = lock.read_text().strip() or "another process"
                raise RuntimeError(
                    f"{self.order.run_dir} is still being trained by {holder}, {FREE_S:g} s after it was asked to "
                    "stop; stop it, or give another run_dir"
                )
            time.sleep(0.2)

    def _newest(self) -> str:
        step = newest_step(self.order.run_dir / "checkpoints")
        return "none" if step < 0 else f"step {step}"

    def say(self, text: str) -> None:
        """Tell it to Ray's log of the job, and to the run's own."""
        line = f"ray: {text}\n"
        sys.stdout.write(line)
        sys.stdout.flush()
        with self.order.output.open("a") as file:
            file.write(line)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. 1 after an error, which is the last line of the output."""
    import ray

    driver = Driver(parse(argv), os.environ)
    address = os.environ.get("RAY_ADDRESS") or "auto"  # never a new cluster
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        for number in SIGNALS:  # after init, which takes SIGTERM for itself
            signal.signal(number, driver.ask)
        return driver.run()
    except (ValueError, RuntimeError, OSError) as error:
        driver.say(str(error))
        return 1
    except Exception as error:  # Ray itself, or a fault of ours: whoever looks into the output must see it there too
        driver.say(f"{type(error).__name__}: {error}")
        raise
    finally:
        ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
