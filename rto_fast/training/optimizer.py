"""The optimizer without DeepSpeed, and what both optimizers share: the schedule, parameter groups, counts of steps.

A bfloat16 model is updated in float32: at a learning rate of 5e-7 an update is far below half a unit in the last place of a
bfloat16 weight and would be lost. Gradients are added up in float32 too. A step does not wait for the device: the norm, the
clipping and whether the step is skipped stay there until somebody reads them.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rto_fast.config import OptimizerConfig, SupervisedConfig, TrainingConfig
from rto_fast.errors import TrainingError
from rto_fast.models.model import Model
from rto_fast.reporting.metric_names import GRAD_NORM, LR, SKIPPED
from rto_fast.training import ranks
from rto_fast.training.gradients import Gradients, Layout

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
        self.steps = 0
        self._skips = torch.zeros(2)  # all that were skipped, and the last ones in a row

    @property
    def skipped(self) -> int:
        """Steps whose gradient was not finite. Reading it waits for the device, as of `skipped_in_a_row`."""
        return int(self._skips[0])

    @property
    def skipped_in_a_row(self) -> int:
        return int(self._skips[1])

    def step(self) -> dict[str, float | Tensor]:
        """Clips the gradients, updates the weights and clears the gradients.

        A non-finite gradient skips the update and is counted; see `check`.

        Returns:
            The metrics `lr`, `grad_norm` and `skipped`, which is 0 or 1; the last two are 0-d tensors.
        """
        lr = self.peak_lr * learning_rate_factor(self.steps, self.total_steps, *self.schedule)
        norm, skipped = self._update(lr)
        self._skips.add_(skipped)[1:].mul_(skipped)
        self.steps += 1
        return {LR: lr, GRAD_NORM: norm, SKIPPED: skipped}

    def check(self) -> None:
        """Checks the steps so far. It waits for the device, so it is called where their metrics are read.

        Raises:
            TrainingError: too many steps in a row were skipped, see `MAX_SKIPPED`.
        """
        if (count := self.skipped_in_a_row) >= min(MAX_SKIPPED, max(1, self.total_steps // 2)):
            raise TrainingError(
                f"the gradient was not finite in {count} steps in a row: lower the "
                "learning rate, or look for NaN in the weights it started from"
            )

    def backward(self, loss: Tensor) -> None:
        """Adds a micro-batch's gradient, of a loss that adds up over micro-batches and ranks."""
        raise NotImplementedError

    def zero_grad(self) -> None:
        raise NotImplementedError

    def _update(self, lr: float) -> tuple[Tensor, Tensor]:
        """Clips the gradients, takes the step if they are finite, clears them; returns their norm and `not_finite` of it."""
        raise NotImplementedError

    def make_gradients(self) -> None:
        """Gives the parameters the places of their gradients, for which layers of ours look in their forward passes."""

    def free_gradients(self) -> None:
        """Gives back the memory of the gradients until the next step begins, where that is possible."""

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
        self.steps = state["steps"]
        self._skips.copy_(torch.tensor([state["skipped"], state["skipped_in_a_row"]]))


