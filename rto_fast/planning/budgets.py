"""How many tokens a pass may have, by the plan: as many as the machine's memory holds, in round numbers."""

from collections.abc import Callable, Mapping

from rto_fast.planning.machine import GIB, Machine
from rto_fast.planning.memory import Memory, Plan
from rto_fast.training.budget import USUAL, TokenBudget

# Tokens of the smallest pass that is planned: products of so many rows still keep a GPU busy with a large model.
LEAST = 1024
# Tokens of the largest: on an H200, passes of 65,536 tokens of a model of 135 million parameters are no longer bound by
# launches, and all larger models need fewer.
MOST = 131072


def choices(has_gpu: bool, bound: int | None) -> list[int]:
    """The numbers of tokens of which one is chosen, largest first: `bound`, and round ones below, eight an octave.

    Args:
        bound: `model.micro_batch_tokens`.
    """
    most = bound or (MOST if has_gpu else USUAL)
    octaves = [1 << power for power in range(LEAST.bit_length() - 1, most.bit_length())]
    numbers = {n for octave in octaves for n in range(octave, 2 * octave, octave // 8) if n <= most}
    return sorted(numbers | {most}, reverse=True)


def choose(memory: Callable[[int], Memory], tokens: list[int], machine: Machine) -> int:
    """The first of `tokens` whose passes fit in the machine's planned memory; the last where none does.

    Args:
        memory: the peak of a phase whose passes have so many tokens.
    """
    return next((n for n in tokens if memory(n).total <= machine.planned), tokens[-1])


def described(budgets: Mapping[str, TokenBudget], plan: Plan | None = None, is_kept: bool = False) -> str:
    """The line of the log that says what was chosen, and why.

    Args:
        plan: by which it was chosen.
        is_kept: it was chosen when the run began.
    """
    training = _listed({stage: budget.training for stage, budget in budgets.items()})
    scoring = _listed({stage: budget.scoring for stage, budget in budgets.items()})
    if is_kept:
        why = "as this run began"
    elif plan is None:
        why = "without a plan"
    else:
        why = f"planned memory {plan.passes_peak / GIB:.3g} of {plan.machine.whole / GIB:.3g} GiB"
    in_scoring = "" if scoring == training else f", in scoring {scoring}"
    return f"micro-batches of up to {training} tokens{in_scoring}; {why}"


def _listed(tokens: Mapping[str, int]) -> str:
    """The tokens of each stage: "90,112 (dpo) or 65,536 (rto)"."""
    stages: dict[int, list[str]] = {}
    for stage, count in tokens.items():
        stages.setdefault(count, []).append(stage)
    if len(stages) == 1:
        return f"{next(iter(stages)):,}"
    return " or ".join(f"{count:,} ({', '.join(names)})" for count, names in stages.items())
