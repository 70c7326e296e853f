"""How many tokens a pass may have, by the plan: as many as the machine's memory holds, in round numbers."""

from collections.abc import Callable, Mapping

from rto_fast.planning.machine import GIB, Machine
from rto_fast.planning.memory import Memory, Plan
from rto_fast.planning.shapes import Shape
from rto_fast.training.budget import USUAL, TokenBudget

# Tokens of the smallest pass that is planned: products of so many rows still keep a GPU busy with a large model.
LEAST = 1024
# Tokens of the largest: on an H200, passes of 65,536 tokens of a model of 135 million parameters are no longer bound by
# launches, and all larger models need fewer.
MOST = 131072
INDEXED = 2**31  # elements of a tensor that kernels number in 32 bits


def choices(shape: Shape, has_gpu: bool, bound: int | None) -> list[int]:
    """The numbers of tokens of which one is chosen, largest first: `bound`, or else round numbers, eight an octave.

    Args:
        shape: of the widest model.
        bound: `model.micro_batch_tokens`.
    """
    most = min(bound or (MOST if has_gpu else USUAL), INDEXED // shape.widest)
    octaves = [1 << power for power in range(LEAST.bit_length() - 1, most.bit_length())]
    numbers = {n for octave in octaves for n in range(octave, 2 * octave, octave // 8) if n <= most}
    if most == bound or not numbers:
        numbers.add(most)
    return sorted(numbers, reverse=True)


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
    stages: dict[tuple[int, int], list[str]] = {}
    for stage, budget in budgets.items():
        stages.setdefault((budget.training, budget.scoring), []).append(stage)
    parts = []
    for (training, scoring), names in stages.items():
        scores = f" (scoring {scoring:,})" if scoring != training else ""
        parts.append(f"{training:,} tokens{scores}" + f" in {', '.join(names)}" * (len(stages) > 1))
    if is_kept:
        why = "as this run began"
    elif plan is None:
        why = "no plan"
    else:
        used, whole = plan.passes_peak / GIB, plan.machine.whole / GIB
        why = f"planned memory {used:.3g} of {whole:.3g} GiB"
    return f"micro-batches of up to {'; '.join(parts)} ({why})"