def not_finite(norm: Tensor) -> Tensor:
    """1 for infinity and NaN, 0 for a finite number, float32."""
    return (norm * 0.0).nan_to_num(nan=1.0)


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
    """AdamW over a model's trainable parameters, which every rank holds whole.

    Weights of 16 bits have masters in one flat float32 tensor, in the layout of the gradients (see `Gradients`): all
    matrices, then all vectors, each in the order of the model. AdamW is given these two stretches.
    """

    def __init__(
        self, model: Model, stage: TrainingConfig, settings: OptimizerConfig, total_steps: int, lr: float | None = None
    ):
        super().__init__(stage, settings, total_steps, lr)
        self.model = model
        named = sorted(model.trainable(), key=lambda item: item[1].dim() < 2)  # stable
        self.names = [name for name, _ in named]
        self.parameters: list[Tensor] = [p for _, p in named]
        self._skips = self._skips.to(self.parameters[0].device)
        self.layout = Layout(self.parameters)
        self.gradients = Gradients(self.parameters, self.layout)
        self.has_masters = any(p.dtype != torch.float32 for p in self.parameters)
        groups = parameter_groups(self.parameters, settings.weight_decay)
        self.masters: list[Tensor] = self.parameters
        if self.has_masters:
            flat = torch.zeros(sum(self.layout.sizes), device=self.parameters[0].device)
            self.masters = self.layout.views(flat)
            with torch.no_grad():
                torch._foreach_copy_(self.masters, self.parameters)
            for group, stretch in zip(groups, self._stretches(flat)):
                group["params"] = [stretch]
        self.adam = torch.optim.AdamW(groups, lr=self.peak_lr, betas=settings.adam_betas, eps=1e-8, fused=True)
        self.updated: list[Tensor] = [tensor for group in groups for tensor in group["params"]]
        self.moments: dict[str, Tensor] = {}  # flat

    def _stretches(self, flat: Tensor) -> list[Tensor]:
        """The parts of a flat tensor that belong to the matrices and to the vectors."""
        matrices = sum(size for size, shape in zip(self.layout.sizes, self.layout.shapes) if len(shape) >= 2)
        return [part for part in flat.split([matrices, len(flat) - matrices]) if len(part)]

    def _parts(self, flat: Tensor) -> list[Tensor]:
        """The parts of a flat tensor that belong to each of the tensors `updated`."""
        return self._stretches(flat) if self.has_masters else self.layout.views(flat)

    def make_gradients(self) -> None:
        self.gradients.make()

    def backward(self, loss: Tensor) -> None:
        self.gradients.make()
        loss.backward()
        self.gradients.collect()

    def zero_grad(self) -> None:
        self.gradients.clear()

    def free_gradients(self) -> None:
        if self.model.graphs is None or not self.model.graphs.trains:  # CUDA graphs hold the addresses of gradients
            self._free()

    def _free(self) -> None:
        self.gradients.free()
        for tensor in self.updated:
            tensor.grad = None

    def release(self) -> None:
        self._free()
        self.gradients.close()

    def _update(self, lr: float) -> tuple[Tensor, Tensor]:
        flat = self.gradients.make()
        if ranks.world_size() > 1:
            dist.all_reduce(flat)
        norm = torch.linalg.vector_norm(flat)
        skipped = not_finite(norm)
        if not self.moments:
            self._make_moments()
        places = self._parts(flat) if self.has_masters else self.gradients.places.values()
        for tensor, gradient in zip(self.updated, places):
            tensor.grad = gradient
        for group in self.adam.param_groups:
            group["lr"] = lr
        # As a GradScaler does: AdamW's kernel divides by the one and, where the other is 1, changes nothing.
        scale = ((norm + 1e-6) / self.settings.max_grad_norm).clamp_(min=1.0)
        self.adam.__dict__ |= {"grad_scale": scale, "found_inf": skipped}
        self.adam.step()
        self._copy_masters()
        self.zero_grad()
        return norm, skipped

    @torch.no_grad()
    def _copy_masters(self) -> None:
        if self.has_masters:
            torch._foreach_copy_(self.parameters, self.masters)

    def _make_moments(self) -> None:
        """Makes AdamW's state. Its own would be tensors for each weight."""
        device = self.parameters[0].device
        self.moments = {key: torch.zeros(sum(self.layout.sizes), device=device) for key in MOMENTS}
        steps = torch.zeros(len(self.updated), device=device).unbind()
        for tensor, step, *moments in zip(self.updated, steps, *map(self._parts, self.moments.values())):
            self.adam.state[tensor] = {"step": step} | dict(zip(MOMENTS, moments))

    def state_dict(self) -> dict[str, Any]:
        state = self._counts() | {"weights": dict(zip(self.names, self.masters))}
        return state | {key: dict(zip(self.names, self.layout.views(flat))) for key, flat in self.moments.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._load_counts(state)
        for name, master in zip(self.names, self.masters):
            master.copy_(state["weights"][name])
        self._copy_masters()
        self.adam.state.clear()
        self.moments = {}
        if MOMENTS[0] in state:
            self._make_moments()
            for key, flat in self.moments.items():
                for name, moment in zip(self.names, self.layout.views(flat)):
                    moment.copy_(state[key][name])
            for values in self.adam.state.values():
                values["step"].fill_(state["steps"] - state["skipped"])
