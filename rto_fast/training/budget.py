"""How many tokens a pass may have, in each stage of a run.

The plan decides it once, when the run begins (`rto_fast.planning.budgets`), and `progress.json` keeps it. A resumed run
therefore packs its passes as it did before, on another machine too.
"""

from dataclasses import dataclass

from rto_fast.config import Config

USUAL = 16384  # tokens, where no plan says how many; on a CPU the most, for larger passes are no faster there


@dataclass(frozen=True)
class TokenBudget:
    """The most tokens of a pass in one process. A longer item is a pass of its own.

    Args:
        training: of a forward and backward pass.
        scoring: of a forward pass without gradients, which keeps nothing for a backward pass.
        bound: `model.micro_batch_tokens`, within which they were chosen. Another bound needs another choice.
    """

    training: int
    scoring: int
    bound: int | None = None


def unplanned_budget(config: Config) -> TokenBudget:
    """The budget of a stage without a plan: the configuration's bound, or else the usual number."""
    bound = config.model.micro_batch_tokens
    return TokenBudget(bound or USUAL, bound or USUAL, bound)
