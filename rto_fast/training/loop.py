"""The training loop of every stage: steps, the live line, checkpoints, and a stop that loses nothing."""

from collections.abc import Callable, Sequence

import torch

from rto_fast.config import Stage
from rto_fast.errors import RewardError, TrainingError, UserError
from rto_fast.system.progress import progress
from rto_fast.training import ranks
from rto_fast.training.accumulate import numbers
from rto_fast.training.checkpoint import Checkpoints, Trainer


def train(
    name: Stage,
    trainer: Trainer,
    checkpoints: Checkpoints,
    show: Sequence[str],
    after_step: Callable[[int, dict], object] | None = None,
    evaluate: Callable[[int], object] | None = None,
) -> None:
    """Steps `trainer` to its end, from its last checkpoint if there is one.

    Args:
        name: of the stage.
        show: the metrics on the live line.
        after_step: is called with the number of steps done and the metrics of the step, before the checkpoint.
        evaluate: is called with the number of steps done, after `after_step`. Where it fails, a resumed run begins with it.
    Raises:
        Interrupted: after a signal; the state is saved.
        RewardError: from a step, which must then have changed nothing, or from `evaluate`; the state is saved.
        TrainingError: names the stage; also where memory runs out.
        BaseException: any other error, with a note that says what is not saved.
    """
    stop, log, save_every = checkpoints.stop, checkpoints.log, checkpoints.interval(name)
    stop.waits = True  # a signal ends the run after the present step, until the stage has written its model
    if checkpoints.restore(name, trainer) and evaluate:
        evaluate(trainer.step_count)
    done = trainer.step_count
    with (
        log.stage(name, trainer.steps, done) as line,
        progress(name, trainer.steps, "steps", done=done, has_line=line.live) as phase,
    ):
        while trainer.step_count < trainer.steps:
            recorded: dict[str, int] | None = None  # the sizes of the logs, once the step is in them
            try:
                metrics = line.step(numbers(trainer.step()), show=show)
                trainer.check()
                phase.advance()
                if after_step:
                    after_step(trainer.step_count, metrics)
                recorded = checkpoints.log_sizes()
                if evaluate:
                    evaluate(trainer.step_count)
            except BaseException as error:
                fault = _stage_error(error, name)
                save_what_is_whole(fault, name, trainer, checkpoints, recorded)
                if fault is error:
                    raise
                raise fault from error
            checkpoints.check_lock(look=False)
            if ranks.any_rank(stop.signal is not None):
                checkpoints.save(name, trainer)
                raise stop.interrupted(f"stopped in {name} after step {trainer.step_count}")
            if save_every and trainer.step_count % save_every == 0 and trainer.step_count < trainer.steps:
                checkpoints.save(name, trainer)
    if trainer.skipped:
        log.say(f"{name}: optimizer steps skipped for a gradient that was not finite: {trainer.skipped}")


def save_what_is_whole(
    error: BaseException, name: str, trainer: Trainer, checkpoints: Checkpoints, recorded: dict[str, int] | None
) -> None:
    """Saves the state after `error` if the last step is complete. Else, or where saving fails too, the error says so.

    Args:
        recorded: the sizes of the logs after the step, if it was complete and recorded when the error came; else None.
    """
    # A reward function or its server fails on all ranks at once, before a step has changed anything. Any other error may
    # come on one rank, and saving takes all of them.
    if not isinstance(error, RewardError) and (recorded is None or ranks.world_size() > 1):
        error.add_note(f"what {name} trained after its last checkpoint is not saved: a step was under way")
        return
    try:
        checkpoints.save(name, trainer, unfinished=recorded)
    except UserError as fault:
        error.add_note(f"what {name} trained after its last checkpoint is not saved: {fault}")


def _stage_error(error: BaseException, name: str) -> BaseException:
    """A `TrainingError` that names the stage where memory ran out or training failed; any other error as it is."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        reason = (str(error).splitlines() or ["of the CPU."])[0]
        return TrainingError(
            f"{name}: out of memory: {reason} Lower model.micro_batch_tokens or rollout.batch_size, or set "
            "model.gradient_checkpointing"
        )
    return TrainingError(f"{name}: {error}") if isinstance(error, TrainingError) else error
