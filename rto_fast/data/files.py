"""Reads the rows of local files one by one: json, jsonl and csv, gzipped or not, and parquet.

A row that cannot be read, such as a malformed line of JSON, is a `DataError` in the place of the row. An error that makes
the rest of a file unreadable is raised.

A small packed file can hold terabytes. So its size is bounded before it is unpacked, the sizes of the rows' objects are
added up as they are made, and no file is read as a whole.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from rto_fast.data.budget import Budget, size_of
from rto_fast.errors import DataError, error_text

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".csv")
LONGEST_ROW = 2**23  # characters; the objects of a row of nothing but brackets take 30 times as many bytes
_PIECE = 2**16  # characters to read at once
_LONGEST_WORD = 16  # characters of the longest word that a piece may cut: -Infinity, or an escaped pair of surrogates
_SPACE = re.compile(r"[ \t\n\r]*")
Row = dict[str, Any] | DataError


def read_lines(file: TextIO, path: Path) -> Iterator[str]:
    """Yields the lines with their ends; raises DataError for a line that is longer than a row."""
    number = 0
    while line := file.readline(LONGEST_ROW):
        number += 1
        if len(line) == LONGEST_ROW:
            raise DataError(f"{path}:{number}: a line of {len(line):,} characters or more; write one row a line")
        yield line


def json_lines(lines: Iterable[str], path: Path) -> Iterator[tuple[str, Row]]:
    """Yields the origin and the row of each line."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"{path}:{number}", _json_line(line.strip(), f"{path}:{number}")


def _json_line(line: str, origin: str) -> Row:
    try:
        return as_row(json.loads(line), origin)
    except json.JSONDecodeError as error:
        return DataError(f"{origin}: malformed JSON: {error.msg} at column {error.colno}: {line[:60]!r}")
    except (ValueError, RecursionError) as error:  # thousands of digits or of brackets
        return DataError(f"{origin}: JSON that cannot be read: {error}")


def as_row(value: object, origin: str) -> Row:
    """A JSON value as a row; an error unless it is an object."""
    if isinstance(value, dict):
        return value
    return DataError(f"{origin}: expected a JSON object with columns, found {type(value).__name__}")


def json_rows(file: TextIO, path: Path) -> Iterator[tuple[str, Row]]:
    """Yields the origin and the row of a list of objects, of one object, or of one object a line, as in some .json files."""
    values = _Values(file, path)
    first = values.next_character()
    if first == "[":
        yield from _rows_of_list(values, path)
        return
    try:
        row = values.read()
        if values.next_character():
            values.fail("Extra data")
    except DataError:
        if first != "{":
            raise
        yield from json_lines(chain(values.lines_so_far(), read_lines(file, path)), path)
        return
    yield f"{path}[0]", as_row(row, f"{path}[0]")


def _rows_of_list(values: "_Values", path: Path) -> Iterator[tuple[str, Row]]:
    values.skip(1)
    values.forgets = True
    index, following = 0, values.next_character()
    while following != "]":
        origin = f"{path}[{index}]"
        yield origin, as_row(values.read(), origin)
        index, following = index + 1, values.next_character()
        if following == ",":
            values.skip(1)
            values.next_character()
        elif following != "]":
            values.fail("Expecting ',' delimiter")
    values.skip(1)
    if values.next_character():
        values.fail("Extra data")


