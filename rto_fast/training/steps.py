"""How many steps a stage takes."""

from rto_fast.config import SupervisedConfig


def count_steps(examples: float, batch_size: int, max_steps: int | None = None) -> int:
    """Steps that visit `examples`, those of all epochs together, `batch_size` in each; the last one takes what is left.

    Args:
        max_steps: the stage ends there, if it has not ended before.
    """
    steps = int(-(-examples // batch_size))
    return steps if max_steps is None else min(steps, max_steps)


def stage_steps(stage: SupervisedConfig, examples: int) -> int:
    """Optimizer steps of a stage that learns from `examples`."""
    return count_steps(examples * stage.epochs, stage.batch_size, stage.max_steps)
