"""Reads the rows of a Parquet file in bounded memory.

Three kilobytes of Parquet can hold terabytes: a long text is stored once and repeated by number, a run of equal values is
stored as one value and a count. So the memory that a row group needs is read from the headers of its pages before anything
is decoded, and only so many rows are decoded at once as need little memory whatever they hold. The footer repeats these
numbers, but it may be wrong, and the reader allocates what the pages say.
(https://parquet.apache.org/docs/file-format/, the format's parquet.thrift)
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from rto_fast.data.budget import Budget
from rto_fast.errors import DataError

ROWS = 256  # the most rows that are decoded at once
AT_ONCE = 2**24  # the most bytes that are decoded at once, unless one row has more
LARGE_DICTIONARY = 2**24  # bytes; in a smaller dictionary the longest text is searched
LONGEST_HEADER = 2**24  # bytes of one page's header, the limit of Arrow's reader too
# Copies of a page, measured with pyarrow 26: decompressed, the reader's, Arrow's array, and the pieces that join them.
PAGE_COPIES = 6
NESTED_VALUE = 24  # bytes of a value in a list: its two levels, its position and its validity
_BYTE_ARRAY = 6  # the physical type of texts
_CODECS = ("uncompressed", "snappy", "gzip", "lzo", "brotli", "lz4", "zstd", "lz4_raw")
_DICTIONARY_PAGE, _DATA_PAGE_V2 = 2, 3
_DELTA_BYTE_ARRAY = 7  # an encoding that stores of each value what differs from the value before


class _Chunk(NamedTuple):
    """One column's part of a row group: its physical type and codec by their numbers, and the bytes of its pages."""

    kind: int
    codec: int
    start: int
    end: int


class _Pages(NamedTuple):
    """The needs of the pages of one column in one row group.

    Attributes:
        held: bytes of the dictionary and of the largest other page, decompressed.
        value: the most bytes of a value that the pages can repeat.
        number: the number of values, including missing ones and those in lists.
        delta: whether values repeat parts of the values before them.
    """

    held: int
    value: int
    number: int
    delta: bool


def parquet_rows(path: Path, budget: Budget) -> Iterator[dict[str, Any]]:
    """Yields the rows.

    Args:
        budget: what reading may hold for the moment is set aside in it; the rows themselves are its caller's to take.
    Raises:
        DataError: a row group needs more than is left of the budget. ValueError, OSError: of pyarrow, a damaged file.
    """
    from pyarrow.parquet import ParquetFile

    with open(path, "rb") as raw, contextlib.closing(ParquetFile(path)) as file:
        for index, chunks in enumerate(_row_groups(raw, path)):
            needed, rows, numbered = _plan(raw, file, chunks, budget)
            reader = ParquetFile(path, read_dictionary=numbered) if numbered else file
            budget.take(needed)
            for batch in reader.iter_batches(batch_size=rows, row_groups=[index]):
                yield from _as_rows(batch, budget)
            budget.left += needed


