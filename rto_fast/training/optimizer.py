"""The optimizer engine: AdamW with float32 master weights, gradient clipping and a warm-up cosine schedule.

A bfloat16 model takes its steps in float32: at a learning rate of 5e-7 an update is far below half a unit in the last place
of a bfloat16 weight and would be lost. Gradients are added up in float32 too, as soon as each one is final.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rto_fast.config import DeepSpeedConfig, TrainingConfig
from rto_fast.errors import TrainingError
from rto_fast.training import ranks

MOMENTS = "exp_avg", "exp_avg_sq"
# Optimizer steps in a row with a non-finite gradient, after which nothing good can follow; in a short stage, half of all.
MAX_SKIPPED = 10


def learning_rate_factor(step: int, total_steps: int, warmup_ratio: float, min_lr_ratio: float) -> float:
    """Share of the peak learning rate at `step` (from 0): linear warm-up, then a cosine down to `min_lr_ratio`."""
    warmup = round(warmup_ratio * total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total_steps - warmup)
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def named_trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """[(name, parameter)], a tied parameter once."""
    if not isinstance(model, nn.Module):  # an adapter
        return model.trainable()
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def parameter_groups(parameters: list[Tensor], weight_decay: float) -> list[dict]:
    """AdamW's groups. Norm weights and biases are vectors; decay would only shrink them."""
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class Schedule:
    """What every optimizer has: the learning rate's course, and the count of steps done and skipped.

    Args:
        total_steps: length of the schedule; a resumed stage may set another one.
        lr: peak learning rate, default the stage's.
    """

    def __init__(self, stage: TrainingConfig, total_steps: int, lr: float | None = None):
        self.stage, self.total_steps = stage, total_steps
        self.peak_lr = stage.lr if lr is None else lr
        self.steps = self.skipped = self.skipped_in_a_row = 0

    def step(self) -> dict[str, float]:
        """Clips, updates and clears the gradients. A non-finite gradient skips the update and is counted.

        Returns:
            {"lr", "grad_norm", "skipped"}, the last 0 or 1.
        Raises:
            TrainingError: too many steps in a row were skipped, see `MAX_SKIPPED`.
        """
        lr = self.peak_lr * learning_rate_factor(
            self.steps, self.total_steps, self.stage.warmup_ratio, self.stage.min_lr_ratio
        )
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
        return {"lr": lr, "grad_norm": norm, "skipped": int(skipped)}

    def _update(self, lr: float) -> float:
        """Clips the gradients, takes the step if they are finite, clears them; returns their norm."""
        raise NotImplementedError

    def release(self) -> None:
        """Gives back what would outlive the optimizer; the model is not trained any further."""

    def _counts(self):
        return {name: getattr(self, name) for name in ("steps", "skipped", "skipped_in_a_row")}

    def _load_counts(self, state):
        for name in self._counts():
            setattr(self, name, state[name])


class Optimizer(Schedule):
    """One model's optimizer: its trainable parameters, on every rank whole.

    Args: model, and those of `Schedule`.
    """

    def __init__(self, model: nn.Module, stage: TrainingConfig, total_steps: int, lr: float | None = None):
        super().__init__(stage, total_steps, lr)
        named = named_trainable(model)
        self.names, self.parameters = [name for name, _ in named], [p for _, p in named]
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.parameters]
        for parameter, master in zip(self.parameters, self.masters):
            if master is not parameter:
                parameter.register_post_accumulate_grad_hook(self._collect(master))
        groups = parameter_groups(self.masters, stage.weight_decay)
        self.adam = torch.optim.AdamW(groups, lr=self.peak_lr, betas=stage.adam_betas, eps=1e-8, fused=True)

    @staticmethod
    def _collect(master):
        def hook(parameter):
            gradient = parameter.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

        return hook

    def backward(self, loss: Tensor) -> None:
        """Adds a micro-batch's gradient, of a loss that adds up over micro-batches and ranks."""
        loss.backward()

    def zero_grad(self) -> None:
        self.adam.zero_grad(set_to_none=True)
        for parameter in self.parameters:  # also of a backward that broke off before it was collected
            parameter.grad = None

    def _update(self, lr):
        if ranks.world_size() > 1:
            gradients = [m.grad for m in self.masters if m.grad is not None]
            for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
                work.wait()
        norm = torch.nn.utils.clip_grad_norm_(self.masters, self.stage.max_grad_norm).item()
        for group in self.adam.param_groups:
            group["lr"] = lr
        if math.isfinite(norm):
            self.adam.step()
            self._copy_masters()
        self.zero_grad()
        return norm

    @torch.no_grad()
    def _copy_masters(self):
        for parameter, master in zip(self.parameters, self.masters):
            if master is not parameter:
                parameter.copy_(master)

    # The weights are in it too, in float32: those of the model are these, rounded.

    def state_dict(self) -> dict:
        """All that training changes: float32 weights and moments by parameter name, and the position in the schedule."""
        state = self._counts() | {"weights": dict(zip(self.names, self.masters))}
        for key in MOMENTS if self.adam.state else ():
            state[key] = {name: self.adam.state[m][key] for name, m in zip(self.names, self.masters)}
        return state

    def load_state_dict(self, state: dict) -> None:
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


def zero_stage(deepspeed: DeepSpeedConfig) -> int:
    """The ZeRO stage of this run; 0: no DeepSpeed."""
    return deepspeed.stage_for(ranks.world_size())


def build_optimizer(model, stage, total_steps, deepspeed, lr=None):
    """`Optimizer`, or `ZeroOptimizer` where DeepSpeed is asked for or there is more than one rank.

    Args:
        deepspeed: `DeepSpeedConfig`.
    """
    if not zero_stage(deepspeed):
        return Optimizer(model, stage, total_steps, lr)
    from rto_fast.training.zero import ZeroOptimizer  # imports DeepSpeed

    return ZeroOptimizer(model, stage, total_steps, deepspeed, lr)
