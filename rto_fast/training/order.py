"""The order in which a stage visits its data: a fresh permutation each epoch, restorable by a few numbers."""

import hashlib
import json
import math
from array import array
from collections.abc import Iterable
from typing import Any

import torch

WHENCE = ("example", "origin")  # the fields that say where an item came from; they are not trained on


def fingerprint(items: Iterable) -> str:
    """Computes a digest of a stage's data, which changes with its content and its order.

    Args:
        items: dataclasses of token ids (lists) and, for prompts, of the values that reward functions are given. Of a value
            that JSON cannot hold only the type counts.
    """
    digest = hashlib.sha256()
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
        fingerprint: of the data, see `fingerprint`; a restored order does not compare an empty one.
    Raises:
        ValueError: there are no items.
    """

    def __init__(self, size: int, seed: int, epochs: int | None = None, fingerprint: str = ""):
        if size < 1:
            raise ValueError("there is no data to draw from")
        self.size, self.seed, self.epochs, self.fingerprint = size, seed, epochs, fingerprint
        self.epoch = self.position = 0
        self._order = self._permutation()

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
        return math.inf if self.epochs is None else max(0, self.epochs * self.size - self.visited)

    def take(self, count: int) -> list[int]:
        """Takes the next `count` indices; fewer where the last epoch ends."""
        count, taken = int(min(count, self.remaining)), []
        while len(taken) < count:
            if self.position == self.size:
                self.epoch += 1
                self.position = 0
                self._order = self._permutation()
            following = self._order[self.position : self.position + count - len(taken)]
            taken += following
            self.position += len(following)
        return taken

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
        if self.fingerprint and state.get("fingerprint", self.fingerprint) != self.fingerprint:
            return "its items are not those of the checkpoint, or in another order"
        return None
