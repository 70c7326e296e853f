"""The micro-batches of an optimizer step, shared out over the ranks. Where memory runs out, the step starts anew with
smaller ones.

step = accumulator.step(items, lengths, optimizers)
for rows, factor in step:
    with step:
        ...  # forward and backward pass over the items `rows`, of a loss times `factor`
        step.add(metrics)
metrics = step.metrics()
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from rto_fast.models.graphs import PassGraphs
from rto_fast.system.progress import advance_part
from rto_fast.training import ranks
from rto_fast.training.optimizer import ScheduledOptimizer


class Accumulator:
    """How many tokens a micro-batch may have.

    Args:
        tokens: the budget that the configuration gives.
        say: is called with a line of text when memory runs out and the budget is halved.
    """

    def __init__(self, tokens: int, say: Callable[[str], object]):
        self.tokens = self.configured = tokens
        self.say = say

    def step(
        self, items: Sequence[int], lengths: Sequence[int], optimizers: Collection[ScheduledOptimizer]
    ) -> "AccumulatedStep":
        """Begins an optimizer step.

        Args:
            items: the numbers of the step's items.
            lengths: the tokens of every item, of all steps.
            optimizers: whose gradients are cleared where the step starts anew.
        """
        return AccumulatedStep(self, items, [lengths[i] for i in items], optimizers)

    def shrink(self, lengths: Sequence[int], failure: str) -> None:
        """Gives back CUDA graphs; if there are none, halves the budget until a step of these lengths has more micro-batches.

        Raises:
            torch.OutOfMemoryError: the budget is that of the longest item, which is never cut.
        """
        if ranks.any_rank(PassGraphs.give_up()):
            self.say("out of memory: goes on without CUDA graphs of passes")
            return
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self.tokens <= max(lengths):
            raise torch.OutOfMemoryError(failure)
        before = self.tokens
        self.tokens //= 2
        while self.tokens >= max(2, sum(lengths)):  # the same passes again
            self.tokens //= 2
        self.say(f"out of memory with micro-batches of {before:,} tokens; goes on with {self.tokens:,}")

    def state_dict(self) -> dict[str, int]:
        return {"configured": self.configured, "tokens": self.tokens}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Keeps a budget that was lowered, unless the run goes on with another one in its options."""
        if not 0 < state["tokens"] <= state["configured"]:
            raise ValueError(f"accumulator.tokens: expected 1 to {state['configured']}, got {state['tokens']}")
        if state["configured"] == self.configured:
            self.tokens = state["tokens"]


class AccumulatedStep:
    """The micro-batches of one optimizer step; see the module for its use.

    As a context it catches that memory ran out in a pass. The iteration then clears the gradients and begins anew with half
    the tokens; the losses' denominators are those of the step, so that its result is the same.
    """

    def __init__(
        self,
        budget: Accumulator,
        items: Sequence[int],
        lengths: Sequence[int],
        optimizers: Collection[ScheduledOptimizer],
    ):
        self.budget, self.items, self.lengths, self.optimizers = budget, items, lengths, optimizers
        self.totals: dict[str, Tensor] = {}
        self.factor, self.failure = 1.0, ""

    def __iter__(self) -> Iterator[tuple[list[int], float]]:
        """Yields the items of each micro-batch and the factor of its loss: 1, or 0 where only other ranks have work left."""
        for optimizer in self.optimizers:
            optimizer.make_gradients()
        while True:
            self.totals, self.failure = {}, ""
            micro_batches = ranks.shared_micro_batches(self.lengths, self.budget.tokens)
            for done, (indices, is_work) in enumerate(micro_batches, 1):
                self.factor = float(is_work)
                yield [self.items[i] for i in indices], self.factor
                if self.failure:
                    self._zero_grad()  # DeepSpeed's raises: before the ranks wait for one another
                    break
                advance_part(done / len(micro_batches))
            if not ranks.any_rank(bool(self.failure)):
                return
            self._zero_grad()
            self.budget.shrink(self.lengths, self.failure or "another rank is out of memory.")

    def _zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Adds a micro-batch's metrics, whose sum over the micro-batches is the step's."""
        add_to(self.totals, metrics if self.factor else {name: 0.0 * value for name, value in metrics.items()})

    def metrics(self) -> dict[str, Tensor]:
        """The metrics of the whole step, of all ranks."""
        return ranks.add_up(self.totals)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        # torch.OutOfMemoryError is a RuntimeError; on a CPU there is no class for it.
        if isinstance(error, torch.OutOfMemoryError) or (
            isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
        ):
            # Not the error itself: its traceback holds what the passes left in memory.
            self.failure = str(error) or "out of memory."
        return bool(self.failure)


def add_to(totals: dict[str, Any], metrics: Mapping[str, Any]) -> None:
    """Adds metrics to their sums so far; tensors in one call."""
    known = [name for name in metrics if name in totals]
    tensors = [name for name in known if isinstance(metrics[name], Tensor) and isinstance(totals[name], Tensor)]
    sums: dict[str, Any] = {name: metrics[name] + totals[name] for name in known if name not in tensors}
    if tensors:
        added = torch._foreach_add([metrics[name] for name in tensors], [totals[name] for name in tensors])
        sums |= dict(zip(tensors, added))
    totals |= {name: sums.get(name, value) for name, value in metrics.items()}


def numbers(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics with numbers in the place of tensors of one element. Waits for the device, once for each dtype."""
    kinds: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, value in metrics.items():
        if isinstance(value, Tensor):
            kinds.setdefault((value.device, value.dtype), []).append(name)
    read: dict[str, Any] = {}
    for names in kinds.values():
        read |= zip(names, torch.stack([metrics[name].detach().reshape(()) for name in names]).tolist())
    return {name: read.get(name, value) for name, value in metrics.items()}
