"""The training loop's step that SFT, the reward model and DPO share: draw, pack, accumulate, update."""

from collections import Counter
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from rto_fast.batch import micro_batches
from rto_fast.config import StageConfig
from rto_fast.training.optimizer import Optimizer
from rto_fast.training.order import ShuffledIndices


class SupervisedTrainer:
    """Trains `model` on a fixed list of items.

    Args:
        lengths: tokens of each item. loss: called with the items' indices of one micro-batch and those of the whole
            optimizer step; returns (loss, metrics), sums that add up to the step's over its micro-batches.
        seed: of the order.
    """

    def __init__(
        self, model: nn.Module, stage: StageConfig, lengths: Sequence[int],
        loss: Callable[[list[int], list[int]], tuple[Tensor, dict[str, Tensor]]], seed: int,
    ):  # fmt: skip
        self.model, self.stage, self.lengths, self.loss = model, stage, lengths, loss
        steps = max(1, len(lengths) * stage.epochs // stage.batch_size)
        self.steps = steps if stage.max_steps is None else min(steps, stage.max_steps)
        self.optimizer = Optimizer(model, stage, self.steps)
        self.order = ShuffledIndices(len(lengths), seed)

    @property
    def step_count(self) -> int:
        """Steps done."""
        return self.optimizer.steps

    @property
    def skipped(self) -> int:
        """Steps of those whose gradient was not finite."""
        return self.optimizer.skipped

    def step(self) -> dict:
        """One optimizer step; returns its metrics."""
        chosen = self.order.take(self.stage.batch_size)
        lengths = [self.lengths[i] for i in chosen]
        totals: Counter = Counter()
        for run in micro_batches(lengths, self.stage.micro_batch_tokens):
            loss, metrics = self.loss([chosen[i] for i in run], chosen)
            loss.backward()
            totals.update({"loss": loss.detach()} | metrics)
        return dict(totals) | {"tokens": sum(lengths)} | self.optimizer.step()

    def _parts(self):
        return {"model": self.model, "optimizer": self.optimizer, "order": self.order}

    def state_dict(self) -> dict:
        """All that a restored trainer needs to go on exactly as this one would have."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
