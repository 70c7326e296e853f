"""Drops repeated examples, and splits examples so that no prompt is on both sides."""

import random
from collections.abc import Iterable, Sequence

from rto_fast.data.layouts import Example
from rto_fast.data.messages import as_messages, content_of, message_text


def prompt_key(prompt: str | Sequence[dict]) -> tuple[tuple[str, str], ...]:
    """A key that is equal for prompts that differ only in case and whitespace. A text equals one message from the user."""
    turns = ((message["role"], message_text(message)) for message in as_messages(prompt))
    return tuple((role, " ".join(text.casefold().split())) for role, text in turns)


def without_duplicates(examples: Iterable[Example]) -> list[Example]:
    """The first of each set of examples whose prompt and responses are exactly equal."""
    unique: dict[str, Example] = {}
    for example in examples:
        parts = (example.prompt, example.response, example.chosen, example.rejected)
        unique.setdefault(repr([*map(content_of, parts), example.tools]), example)
    return list(unique.values())


def without_prompts_of(examples: Iterable[Example], others: Iterable[Example]) -> list[Example]:
    """The examples whose prompt (by `prompt_key`) is in none of `others`."""
    taken = {prompt_key(other.prompt) for other in others}
    return [example for example in examples if prompt_key(example.prompt) not in taken]


def _by_prompt(examples: list[Example]) -> dict[tuple, list[Example]]:
    groups: dict[tuple, list[Example]] = {}
    for example in examples:
        groups.setdefault(prompt_key(example.prompt), []).append(example)
    return groups


def draw_prompts(examples: list[Example], count: int) -> list[Example]:
    """Draws prompts at random and returns all their examples: `count`, or about as many where prompts occur repeatedly.

    A prompt is taken if that brings the number of examples nearer to `count`. A prompt with 2·count examples or more is
    therefore never taken. Fewer than 2·count examples are drawn, and none if every prompt has that many.

    Args:
        examples: the same examples in the same order give the same draw in every run.
        count: the number of examples wanted.
    """
    groups = list(_by_prompt(examples).values())
    generator = random.Random(0)
    # Where no prompt is repeated, exactly these are drawn, as by older versions, which drew examples.
    order = generator.sample(range(len(groups)), min(count, len(groups)))
    others = sorted(set(range(len(groups))) - set(order))
    generator.shuffle(others)
    drawn, missing = set(), count
    for index in order + others:
        if len(groups[index]) < 2 * missing:
            missing -= len(groups[index])
            drawn.update(map(id, groups[index]))
    return [example for example in examples if id(example) in drawn]


def one_of_each_prompt(examples: list[Example]) -> list[Example]:
    """The first example of each prompt."""
    return [group[0] for group in _by_prompt(examples).values()]


def repeated_prompts(examples: list[Example]) -> int:
    """How many prompts occur more than once."""
    return sum(len(group) > 1 for group in _by_prompt(examples).values())
