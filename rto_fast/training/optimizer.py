"""The optimizer engine: AdamW with float32 master weights, gradient clipping and a warm-up cosine schedule.

A bfloat16 model takes its steps in float32: at a learning rate of 5e-7 an update is far below half a unit in the last place
of a bfloat16 weight and would be lost. Gradients are added up in float32 too, as soon as each one is final.
"""

import math

import torch
from torch import nn

from rto_fast.config import TrainingConfig
from rto_fast.errors import TrainingError

# Optimizer steps in a row with a non-finite gradient, after which nothing good can follow; in a short stage, half of all.
MAX_SKIPPED = 10


def learning_rate_factor(step: int, total_steps: int, warmup_ratio: float, min_lr_ratio: float) -> float:
    """Share of the peak learning rate at `step` (from 0): linear warm-up, then a cosine down to `min_lr_ratio`."""
    warmup = round(warmup_ratio * total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total_steps - warmup)
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


class Optimizer:
    """One model's optimizer.

    Args:
        model: its trainable parameters are optimised. total_steps: length of the schedule. lr: peak learning rate, default
            the stage's.
    """

    COUNTS = ("steps", "skipped", "skipped_in_a_row")

    def __init__(self, model: nn.Module, stage: TrainingConfig, total_steps: int, lr: float | None = None):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.stage, self.total_steps = stage, total_steps
        self.peak_lr = stage.lr if lr is None else lr
        self.steps = self.skipped = self.skipped_in_a_row = 0
        self.max_skipped = min(MAX_SKIPPED, max(1, total_steps // 2))
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.parameters]
        for parameter, master in zip(self.parameters, self.masters):
            if master is not parameter:
                parameter.register_post_accumulate_grad_hook(self._collect(master))
        # Norm weights and biases are vectors; decay would only shrink them.
        groups = [
            {"params": [m for m in self.masters if m.dim() >= 2], "weight_decay": stage.weight_decay},
            {"params": [m for m in self.masters if m.dim() < 2], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=self.peak_lr, betas=stage.adam_betas, eps=1e-8, fused=True
        )

    @staticmethod
    def _collect(master):
        def hook(parameter):
            gradient = parameter.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

        return hook

    def step(self) -> dict[str, float]:
        """Clips, updates and clears the gradients. A non-finite gradient skips the update and is counted.

        Returns:
            {"lr", "grad_norm", "skipped"}, the last 0 or 1.
        Raises:
            TrainingError: too many steps in a row were skipped, see `MAX_SKIPPED`.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.masters, self.stage.max_grad_norm).item()
        factor = learning_rate_factor(
            self.steps, self.total_steps, self.stage.warmup_ratio, self.stage.min_lr_ratio
        )  # fmt: skip
        for group in self.adam.param_groups:
            group["lr"] = self.peak_lr * factor
        if math.isfinite(norm):
            self.skipped_in_a_row = 0
            self.adam.step()
            with torch.no_grad():
                for parameter, master in zip(self.parameters, self.masters):
                    if master is not parameter:
                        parameter.copy_(master)
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row >= self.max_skipped:
                raise TrainingError(f"the gradient was not finite in {self.skipped_in_a_row} steps in a row: lower the "
                                    "learning rate, or look for NaN in the weights it started from")  # fmt: skip
        self.adam.zero_grad(set_to_none=True)
        self.steps += 1
        return {"lr": self.peak_lr * factor, "grad_norm": norm, "skipped": int(not math.isfinite(norm))}

    def state_dict(self) -> dict:
        """Everything but the model: moments, master weights, position in the schedule."""
        masters = [m for p, m in zip(self.parameters, self.masters) if m is not p]
        counts = {name: getattr(self, name) for name in self.COUNTS}
        return {"adam": self.adam.state_dict(), "masters": masters} | counts

    def load_state_dict(self, state: dict) -> None:
        self.adam.load_state_dict(state["adam"])
        with torch.no_grad():
            own = [m for p, m in zip(self.parameters, self.masters) if m is not p]
            for master, saved in zip(own, state["masters"], strict=True):
                master.copy_(saved)
        for name in self.COUNTS:
            setattr(self, name, state[name])
