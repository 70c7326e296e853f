"""Rows of local files, one by one: json, jsonl, csv, gzipped or not, and parquet.

What unpacks is bounded, since a small file can hold terabytes of zeros; so is the length of a line.
"""

import csv
import gzip
import io
import json
import zlib

from rto_fast.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".csv")
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


def rows_of_file(path, max_unpacked_gib):
    """Iterate over (origin, row) of one local file."""
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
            yield f"{path}[{index}]", row
            index += 1


def _lines(file, path):
    number = 0
    while line := file.readline(_LONGEST_LINE):
        number += 1
        if len(line) == _LONGEST_LINE:
            raise DataError(f"{path}:{number}: a line of {len(line):,} characters or more; write one row a line")
        yield line


def _json(text, where):
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise DataError(f"{where}: JSON that cannot be read: {error}") from None


def _json_lines(lines, path):
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = _json(line.strip(), f"{path}:{number}")
            except json.JSONDecodeError as error:
                where = f"{error.msg} at column {error.colno}: {line.strip()[:60]!r}"
                raise DataError(f"{path}:{number}: malformed JSON: {where}") from None
            yield f"{path}:{number}", _object(row, f"{path}:{number}")


def _json_rows(text, path):
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


def _object(row, origin):
    if not isinstance(row, dict):
        raise DataError(f"{origin}: expected a JSON object with columns, found {type(row).__name__}")
    return row


def _csv_rows(lines, path):
    reader, start = csv.DictReader(lines, strict=True), 2
    try:
        for row in reader:
            origin, start = f"{path}:{start}", reader.line_num + 1
            if None in row or None in row.values():
                fields = len(reader.fieldnames or ())
                raise DataError(f"{origin}: the row does not have the {fields} fields of the header")
            yield origin, row
    except csv.Error as error:
        raise DataError(f"{path}:{start}: malformed csv: {error}") from None
