"""Limits the memory that the rows of a file may take, because a small file can unpack to terabytes.

`datasets` maps plain Arrow files into memory, but it unpacks packed ones as a whole: the messages of such a file say how
large they are once unpacked. The format is described in
https://arrow.apache.org/docs/format/Columnar.html#ipc-streaming-format and in its Message.fbs.
"""

import contextlib
import struct
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


_RECORD_BATCH, _DICTIONARY_BATCH = 3, 2


def check_arrow_files(folder: Path, budget: Budget) -> None:
    """Takes the unpacked size of the packed messages in all .arrow files of a folder from `budget`.

    Raises:
        DataError: they are too large.
        ValueError, OSError: a file is damaged.
    """
    import pyarrow

    for path in sorted(folder.rglob("*.arrow")):
        with pyarrow.memory_map(str(path)) as file:
            for message in pyarrow.ipc.MessageReader.open_stream(file):
                try:
                    budget.take(_unpacked(message))
                except (struct.error, IndexError) as error:
                    raise ValueError(f"a damaged message in {path.name}") from error


def _unpacked(message: Any) -> int:
    """The sum of the unpacked sizes that the packed buffers of a message name, in bytes; 0 where nothing is packed."""
    content, body = bytes(message.metadata), message.body
    table = _number("<I", content, 0)
    header_field = _field(content, table, 1)
    kind = content[header_field] if header_field else 0
    header = _target(content, _field(content, table, 2))
    if kind == _DICTIONARY_BATCH:
        header = _target(content, _field(content, header, 1))
    elif kind != _RECORD_BATCH:
        return 0
    if not _field(content, header, 3):
        return 0
    buffers = _target(content, _field(content, header, 2))
    total = 0
    for index in range(_number("<I", content, buffers)):
        offset, length = struct.unpack_from("<qq", content, buffers + 4 + 16 * index)
        if length >= 8:
            total += max(0, _number("<q", bytes(body.slice(offset, 8)), 0))  # -1: this buffer is not packed
    return total


def _number(kind: str, content: bytes, position: int) -> int:
    return struct.unpack_from(kind, content, position)[0]


def _field(content: bytes, table: int, index: int) -> int:
    """The position of a field of a FlatBuffers table; 0 where the table does not have it."""
    fields = table - _number("<i", content, table)
    if 4 + 2 * index >= _number("<H", content, fields):
        return 0
    offset = _number("<H", content, fields + 4 + 2 * index)
    return table + offset if offset else 0


def _target(content: bytes, position: int) -> int:
    """The position that the offset at `position` points at."""
    return position + _number("<I", content, position)
