"""The optimizer without DeepSpeed, and what both optimizers share: the schedule, parameter groups, counts of steps.

A bfloat16 model is updated in float32: at a learning rate of 5e-7 an update is far below half a unit in the last place of a
bfloat16 weight and would be lost. Gradients are added up in float32 too, as soon as each one is final.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rto_fast.config import OptimizerConfig, SupervisedConfig, TrainingConfig
from rto_fast.errors import TrainingError
from rto_fast.models.model import Model
from rto_fast.reporting.metric_names import GRAD_NORM, LR, SKIPPED
from rto_fast.training import ranks

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


class Optimizer(ScheduledOptimizer):
    """AdamW over a model's trainable parameters, which every rank holds whole."""

    def __init__(
        self, model: Model, stage: TrainingConfig, settings: OptimizerConfig, total_steps: int, lr: float | None = None
    ):
        super().__init__(stage, settings, total_steps, lr)
        named = model.trainable()
        self.names, self.parameters = [name for name, _ in named], [p for _, p in named]
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.parameters]
        for parameter, master in zip(self.parameters, self.masters):
            if master is not parameter:
                parameter.register_post_accumulate_grad_hook(self._collect(master))
        groups = parameter_groups(self.masters, settings.weight_decay)
        self.adam = torch.optim.AdamW(groups, lr=self.peak_lr, betas=settings.adam_betas, eps=1e-8, fused=True)

    @staticmethod
    def _collect(master: Tensor) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None  # the hook runs after it is accumulated
            gradient = parameter.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

        return hook

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def zero_grad(self) -> None:
        self.adam.zero_grad(set_to_none=True)
        for parameter in self.parameters:  # a backward pass that broke off may have left some
            parameter.grad = None

    def _update(self, lr: float) -> float:
        if ranks.world_size() > 1:
            for work in [dist.all_reduce(m.grad, async_op=True) for m in self.masters if m.grad is not None]:
                work.wait()
        norm = torch.nn.utils.clip_grad_norm_(self.masters, self.settings.max_grad_norm).item()
        for group in self.adam.param_groups:
            group["lr"] = lr
        if math.isfinite(norm):
            self.adam.step()
            self._copy_masters()
        self.zero_grad()
        return norm

    @torch.no_grad()
    def _copy_masters(self) -> None:
        for parameter, master in zip(self.parameters, self.masters):
            if master is not parameter:
                parameter.copy_(master)

    def state_dict(self) -> dict[str, Any]:
        state = self._counts() | {"weights": dict(zip(self.names, self.masters))}
        for key in MOMENTS if self.adam.state else ():
            state[key] = {name: self.adam.state[m][key] for name, m in zip(self.names, self.masters)}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._load_counts(state)
        with torch.no_grad():
            for name, master in zip(self.names, self.masters):
                master.copy_(state["weights"][name])
        self._copy_masters()
        step = torch.tensor(float(self.steps - self.skipped))
        self.adam.state.clear()
        if MOMENTS[0] in state:
            for name, master in zip(self.names, self.masters):
                moments = {key: state[key][name].to(master.device, copy=True) for key in MOMENTS}
                self.adam.state[master] = {"step": step.to(master.device, copy=True)} | moments
