"""Limits the memory that the rows of a file may take, because a small file can unpack to terabytes."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rto_fast.errors import DataError

DEEPEST = 100  # levels of nested dicts and lists, far fewer than Python's limit of recursion


class Budget:
    """The bytes that are left of `data.max_unpacked_gib`.

    Args:
        path: the file, for messages.
        gib: the limit in GiB.
        more: bytes that are allowed in addition.
    """

    def __init__(self, path: Path, gib: float, more: int = 0):
        self.path, self.gib, self.left = path, gib, gib * 2**30 + more

    def check(self, size: int) -> None:
        """Raises DataError where no `size` bytes are left."""
        if size > self.left:
            raise DataError(
                f"{self.path}: unpacks to more than {self.gib:g} GiB; raise data.max_unpacked_gib if that is meant"
            )

    def take(self, size: int) -> None:
        """Takes `size` bytes; raises DataError where they are not left."""
        self.check(size)
        self.left -= size

    @contextlib.contextmanager
    def set_aside(self, size: int) -> Iterator[None]:
        """Takes `size` bytes for the duration of a `with` block."""
        self.take(size)
        yield
        self.left += size


def size_of(value: Any) -> int:
    """The bytes that a row takes as Python objects.

    Raises:
        ValueError: dicts and lists are nested more than `DEEPEST` deep.
    """
    size, level, depth = 0, [value], 0
    while level:
        if depth > DEEPEST:
            raise ValueError(f"dicts and lists stand in each other more than {DEEPEST} deep")
        deeper: list[Any] = []
        for item in level:
            size += sys.getsizeof(item)
            if isinstance(item, dict):
                deeper += [*item, *item.values()]
            elif isinstance(item, (list, tuple)):
                deeper += item
        level, depth = deeper, depth + 1
    return size
