"""The training loop's step that SFT, the reward model and DPO share: draw, pack, accumulate, update."""

from collections.abc import Callable, Sequence

from torch import Tensor

from rto_fast.config import Config, StageConfig
from rto_fast.models.model import Model
from rto_fast.training import ranks
from rto_fast.training.accumulate import Accumulator
from rto_fast.training.optimizer import build_optimizer
from rto_fast.training.order import ShuffledIndices
from rto_fast.training.steps import count_steps


class SupervisedTrainer:
    """Trains `model` on a fixed list of items: on all of them in each epoch, so that the last step may have fewer than the
    others.

    Args:
        lengths: tokens of each item. loss: called with the items' indices of one micro-batch and
            those of the whole optimizer step; returns (loss, metrics), sums that add up to the step's over its
            micro-batches.
        say: see `Accumulator`. fingerprint: of the items, see `ShuffledIndices`.
    """

    def __init__(
        self,
        model: Model,
        stage: StageConfig,
        lengths: Sequence[int],
        loss: Callable[[list[int], list[int]], tuple[Tensor, dict[str, Tensor]]],
        config: Config,
        say: Callable[[str], object],
        fingerprint: str = "",
    ):
        self.model, self.stage, self.lengths, self.loss = model, stage, lengths, loss
        self.steps = count_steps(len(lengths) * stage.epochs, stage.batch_size, stage.max_steps)
        self.optimizer = build_optimizer(model, stage, self.steps, config.deepspeed)
        self.order = ShuffledIndices(len(lengths), config.seed, stage.epochs, fingerprint)
        self.accumulator = Accumulator(stage.micro_batch_tokens, say)

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

        def passes(run, factor):
            loss, metrics = self.loss([chosen[i] for i in run], chosen)
            self.optimizer.backward(loss * factor)
            return {"loss": loss.detach()} | metrics

        metrics = self.accumulator.run(passes, lengths, [self.optimizer])
        balance = {"imbalance": ranks.imbalance(lengths)} if ranks.world_size() > 1 else {}
        return metrics | {"tokens": sum(lengths)} | balance | self.optimizer.step()

    def release(self) -> None:
        """The stage is over: what it holds beside the model is given back."""
        self.optimizer.release()

    def _parts(self):
        return {"optimizer": self.optimizer, "order": self.order, "accumulator": self.accumulator}

    def state_dict(self) -> dict:
        """All that a restored trainer needs to go on exactly as this one would have."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict) -> None:
        """Data, batch size and epochs may be others than the state's: the stage then ends when what is left is visited."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        left = count_steps(self.order.remaining, self.stage.batch_size)
        if self.stage.max_steps is not None:
            left = min(left, max(0, self.stage.max_steps - self.step_count))
        self.steps = self.step_count + left
        self.optimizer.total_steps = self.steps
