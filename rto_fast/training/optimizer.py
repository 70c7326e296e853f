"""The optimizer without DeepSpeed: AdamW with float32 master weights and gradient clipping.

A bfloat16 model is updated in float32: at a learning rate of 5e-7 an update is far below half a unit in the last place of a
bfloat16 weight and would be lost. Gradients are added up in float32 too, as soon as each one is final.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rto_fast.config import Config, OptimizerConfig, TrainingConfig
from rto_fast.models.model import Model
from rto_fast.training import ranks
from rto_fast.training.schedule import MOMENTS, ScheduledOptimizer, parameter_groups
from rto_fast.training.zero import ZeroOptimizer


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
            gradients = [m.grad for m in self.masters if m.grad is not None]
            for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
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


def build_optimizer(
    model: Model, stage: TrainingConfig, total_steps: int, config: Config, lr: float | None = None
) -> ScheduledOptimizer:
    """Builds a `ZeroOptimizer` where DeepSpeed is asked for or there is more than one rank, else an `Optimizer`.

    Args:
        stage: the stage's section of the configuration.
        total_steps: the length of the schedule.
        lr: the peak learning rate; default: the stage's.
    """
    if config.deepspeed.stage_for(ranks.world_size()):
        return ZeroOptimizer(model, stage, config.optimizer, total_steps, config.deepspeed, lr)
    return Optimizer(model, stage, config.optimizer, total_steps, lr)
