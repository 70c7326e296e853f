"""The part of the data that a stage's steps visit, where they end before they have visited all of it."""

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple, TypeVar

from rto_fast.data.layouts import Example
from rto_fast.data.tokenizing import CutReport, NothingLeft

Item = TypeVar("Item")


class Visits(NamedTuple):
    """Which examples a stage visits.

    Args:
        order: The indices of all examples, in the order in which the stage comes to them.
        most: How many usable examples it visits, from the beginning of that order.
    """

    order: Sequence[int]
    most: int


class Visited(list[Item]):
    """The items that were made of a part of the examples. Elsewhere a stage's items are an ordinary list of all of them.

    Args:
        items: The items, in the order of the examples.
        places: The index of each item's example, ascending.
        examples: All examples, also those that were not read.
    """

    def __init__(self, items: Sequence[Item], places: Sequence[int], examples: Sequence[Example]):
        super().__init__(items)
        self.places, self.examples = places, examples

    @cached_property
    def digest(self) -> str:
        """A digest of all examples, which changes with their content and their order, but not with how many are read."""
        digest = hashlib.sha256()
        for example in self.examples:
            content = {name: value for name, value in vars(example).items() if name != "origin"}
            digest.update(json.dumps(content, skipkeys=True, default=lambda other: type(other).__name__).encode())
        return f"examples:{digest.hexdigest()}"


def read_visited(
    build: Callable[[list[Example]], tuple[list[Item], CutReport]], examples: Sequence[Example], visits: Visits
) -> tuple[Visited[Item], CutReport]:
    """Makes items of as many examples as a stage visits. In the place of those that cannot be used it reads more.

    Args:
        build: Makes items of examples; `CutReport.positions` says of which.
        examples: All examples.
        visits: Which of them the stage visits.

    Raises:
        NothingLeft: No example can be used.
    """
    count, every = min(visits.most, len(examples)), len(examples)
    while True:
        chosen = sorted(visits.order[:count])
        try:
            items, report = build([examples[i] for i in chosen])
        except NothingLeft:
            if count == every:
                raise
            items = []
        if len(items) >= visits.most or count == every:
            break
        count = min(every, 2 * count)
    report.unread = every - count
    return Visited(items, [chosen[position] for position in report.positions], examples), report
