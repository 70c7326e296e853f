"""Reads the rows of local files one by one: json, jsonl and csv, gzipped or not, and parquet.

A row that cannot be read, such as a malformed line of JSON, is a `DataError` in the place of the row. An error that makes
the rest of a file unreadable is raised.

A small packed file can hold terabytes. So its size is bounded before it is unpacked, the sizes of the rows' objects are
added up as they are made, and no file is read as a whole.
"""

import csv
import gzip
import io
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rto_fast.data.budget import Budget, size_of
from rto_fast.data.json_rows import LONGEST_ROW, Row, json_lines, json_rows, read_lines
from rto_fast.errors import DataError, error_text

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".csv")


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