class _Values:
    """Reads JSON values one after another.

    Args:
        file: the text, which is read as far as the values need it.
        path: the file, for messages.
    Attributes:
        forgets: whether the text before the next value is dropped from memory.
    """

    def __init__(self, file: TextIO, path: Path):
        self.file, self.path, self.forgets = file, path, False
        self._text, self._start = "", 0
        self._line = self._column = 1  # at the beginning of the text
        self._decoder = json.JSONDecoder()

    def _more(self) -> bool:
        """Reads the next piece; returns False at the end of the file."""
        kept = len(self._text) - self._start * self.forgets
        if kept >= LONGEST_ROW:
            line, _ = self._place(self._start)
            raise DataError(f"{self.path}:{line}: a row of {LONGEST_ROW:,} characters or more; write smaller rows")
        # The pieces double, because the value is parsed again from its beginning.
        piece = self.file.read(min(max(_PIECE, kept), LONGEST_ROW - kept))
        if piece and self.forgets:
            self._line, self._column = self._place(self._start)
            self._text, self._start = self._text[self._start :], 0
        self._text += piece
        return bool(piece)

    def _place(self, position: int) -> tuple[int, int]:
        """The line and the column of a position in the text, both from 1."""
        before = self._text.count("\n", 0, position)
        in_line = position - self._text.rfind("\n", 0, position) if before else self._column + position
        return self._line + before, in_line

    def fail(self, reason: str, position: int | None = None) -> NoReturn:
        """Raises DataError for `position`, by default for the next character."""
        line, column = self._place(self._start if position is None else position)
        raise DataError(f"{self.path}:{line}: malformed JSON: {reason} at column {column}")

    def skip(self, count: int) -> None:
        self._start += count

    def next_character(self) -> str:
        """The next character that is not a space; "" at the end of the file."""
        while True:
            self._start = _SPACE.match(self._text, self._start).end()  # type: ignore[union-attr]  # matches nothing too
            if self._start < len(self._text):
                return self._text[self._start]
            if not self._more():
                return ""

    def read(self) -> Any:
        """The next value; raises DataError if it is malformed or too long."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._start)
            except json.JSONDecodeError as error:
                is_cut = error.pos > len(self._text) - _LONGEST_WORD or error.msg.startswith("Unterminated string")
                if not (is_cut and self._more()):
                    self.fail(error.msg, error.pos)
            except (ValueError, RecursionError) as error:  # thousands of digits or of brackets
                raise DataError(f"{self.path}: JSON that cannot be read: {error}") from None
            else:
                if self._text[end - 1] in '}]"' or end < len(self._text) or not self._more():
                    self._start = end
                    return value

    def lines_so_far(self) -> Iterator[str]:
        """Yields the lines that were read. The last one is completed from the file."""
        *lines, last = self._text.split("\n")  # splitlines() would also split at U+2028
        yield from lines
        yield last + self.file.readline(LONGEST_ROW)


class _Unpacked(io.RawIOBase):
    """The content of a gzip file, up to `gib` GiB."""

    def __init__(self, path: Path, gib: float):
        self.file, self.budget = gzip.open(path), Budget(path, gib)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        size = self.file.readinto(buffer)
        self.budget.take(size)
        return size

    def close(self) -> None:
        self.file.close()
        super().close()


def rows_of_file(path: Path, max_unpacked_gib: float) -> Iterator[tuple[str, Row]]:
    """Yields the origin and the row, or its error, of each row of a local file.

    Args:
        path: the file.
        max_unpacked_gib: the most GiB that the rows of a packed file (.gz, .parquet) may take. Plain text is bounded by
            the user's disk.
    """
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise DataError(f"{path}: unknown kind of file; expected {', '.join(SUFFIXES)}")
    budget = Budget(path, max_unpacked_gib)
    rows = _parquet_rows(path, budget) if name.endswith(".parquet") else _text_rows(path, name, max_unpacked_gib)
    return counted(rows, budget if name.endswith((".gz", ".parquet")) else None)


def counted(rows: Iterator[tuple[str, Row]], budget: Budget | None) -> Iterator[tuple[str, Row]]:
    """Yields the rows and takes their sizes from the budget. A row that is nested too deep becomes an error."""
    for origin, row in rows:
        try:
            size = 0 if isinstance(row, DataError) else size_of(row)
        except ValueError as error:
            row, size = DataError(f"{origin}: {error}"), 0
        if budget:
            budget.take(size)
        yield origin, row


def _text_rows(path: Path, name: str, max_unpacked_gib: float) -> Iterator[tuple[str, Row]]:
    try:
        raw = io.BufferedReader(_Unpacked(path, max_unpacked_gib), 2**16) if name.endswith(".gz") else open(path, "rb")
        # "utf-8-sig" drops the byte-order mark of spreadsheets, which would become part of the first column's name.
        with io.TextIOWrapper(raw, encoding="utf-8-sig", newline="" if name.endswith(".csv") else None) as file:
            if name.endswith(".csv"):
                yield from _csv_rows(read_lines(file, path), path)
            elif ".jsonl" in name:
                yield from json_lines(read_lines(file, path), path)
            else:
                yield from json_rows(file, path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert the file") from error
    except (OSError, EOFError, zlib.error) as error:  # a damaged gzip raises any of them
        raise DataError(f"{path}: cannot be read: {error_text(error, with_type=False)}") from error


def _parquet_rows(path: Path, budget: Budget) -> Iterator[tuple[str, Row]]:
    import pyarrow

    from rto_fast.data.parquet import parquet_rows

    try:
        for index, row in enumerate(parquet_rows(path, budget)):
            yield f"{path}[{index}]", without_filled_keys(row)
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason}); write the file again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error_text(error)}") from error
    except (ValueError, OverflowError, MemoryError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: not a readable parquet file: {error_text(error)}") from error


def without_filled_keys(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a columnar file without the keys that have no value: all dicts of a column have the same keys there."""
    return {column: _without_nulls(value) for column, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _csv_rows(lines: Iterable[str], path: Path) -> Iterator[tuple[str, Row]]:
    header: list[str] = []
    start, length = 1, 0

    def lines_of_a_row() -> Iterator[str]:
        """The lines of a row, which may be the rest of the file where a quotation mark is missing."""
        nonlocal length
        for line in lines:
            length += len(line)
            if length > LONGEST_ROW:
                raise DataError(f"{path}:{start}: a row of {LONGEST_ROW:,} characters or more; see its quotation marks")
            yield line

    csv.field_size_limit(LONGEST_ROW)  # a field may hold a whole conversation
    reader = csv.reader(lines_of_a_row(), strict=True)
    try:
        for fields in reader:
            origin, start, length = f"{path}:{start}", reader.line_num + 1, 0
            if not header:
                header = fields
            elif len(fields) == len(header):
                yield origin, dict(zip(header, fields, strict=True))
            elif fields:  # a blank line has none
                yield origin, DataError(f"{origin}: the row does not have the {len(header)} fields of the header")
    except csv.Error as error:
        raise DataError(f"{path}:{start}: malformed csv: {error}") from None
