"""The order in which a stage visits its data: a fresh permutation each epoch, restorable by a few numbers."""

import copy
import hashlib
import json
import math
from array import array
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch

from rto_fast.config import Config
from rto_fast.data.run_data import Use
from rto_fast.data.visited import Visited, Visits

WHENCE = ("example", "origin")  # the fields that say where an item came from; they are not trained on


def fingerprint(items: Iterable) -> str:
    """Computes a digest of a stage's data, which changes with its content and its order.

    Args:
        items: dataclasses of token ids (lists) and, for prompts, of the values that reward functions are given. Of a value
            that JSON cannot hold only the type counts. Of items that were read in part the examples count, all of them.
    """
    digest = hashlib.sha256()
    if isinstance(items, Visited):
        return items.digest
    for item in items:
        for name, value in vars(item).items():
            if name in WHENCE:
                continue
            if isinstance(value, list):
                content = array("q", value).tobytes()
            else:
                content = json.dumps(value, skipkeys=True, default=lambda other: type(other).__name__).encode()
            digest.update(f"{name} {len(content)}:".encode())
            digest.update(content)
    return digest.hexdigest()


class ShuffledIndices:
    """Draws batches of indices into a stage's data. Each epoch visits every item once, in an order fixed by the seed.

    Args:
        size: the number of items.
        seed: of the order.
        epochs: the passes over the data, after which nothing is left; None for no end.
        fingerprint: of the data, see `fingerprint`; a restored order does not compare an empty one,
            nor one of examples with one of token ids.
        places: where `size` counts examples of which not all became items: the example of each item. The other examples
            are passed over.
    Raises:
        ValueError: there are no items.
    """

    def __init__(
        self,
        size: int,
        seed: int,
        epochs: int | None = None,
        fingerprint: str = "",
        places: Sequence[int] | None = None,
    ):
        if size < 1:
            raise ValueError("there is no data to draw from")
        self.size, self.seed, self.epochs, self.fingerprint = size, seed, epochs, fingerprint
        self._items = {place: item for item, place in enumerate(range(size) if places is None else places)}
        self.epoch = self.position = 0
        self._order = self._permutation()

    @classmethod
    def of(cls, items: Collection, seed: int, epochs: int | None = None) -> "ShuffledIndices":
        """The order of a stage's items, which may have been read in part."""
        if isinstance(items, Visited):
            return cls(len(items.examples), seed, epochs, fingerprint(items), items.places)
        return cls(len(items), seed, epochs, fingerprint(items))

    def _permutation(self) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        return torch.randperm(self.size, generator=generator).tolist()

    @property
    def visited(self) -> int:
        """The number of items taken so far, in all epochs."""
        return self.epoch * self.size + self.position

    @property
    def remaining(self) -> int | float:
        """The number of items still to be taken; infinity where there is no end."""
        if self.epochs is None:
            return math.inf
        left = sum(place in self._items for place in self._order[self.position :])
        return max(0, left + (self.epochs - 1 - self.epoch) * len(self._items))

    def take(self, count: int) -> list[int]:
        """Takes the next `count` indices; fewer where the last epoch ends."""
        count, taken = int(min(count, self.remaining)), []
        while len(taken) < count:
            if self.position == self.size:
                self.epoch += 1
                self.position = 0
                self._order = self._permutation()
            following = self._order[self.position : self.position + count - len(taken)]
            taken += [self._items[place] for place in following if place in self._items]
            self.position += len(following)
        return taken

    def first(self, count: int | None) -> list[int]:
        """The indices that the first `count` draws of an order take, ascending, each once; of all draws for None."""
        if count is None:
            return sorted(self._items.values())
        beginning = copy.copy(self)
        beginning.epoch = beginning.position = 0
        beginning._order = beginning._permutation()
        return sorted(set(beginning.take(count)))

    def state_dict(self) -> dict[str, int | str]:
        return {"epoch": self.epoch, "position": self.position, "size": self.size, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on after as many items as the state had visited, also where the data has changed (see `difference`).

        A state of an older version holds no size; its data is assumed to have had the present one.
        """
        size = state.get("size", self.size)
        visited = state["epoch"] * size + min(state["position"], size)
        self.epoch = max(0, visited - 1) // self.size  # as `take` leaves it: an epoch ends at position `size`
        self.position = visited - self.epoch * self.size
        self._order = self._permutation()

    def difference(self, state: dict[str, Any]) -> str | None:
        """Says how the present data differs from that of a state; None if it does not, as far as the state can tell."""
        size = state.get("size")
        if size is None and state["position"] > self.size:
            return f"{self.size:,} items, which is fewer than when the checkpoint was made"
        if size is not None and size != self.size:
            return f"{self.size:,} items, it had {size:,} when the checkpoint was made"
        before = state.get("fingerprint", self.fingerprint)
        comparable = before.startswith("examples:") == self.fingerprint.startswith("examples:")
        if self.fingerprint and comparable and before != self.fingerprint:
            return "its items are not those of the checkpoint, or in another order"
        return None


def visits_of(config: Config, use: Use, count: int) -> Visits | None:
    """Which of `count` examples a run visits before its steps end; None where it comes to all of them.

    Args:
        config: The run's configuration.
        use: What the examples are for.
        count: How many there are.
    """
    if use == "eval_prompts":
        return Visits(range(count), config.eval.prompts) if config.eval.prompts < count else None
    if use == "prompts":
        needed = [config.rto.iterations and config.rto.iterations * config.rto.prompts_per_rollout]
    else:
        stages = {"sft": config.sft, "reward_model": config.reward_model, "dpo": config.dpo}
        used = [stages[name] for name in config.trained_stages if name in stages and (name == "sft") == (use == "sft")]
        needed = [stage.max_steps and stage.max_steps * stage.batch_size for stage in used]
    most = max((each or count for each in needed), default=count)
    if most >= count:
        return None
    # A resumed run may have come further than its present batch sizes and steps say.
    return Visits(ShuffledIndices(count, config.seed).take(count), count if config.resume else most)
