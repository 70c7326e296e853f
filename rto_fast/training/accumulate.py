"""An optimizer step's forward and backward passes: micro-batches over the ranks, and what happens when memory runs out."""

from collections import Counter

import torch

from rto_fast.training import ranks


class Accumulator:
    """Runs the micro-batches of optimizer steps.

    Args:
        tokens: budget of a micro-batch. say: told when memory runs out and the budget is halved.
    """

    def __init__(self, tokens, say):
        self.tokens, self.say = tokens, say

    def run(self, passes, lengths, optimizers):
        """
        Args:
            passes: called with a micro-batch's indices and a factor for its losses (1, or 0 where only the other ranks have
                work left); runs forward and backward, returns metrics that add up over micro-batches. lengths: tokens of
                each item of the step. optimizers: whose gradients are collected.
        Returns:
            the metrics of the whole step.
        """
        while True:
            totals: Counter = Counter()
            failure = None
            try:
                for indices, is_work in ranks.shared_micro_batches(lengths, self.tokens):
                    metrics = passes(indices, float(is_work))
                    totals.update(metrics if is_work else {name: 0.0 * value for name, value in metrics.items()})
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                failure = error
            if not ranks.any_rank(failure is not None):
                return ranks.add_up(dict(totals))
            self._shrink(lengths, optimizers, failure)

    def _shrink(self, lengths, optimizers, failure):
        """The step begins anew with half the tokens; its normalisers are those of the step, not of the micro-batch."""
        for optimizer in optimizers:
            optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self.tokens <= max(lengths):  # an item is never cut
            raise failure or RuntimeError("another rank is out of memory")
        self.say(f"out of memory with micro-batches of {self.tokens:,} tokens; goes on with {self.tokens // 2:,}")
        self.tokens //= 2


def is_out_of_memory(error):
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
