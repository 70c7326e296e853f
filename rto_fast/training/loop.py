"""The loop of every stage: steps, live line, checkpoints, and a stop that loses nothing."""

import signal
import threading

from rto_fast.errors import Interrupted


class StopRequest:
    """Ctrl-C (or SIGTERM, a scheduler's) ends the run after the present step; a second Ctrl-C ends it at once."""

    def __init__(self):
        self.signal = None

    def __enter__(self):
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # others cannot take signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number, frame):
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def train(name, trainer, log, checkpoints, save_every, show, after_step=None):
    """Steps `trainer` to its end, from its last checkpoint if there is one.

    Args:
        trainer: has `step_count`, `steps`, `step()`, `state_dict()` and `load_state_dict()`.
        save_every: steps between checkpoints; 0: only when the run is stopped. show: metrics on the live line.
        after_step: called with the number of steps done, before the checkpoint.
    Raises:
        Interrupted: after a signal; the state is saved.
    """
    checkpoints.restore(name, trainer)
    with StopRequest() as stop, log.stage(name, trainer.steps, trainer.step_count) as progress:
        while trainer.step_count < trainer.steps:
            progress.step(trainer.step(), show=show)
            if after_step:
                after_step(trainer.step_count)
            if stop.signal is not None:
                checkpoints.save(name, trainer)
                raise Interrupted(name, trainer.step_count, checkpoints.folder, stop.signal)
            if save_every and trainer.step_count % save_every == 0 and trainer.step_count < trainer.steps:
                checkpoints.save(name, trainer)
