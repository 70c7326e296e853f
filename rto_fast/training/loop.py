"""The loop of every stage: steps, live line, checkpoints, and a stop that loses nothing."""

from collections.abc import Callable, Sequence

import torch

from rto_fast.errors import RewardError, TrainingError
from rto_fast.reporting.log import RunLog
from rto_fast.reporting.progress import progress
from rto_fast.training import ranks
from rto_fast.training.checkpoint import Checkpoints, Trainer


def train(
    name: str, trainer: Trainer, log: RunLog, checkpoints: Checkpoints, save_every: int, show: Sequence[str],
    after_step: Callable[[int, dict], object] | None = None, evaluate: Callable[[int], object] | None = None,
) -> None:  # fmt: skip
    """Steps `trainer` to its end, from its last checkpoint if there is one.

    Args:
        save_every: steps between checkpoints; 0: only when the run is stopped. show: metrics on the live line.
        after_step: called with the number of steps done and the step's metrics, before the checkpoint. evaluate: called with
            the number of steps done, after that; where it failed the resumed run begins with it.
    Raises:
        Interrupted: after a signal; the state is saved.
        RewardError: from a step, which must then have changed nothing, or from `evaluate`; the state is saved.
        TrainingError: names the stage; also where memory runs out.
    """
    stop = checkpoints.stop
    stop.waits = True  # until the stage has written its model
    if checkpoints.restore(name, trainer) and evaluate:
        evaluate(trainer.step_count)
    done = trainer.step_count
    with (
        log.stage(name, trainer.steps, done) as line,
        progress(name, trainer.steps, "steps", done=done, has_line=line.live) as phase,
    ):
        while trainer.step_count < trainer.steps:
            stepped = False
            try:
                metrics = line.step(trainer.step(), show=show)
                phase.advance()
                if after_step:
                    after_step(trainer.step_count, metrics)
                stepped = True
                if evaluate:
                    evaluate(trainer.step_count)
            except RewardError:  # somebody else's function or server: no reason to lose what was trained
                checkpoints.save(name, trainer, unfinished=stepped)
                raise
            except TrainingError as error:
                raise TrainingError(f"{name}: {error}") from error
            except torch.OutOfMemoryError as error:
                raise TrainingError(f"{name}: out of memory: {str(error).splitlines()[0]} Lower {name}.micro_batch_tokens "
                                    "or rollout.batch_size, or set model.gradient_checkpointing") from error  # fmt: skip
            if ranks.any_rank(stop.signal is not None):
                checkpoints.save(name, trainer)
                raise stop.interrupted(f"stopped in {name} after step {trainer.step_count}")
            if save_every and trainer.step_count % save_every == 0 and trainer.step_count < trainer.steps:
                checkpoints.save(name, trainer)
    if trainer.skipped:
        log.say(f"{name}: optimizer steps skipped for a gradient that was not finite: {trainer.skipped}")
