"""Reads from the messages of Arrow files how large they are once unpacked.

`datasets` maps plain files into memory, but it unpacks packed ones as a whole. The format is described in
https://arrow.apache.org/docs/format/Columnar.html#ipc-streaming-format and in its Message.fbs.
"""

import struct
from pathlib import Path
from typing import Any

from rto_fast.data.budget import Budget

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
