"""The loop of every stage: steps, live line, checkpoints, and a stop that loses nothing."""

import signal
import threading
import time
from collections.abc import Callable, Sequence

import torch

from rto_fast.errors import Interrupted, RewardError, TrainingError
from rto_fast.reporting.log import RunLog
from rto_fast.training import ranks
from rto_fast.training.checkpoint import Checkpoints, Trainer


class StopRequest:
    """Ctrl-C (or SIGTERM, a scheduler's) ends the run after the present step; a second Ctrl-C ends it at once."""

    def __init__(self):
        self.signal, self.since = None, 0.0

    def __enter__(self):
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # others cannot take signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number, frame):
        if self.signal is None:
            self.signal, self.since = number, time.monotonic()
        elif (
            number == signal.SIGINT and time.monotonic() - self.since > 2.0
        ):  # sooner: the launcher's echo of the first
            raise KeyboardInterrupt

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def train(
    name: str, trainer: Trainer, log: RunLog, checkpoints: Checkpoints, save_every: int, show: Sequence[str],
    after_step: Callable[[int, dict], object] | None = None,
) -> None:  # fmt: skip
    """Steps `trainer` to its end, from its last checkpoint if there is one.

    Args:
        save_every: steps between checkpoints; 0: only when the run is stopped. show: metrics on the live line.
        after_step: called with the number of steps done and the step's metrics, before the checkpoint.
    Raises:
        Interrupted: after a signal; the state is saved.
        RewardError: from a step, which must then have changed nothing, or from `after_step`; the state is saved.
        TrainingError: names the stage; also where memory runs out.
    """
    checkpoints.restore(name, trainer)
    with StopRequest() as stop, log.stage(name, trainer.steps, trainer.step_count) as progress:
        while trainer.step_count < trainer.steps:
            try:
                metrics = progress.step(trainer.step(), show=show)
                if after_step:
                    after_step(trainer.step_count, metrics)
            except RewardError:  # somebody else's function or server: no reason to lose what was trained
                checkpoints.save(name, trainer)
                raise
            except TrainingError as error:
                raise TrainingError(f"{name}: {error}") from error
            except torch.OutOfMemoryError as error:
                raise TrainingError(f"{name}: out of memory: {str(error).splitlines()[0]} Lower {name}.micro_batch_tokens "
                                    "or rollout.batch_size, or set model.gradient_checkpointing") from error  # fmt: skip
            if ranks.any_rank(stop.signal is not None):
                checkpoints.save(name, trainer)
                raise Interrupted(name, trainer.step_count, checkpoints.folder, stop.signal or signal.SIGTERM)
            if save_every and trainer.step_count % save_every == 0 and trainer.step_count < trainer.steps:
                checkpoints.save(name, trainer)
    if trainer.skipped:
        log.say(f"{name}: optimizer steps skipped for a gradient that was not finite: {trainer.skipped}")
