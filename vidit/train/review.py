"""What a run looks at between steps: the validation loss, and videos of `sample.prompts`.

A review changes nothing that is trained. One that was cut short, by a signal or a crash, leaves no record, and
the next start makes up for it before its first step, so that what is recorded does not depend on the stops.
"""

from parallel.exchange import from_first
from vidit.data.encode import encode_mp4
from vidit.data.loader import Batch
from vidit.sample.draw import draw
from vidit.train.metrics import Reporter, read_metrics
from vidit.train.state import TrainState
from vidit.train.step import DitStep
from vidit.train.stop import StopRequest
from vidit.train.task import Task
from vidit.train.validation import validate
from vidit.whole_file import write_whole


class Review:
    """Calling it with a step does what is due there and was not done yet. StoppedError when a signal comes."""

    def __init__(
        self,
        task: Task,
        state: TrainState,
        validation: list[Batch],
        num_batches: int,
        reporter: Reporter,
        stop: StopRequest,
    ):
        self.config, self.task, self.state = task.config, task, state
        self.validation, self.num_batches = validation, num_batches
        self.reporter, self.stop = reporter, stop
        self._validated = set(from_first(self._validated_before))

    def _validated_before(self) -> list[int]:
        return [row["step"] for row in read_metrics(self.config.directory) if "validation" in row]

    def __call__(self, step: int) -> None:
        c = self.config.train
        last = step == c.steps
        if self.validation and step not in self._validated and (last or step % c.validate_every == 0):
            self._validate(step)
        if last or (c.sample_every and step % c.sample_every == 0):
            self._preview(step)

    def _validate(self, step: int) -> None:
        with self.state.ema.applied(self.state.model):
            values = validate(
                self.task.passes.evaluated, self.task.step, self.validation, self.config.train.num_time_bands,
                self.stop.check, self.num_batches, self.task.rows,
            )  # fmt: skip

        def report() -> None:
            self.reporter.scalars(step, {f"validation/{name}": value for name, value in values.items()})
            self.reporter.record({"step": step, "validation": values})
            self.reporter.say(f"step {step} validation loss {values['loss']:.4f}")

        from_first(report)
        self._validated.add(step)

    def _preview(self, step: int) -> None:
        """Sample with the averaged weights into samples/ and TensorBoard."""
        prompts, task = self.config.sample.prompts, self.task
        folder = self.config.directory / "samples" / f"step-{step:08d}"
        paths = [folder / f"{number:03d}.mp4" for number in range(len(prompts))]
        if task.text is None or not isinstance(task.step, DitStep):
            return
        if from_first(lambda: all(path.is_file() for path in paths)):
            return
        model = self.state.model
        # Sampling knows nothing of signals: every call of the network is a place where it may be left.
        evaluated = self.task.passes.evaluated
        hook = evaluated[self.task.config.train.task].register_forward_pre_hook(lambda *_: self.stop.check())
        try:
            with self.state.ema.applied(model):
                videos = draw(self.config, task.step, evaluated, task.text, prompts, self.config.train.seed)
        finally:
            hook.remove()
        fps = self.config.data.shown_fps

        def write() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            for number, (path, video) in enumerate(zip(paths, videos, strict=True)):
                self.reporter.video(step, f"sample/{number}", video, fps)
                write_whole(path, encode_mp4(video.numpy(), fps))

        from_first(write)
