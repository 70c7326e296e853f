"""What Arrow files unpack to, by their messages alone: `datasets` maps them into memory, but packed ones it unpacks whole.

(https://arrow.apache.org/docs/format/Columnar.html#ipc-streaming-format, the format's Message.fbs)
"""

import struct
from pathlib import Path
from typing import Any

from rto_fast.data.budget import Budget

_RECORD_BATCH, _DICTIONARY_BATCH = 3, 2


def check_arrow_files(folder: Path, budget: Budget) -> None:
    """Takes what the packed messages of all .arrow files in a folder unpack to; DataError where that is too much.

    Raises ValueError, OSError: of pyarrow, a damaged file.
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
    """Bytes that the packed buffers of a message name as their unpacked size; 0 where nothing is packed."""
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
            total += max(0, _number("<q", bytes(body.slice(offset, 8)), 0))  # -1: not packed after all
    return total


def _number(kind: str, content: bytes, position: int) -> int:
    return struct.unpack_from(kind, content, position)[0]


def _field(content: bytes, table: int, index: int) -> int:
    """Position of a FlatBuffers table's field, or 0 where the table lacks it."""
    fields = table - _number("<i", content, table)
    if 4 + 2 * index >= _number("<H", content, fields):
        return 0
    offset = _number("<H", content, fields + 4 + 2 * index)
    return table + offset if offset else 0


def _target(content: bytes, position: int) -> int:
    """What the offset at a position points at."""
    return position + _number("<I", content, position)
