"""What both optimizers share: the learning rate's schedule, parameter groups, and the count of steps done and skipped."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rto_fast.config import OptimizerConfig, TrainingConfig
from rto_fast.errors import TrainingError
from rto_fast.reporting.metric_names import GRAD_NORM, LR, SKIPPED

MOMENTS = "exp_avg", "exp_avg_sq"
# Optimizer steps in a row with a non-finite gradient after which the stage ends; in a short stage it is half of all steps.
MAX_SKIPPED = 10


def learning_rate_factor(step: int, total_steps: int, warmup_ratio: float, min_lr_ratio: float) -> float:
    """The share of the peak learning rate at `step` (from 0): linear warm-up, then a cosine down to `min_lr_ratio`."""
    warmup = round(warmup_ratio * total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total_steps - warmup)
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def parameter_groups(parameters: list[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups. Norm weights and biases are vectors; decay would only shrink them."""
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class ScheduledOptimizer:
    """One model's optimizer with its learning-rate schedule; see `Optimizer` and `ZeroOptimizer`.

    Args:
        stage: the stage's section of the configuration.
        settings: the section `optimizer`.
        total_steps: the length of the schedule; a resumed stage may set another one.
        lr: the peak learning rate; default: the stage's.
    """

    def __init__(self, stage: TrainingConfig, settings: OptimizerConfig, total_steps: int, lr: float | None = None):
        self.settings, self.total_steps = settings, total_steps
        self.peak_lr, self.schedule = stage.lr if lr is None else lr, settings.schedule(stage.stage)
        self.steps = self.skipped = self.skipped_in_a_row = 0

    def step(self) -> dict[str, float]:
        """Clips the gradients, updates the weights and clears the gradients.

        A non-finite gradient skips the update and is counted.

        Returns:
            The metrics `lr`, `grad_norm` and `skipped`, which is 0 or 1.
        Raises:
            TrainingError: too many steps in a row were skipped, see `MAX_SKIPPED`.
        """
        lr = self.peak_lr * learning_rate_factor(self.steps, self.total_steps, *self.schedule)
        norm = self._update(lr)
        skipped = not math.isfinite(norm)
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.skipped_in_a_row >= min(MAX_SKIPPED, max(1, self.total_steps // 2)):
            raise TrainingError(
                f"the gradient was not finite in {self.skipped_in_a_row} steps in a row: lower the "
                "learning rate, or look for NaN in the weights it started from"
            )
        self.steps += 1
        return {LR: lr, GRAD_NORM: norm, SKIPPED: int(skipped)}

    def backward(self, loss: Tensor) -> None:
        """Adds a micro-batch's gradient, of a loss that adds up over micro-batches and ranks."""
        raise NotImplementedError

    def zero_grad(self) -> None:
        raise NotImplementedError

    def _update(self, lr: float) -> float:
        """Clips the gradients, takes the step if they are finite, clears them; returns their norm."""
        raise NotImplementedError

    def release(self) -> None:
        """Gives back what would outlive the optimizer; the model is not trained any further."""

    def state_dict(self) -> dict[str, Any]:
        """Returns all that training changes: float32 weights and moments by parameter name, and the counts of steps."""
        raise NotImplementedError

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def _counts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("steps", "skipped", "skipped_in_a_row")}

    def _load_counts(self, state: Mapping[str, Any]) -> None:
        for name in self._counts():
            setattr(self, name, state[name])
