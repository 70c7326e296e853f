"""An optimizer step's forward and backward passes: micro-batches over the ranks, and what happens when memory runs out."""

from collections import Counter

import torch

from rto_fast.system.progress import advance_part
from rto_fast.training import ranks


class Accumulator:
    """Runs the micro-batches of optimizer steps.

    Args:
        tokens: budget of a micro-batch. say: told when memory runs out and the budget is halved.
    """

    def __init__(self, tokens, say):
        self.tokens = self.configured = tokens
        self.say = say

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
            micro_batches = ranks.shared_micro_batches(lengths, self.tokens)
            try:
                for done, (indices, is_work) in enumerate(micro_batches, 1):
                    metrics = passes(indices, float(is_work))
                    advance_part(done / len(micro_batches))
                    totals.update(metrics if is_work else {name: 0.0 * value for name, value in metrics.items()})
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                # Not the error: its traceback holds what the passes left in memory.
                failure = str(error) or "out of memory."
            if failure:
                for optimizer in optimizers:  # DeepSpeed's raises: before the ranks wait for one another
                    optimizer.zero_grad()
            if not ranks.any_rank(failure is not None):
                return ranks.add_up(dict(totals))
            for optimizer in optimizers:
                optimizer.zero_grad()
            self._shrink(lengths, failure or "another rank is out of memory.")

    def _shrink(self, lengths, failure):
        """The step begins anew with half the tokens; its normalisers are those of the step, not of the micro-batch."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self.tokens <= max(lengths):  # an item is never cut
            raise torch.OutOfMemoryError(failure)
        before = self.tokens
        self.tokens //= 2
        while self.tokens >= max(2, sum(lengths)):  # the same passes again
            self.tokens //= 2
        self.say(f"out of memory with micro-batches of {before:,} tokens; goes on with {self.tokens:,}")

    def state_dict(self):
        return {"configured": self.configured, "tokens": self.tokens}

    def load_state_dict(self, state):
        """A budget that was lowered stays so, unless the run goes on with another one in its options."""
        if not 0 < state["tokens"] <= state["configured"]:
            raise ValueError(f"accumulator.tokens: expected 1 to {state['configured']}, got {state['tokens']}")
        if state["configured"] == self.configured:
            self.tokens = state["tokens"]


def is_out_of_memory(error):
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
