"""Rows of local files, one by one: json, jsonl, csv, gzipped or not, and parquet.

In the place of a row that cannot be read by itself, such as a malformed line of JSON, stands a `DataError`; what makes
the rest of a file unreadable is raised.

What unpacks is bounded, since a small file can hold terabytes of zeros; so is the length of a line.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rto_fast.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".csv")
Row = dict[str, Any] | DataError
_LONGEST_LINE = 2**26  # characters; one row is far shorter


class _Unpacked(io.RawIOBase):
    """The content of a gzip file, up to a size."""

    def __init__(self, path, gib):
        self.file, self.path, self.gib, self.left = gzip.open(path), path, gib, gib * 2**30

    def readable(self):
        return True

    def readinto(self, buffer):
        size = self.file.readinto(buffer)
        self.left -= size
        _check_left(self.left, self.path, self.gib)
        return size

    def close(self):
        self.file.close()
        super().close()


def _check_left(left, path, gib):
    if left < 0:
        raise DataError(f"{path}: unpacks to more than {gib:g} GiB; raise data.max_unpacked_gib if that is meant")


def rows_of_file(path: Path, max_unpacked_gib: float) -> Iterator[tuple[str, Row]]:
    """Iterate over (origin, row) of one local file; of a row that cannot be read, the error."""
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise DataError(f"{path}: unknown kind of file; expected {', '.join(SUFFIXES)}")
    return _rows(path, name, max_unpacked_gib)


def _rows(path, name, max_unpacked_gib):
    try:
        if name.endswith(".parquet"):
            yield from _parquet_rows(path, max_unpacked_gib)
            return
        raw = io.BufferedReader(_Unpacked(path, max_unpacked_gib), 2**16) if name.endswith(".gz") else open(path, "rb")
        # utf-8-sig: spreadsheets write a byte-order mark, which would become part of the first column's name
        with io.TextIOWrapper(raw, encoding="utf-8-sig", newline="" if name.endswith(".csv") else None) as file:
            if name.endswith(".csv"):
                yield from _csv_rows(_lines(file, path), path)
            elif ".jsonl" in name:
                yield from _json_lines(_lines(file, path), path)
            else:
                yield from _json_rows(file.read(), path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert the file") from error
    except (OSError, EOFError, zlib.error) as error:  # a damaged gzip raises any of them
        raise DataError(f"{path}: cannot be read: {error}") from error
    except ValueError as error:
        if isinstance(error, DataError) or not name.endswith(".parquet"):
            raise
        raise DataError(f"{path}: not a readable parquet file: {error}") from error  # pyarrow.ArrowInvalid


def _parquet_rows(path, max_unpacked_gib):
    import pyarrow.parquet

    index, left = 0, max_unpacked_gib * 2**30
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256):
        left -= batch.nbytes
        _check_left(left, path, max_unpacked_gib)
        for row in batch.to_pylist():
            yield f"{path}[{index}]", without_filled_keys(row)
            index += 1


def without_filled_keys(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a columnar file, whose dicts within a column have each other's keys too, without a value: those go."""
    return {column: _without_nulls(value) for column, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _lines(file, path):
    number = 0
    while line := file.readline(_LONGEST_LINE):
        number += 1
        if len(line) == _LONGEST_LINE:
            raise DataError(f"{path}:{number}: a line of {len(line):,} characters or more; write one row a line")
        yield line


def _json(text: str, where: str | Path) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise DataError(f"{where}: JSON that cannot be read: {error}") from None


def _json_lines(lines: Iterable[str], path: Path) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"{path}:{number}", _json_line(line.strip(), f"{path}:{number}")


def _json_line(line: str, origin: str) -> Row:
    try:
        return _object(_json(line, origin), origin)
    except json.JSONDecodeError as error:
        return DataError(f"{origin}: malformed JSON: {error.msg} at column {error.colno}: {line[:60]!r}")
    except DataError as error:
        return error


def _json_rows(text: str, path: Path) -> Iterator[tuple[str, Row]]:
    """A list of objects; or, as often under this suffix, one object a line."""
    try:
        rows = _json(text, path)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("{"):
            yield from _json_lines(text.split("\n"), path)  # splitlines() would also split at U+2028
            return
        raise DataError(f"{path}:{error.lineno}: malformed JSON: {error.msg} at column {error.colno}") from None
    for index, row in enumerate(rows if isinstance(rows, list) else [rows]):
        yield f"{path}[{index}]", _object(row, f"{path}[{index}]")


def _object(row: Any, origin: str) -> Row:
    if isinstance(row, dict):
        return row
    return DataError(f"{origin}: expected a JSON object with columns, found {type(row).__name__}")


def _csv_rows(lines: Iterable[str], path: Path) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(_LONGEST_LINE)  # a whole conversation may stand in one field
    reader = csv.reader(lines, strict=True)
    header, start = [], 1
    try:
        for fields in reader:
            origin, start = f"{path}:{start}", reader.line_num + 1
            if not header:
                header = fields
            elif len(fields) == len(header):
                yield origin, dict(zip(header, fields, strict=True))
            elif fields:  # a blank line has none
                yield origin, DataError(f"{origin}: the row does not have the {len(header)} fields of the header")
    except csv.Error as error:
        raise DataError(f"{path}:{start}: malformed csv: {error}") from None