def _row_groups(raw: BinaryIO, path: Path) -> list[list[_Chunk]]:
    """The chunks of each row group, from the footer; of one that pyarrow has read, so its fields are there.

    (pyarrow's own view of a chunk ends the process where a field is damaged, or encrypted.)
    """
    raw.seek(-8, os.SEEK_END)
    length = int.from_bytes(raw.read(4), "little")
    raw.seek(-8 - length, os.SEEK_END)
    try:
        footer = _Compact(raw.read(length)).struct()
        return [[_chunk(column, path) for column in group[1]] for group in footer.get(4, [])]
    except (LookupError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: not a readable parquet file: its footer is damaged") from error


def _chunk(column: dict[int, Any], path: Path) -> _Chunk:
    if 8 in column or 9 in column:
        raise DataError(f"{path}: its columns are encrypted; write the file again without")
    meta = column[3]
    start = meta[9] if not meta.get(11) else min(meta[9], meta[11])
    return _Chunk(meta[1], meta[4], start, start + meta[7])


def _plan(raw: BinaryIO, file: Any, chunks: list[_Chunk], budget: Budget) -> tuple[int, int, list[str]]:
    """How to read a row group so that nothing in it takes more memory than the budget has.

    Returns:
        The bytes to set aside, the number of rows to decode at once, and the columns whose texts are decoded as numbers of a
        dictionary.
    """
    schema = file.metadata.schema
    needed = longest = 0
    numbered = []
    for column, chunk in enumerate(chunks):
        pages, field = _read_pages(raw, chunk, budget.path), schema.column(column)
        is_text, is_nested = field.physical_type == "BYTE_ARRAY", field.max_repetition_level > 0
        longest += max(pages.value, field.length)
        # Room is made for missing values of a fixed length too; in a list, one row may hold all values.
        needed += PAGE_COPIES * pages.held + (field.length + NESTED_VALUE * is_nested) * pages.number
        if is_nested and is_text:
            texts = pages.value * pages.number
            if pages.delta or needed + texts <= budget.left / 2:
                needed += texts
            else:  # slower, but the lengths are known before the texts are made
                numbered.append(field.path)
    return needed, min(ROWS, max(1, AT_ONCE // max(1, longest))), numbered


def _as_rows(batch: Any, budget: Budget) -> Iterator[dict[str, Any]]:
    """Yields the rows of a `pyarrow.RecordBatch` as dicts, fewer at once where they are large."""
    import pyarrow

    size = sum(map(_size, batch.columns))
    if size > AT_ONCE and batch.num_rows > 1:
        half = batch.num_rows // 2
        yield from _as_rows(batch.slice(0, half), budget)
        yield from _as_rows(batch.slice(half), budget)
        return
    if size > AT_ONCE:
        budget.check(4 * size)  # a character takes at most four bytes in Python
    plain = pyarrow.schema([field.with_type(_plain(field.type)) for field in batch.schema])
    yield from (batch if plain == batch.schema else batch.cast(plain)).to_pylist()


def _size(array: Any) -> int:
    """The bytes of an array's values once none is shared. Values outside of a slice are not counted."""
    import pyarrow
    from pyarrow import compute, types

    kind = array.type
    each = 64 * len(array)  # Python's own part of each object
    if isinstance(array, pyarrow.ExtensionArray):
        return _size(array.storage)
    if types.is_dictionary(kind):
        kinds = (pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.large_binary())
        if kind.value_type not in kinds:
            return each
        lengths = compute.binary_length(array.dictionary).cast(pyarrow.int64())
        return (compute.sum(lengths.take(array.indices)).as_py() or 0) + each
    if types.is_map(kind):
        start, end = (array.offsets[0].as_py(), array.offsets[-1].as_py()) if len(array) else (0, 0)
        return sum(_size(part.slice(start, end - start)) for part in (array.keys, array.items)) + each
    if types.is_struct(kind):
        return sum(map(_size, array.flatten())) + each
    return (_size(array.flatten()) if types.is_nested(kind) else array.nbytes) + each


def _plain(kind: Any) -> Any:
    """The type without dictionaries: pyarrow makes Python objects of plain values 100 times faster."""
    import pyarrow
    from pyarrow import types

    if types.is_dictionary(kind):
        return kind.value_type
    if types.is_struct(kind):
        return pyarrow.struct([field.with_type(_plain(field.type)) for field in kind])
    if types.is_list(kind) or types.is_large_list(kind):
        make = pyarrow.list_ if types.is_list(kind) else pyarrow.large_list
        return make(kind.value_field.with_type(_plain(kind.value_type)))
    return kind


def _read_pages(raw: BinaryIO, chunk: _Chunk, path: Path) -> _Pages:
    """Reads the headers of the pages of a column chunk, which alone tell how much memory decoding them takes."""
    position = chunk.start
    dictionary = largest = total = count = value = 0
    delta = False
    while position < chunk.end:
        raw.seek(position)
        header, length = _read_header(raw, path)
        kind, unpacked, packed = (header.get(field, -1) for field in (1, 2, 3))
        is_v2 = kind == _DATA_PAGE_V2
        data = header.get(8 if is_v2 else 5, {})
        number = data.get(1, 0) if isinstance(data, dict) else -1
        if not all(isinstance(size, int) and size >= 0 for size in (unpacked, packed, number)):
            raise DataError(f"{path}: not a readable parquet file: a damaged page at byte {position:,}")
        if kind == _DICTIONARY_PAGE:
            dictionary += unpacked
            raw.seek(position + length)
            value = max(value, _longest_text(raw.read(packed), unpacked, chunk))
        else:
            count += number
            delta = delta or data.get(4 if is_v2 else 2) == _DELTA_BYTE_ARRAY
            largest, total = max(largest, unpacked), total + unpacked
        position += length + packed
    return _Pages(dictionary + largest, max(value, total * delta), count, delta)


def _longest_text(content: bytes, unpacked: int, chunk: _Chunk) -> int:
    """The bytes of the longest text in the page of a dictionary; of the whole page where it is large or holds no texts."""
    import pyarrow

    if chunk.kind != _BYTE_ARRAY or unpacked > LARGE_DICTIONARY:
        return unpacked
    try:
        if chunk.codec:
            content = pyarrow.decompress(content, unpacked, _CODECS[chunk.codec], asbytes=True)
    except (OSError, ValueError, LookupError, NotImplementedError):
        return unpacked  # a codec that only the reader knows, or damage that it will name
    longest = position = 0
    while position < len(content):
        length = int.from_bytes(content[position : position + 4], "little")
        longest, position = max(longest, length), position + 4 + length
    return min(longest, unpacked)


def _read_header(raw: BinaryIO, path: Path) -> tuple[dict[int, Any], int]:
    """The fields of the header of a page by their number, and its length in bytes."""
    start, size = raw.tell(), 2**12
    while size <= LONGEST_HEADER:
        raw.seek(start)
        content = raw.read(size)
        try:
            reader = _Compact(content)
            return reader.struct(), reader.position
        except IndexError:  # the header is longer, or the file ends
            if len(content) < size:
                break
            size *= 16
        except RecursionError:
            break
    raise DataError(f"{path}: not a readable parquet file: no page at byte {start:,}")


class _Compact:
    """Reads Thrift's compact protocol; raises IndexError where the content ends before the value."""

    def __init__(self, content: bytes):
        self.content, self.position = content, 0

    def byte(self) -> int:
        self.position += 1
        return self.content[self.position - 1]

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift >= 70:  # no number of 64 bits; one of a million would take hours
                raise IndexError

    def number(self) -> int:
        value = self.varint()
        return (value >> 1) ^ -(value & 1)

    def struct(self) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        last = 0
        while head := self.byte():
            last = last + (head >> 4) if head >> 4 else self.number()
            if last in fields:  # which of the two the reader takes depends on their types
                raise IndexError
            fields[last] = self.value(head & 15)
        return fields

    def items(self) -> list[Any]:
        head = self.byte()
        size, kind = head >> 4, head & 15
        if size == 15:
            size = self.varint()
        return [self.byte() if kind in (1, 2) else self.value(kind) for _ in range(size)]

    def value(self, kind: int) -> Any:
        """Reads numbers, structs and lists, and skips values of other types, which are not needed here."""
        if kind in (4, 5, 6):
            return self.number()
        if kind == 12:
            return self.struct()
        if kind in (9, 10):
            return self.items()
        if kind == 3:
            return self.byte()
        if kind == 7:
            self.position += 8
        elif kind == 8:
            length = self.varint()
            self.position += length
        elif kind not in (1, 2):
            raise IndexError  # maps: neither a page's header nor the footer has one
        return None
