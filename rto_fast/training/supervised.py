"""The optimizer step that SFT, the reward model and DPO share: draw items, accumulate their gradients, update."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from rto_fast.config import Config, SupervisedConfig
from rto_fast.models.model import Model
from rto_fast.reporting.metric_names import IMBALANCE, LOSS, TOKENS
from rto_fast.training import ranks
from rto_fast.training.accumulate import Accumulator
from rto_fast.training.optimizer import ScheduledOptimizer, count_steps, stage_steps
from rto_fast.training.order import ShuffledIndices
from rto_fast.training.zero import build_optimizer


class SupervisedTrainer:
    """Trains a model on a fixed list of items. Each epoch visits all of them, so the last step may have fewer items.

    Args:
        lengths: the tokens of each item.
        loss: is called with the numbers of the items in a micro-batch and in its whole optimizer step; returns the loss and
            metrics of the micro-batch, which add up to those of the step.
        say: see `Accumulator`.
        fingerprint: of the items, see `ShuffledIndices`.
    """

    def __init__(
        self,
        model: Model,
        stage: SupervisedConfig,
        lengths: Sequence[int],
        loss: Callable[[list[int], list[int]], tuple[Tensor, dict[str, Tensor]]],
        config: Config,
        say: Callable[[str], object],
        fingerprint: str = "",
    ):
        self.model, self.stage, self.lengths, self.loss = model, stage, lengths, loss
        self.steps = stage_steps(stage, len(lengths))
        self.optimizer = build_optimizer(model, stage, self.steps, config)
        self.order = ShuffledIndices(len(lengths), config.seed, stage.epochs, fingerprint)
        self.accumulator = Accumulator(config.model.micro_batch_tokens, say)

    @property
    def step_count(self) -> int:
        """The number of steps done."""
        return self.optimizer.steps

    @property
    def skipped(self) -> int:
        """The number of steps whose gradient was not finite."""
        return self.optimizer.skipped

    def step(self) -> dict[str, Any]:
        """Takes one optimizer step and returns its metrics."""
        items = self.order.take(self.stage.batch_size)
        step = self.accumulator.step(items, self.lengths, [self.optimizer])
        for rows, factor in step:
            with step:
                step.add(self._pass(rows, items, factor))
        lengths = [self.lengths[i] for i in items]
        balance = {IMBALANCE: ranks.imbalance(lengths)} if ranks.world_size() > 1 else {}
        return step.metrics() | {TOKENS: sum(lengths)} | balance | self.optimizer.step()

    def _pass(self, rows: list[int], items: list[int], factor: float) -> dict[str, Tensor]:
        loss, metrics = self.loss(rows, items)
        self.optimizer.backward(loss * factor)
        return {LOSS: loss.detach()} | metrics

    def release(self) -> None:
        """Gives back what the stage holds beside the model's weights."""
        self.optimizer.release()

    def _parts(self) -> dict[str, ScheduledOptimizer | ShuffledIndices | Accumulator]:
        return {"optimizer": self.optimizer, "order": self.order, "accumulator": self.accumulator}

    def state_dict(self) -> dict[str, Any]:
        """Returns all that a restored trainer needs to go on exactly as this one would have."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state. Data, batch size and epochs may differ from the state's: the stage ends when what is left is
        visited."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        left = count_steps(self.order.remaining, self.stage.batch_size)
        if self.stage.max_steps is not None:
            left = min(left, max(0, self.stage.max_steps - self.step_count))
        self.steps = self.step_count + left
        self.optimizer.total_steps = self.steps
