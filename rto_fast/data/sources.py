"""Examples from files, folders, the package and the Hugging Face hub. The layouts are in `rto_fast.data.layouts`.

| source                          | read as                                                                         |
|---------------------------------|---------------------------------------------------------------------------------|
| x.jsonl, x.json (also .gz)      | one object a line; .json may also be one list of objects                        |
| x.parquet, x.csv                | columns; a csv has a header line                                                |
| folder                          | all such files below it, by name; or what `datasets` wrote with `save_to_disk`  |
| embedded:NAME                   | NAME.jsonl.gz in the package                                                    |
| org/name, org/name:config       | `datasets.load_dataset`                                                         |

`split` is a name and perhaps a range of rows: `train`, `test[:500]`, `train[90%:]`. In a folder, a split's files carry
its name as a word (`test.jsonl`, `train-00000-of-00002.parquet`); files without any split's name are `train`. A single
file is `train`.
"""

import csv
import gzip
import json
import re
import warnings
from importlib.resources import files
from itertools import islice
from pathlib import Path

from rto_fast.data.layouts import DataError, Example, check_columns, detect_layout, to_example

__all__ = ["DataError", "Example", "load_examples", "read_rows"]

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".csv")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?")
_SPLIT = re.compile(r"([\w.-]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")
_SPLIT_WORDS = ("train", "test", "validation", "valid", "val", "dev", "eval")


def load_examples(source, *, split="train", columns=None, limit=None, invalid="error") -> list[Example]:
    """The examples of a source (see the module's table), at most `limit`.

    columns: {ours: theirs} for layouts that are not detected, ours being prompt, response, chosen, rejected, messages.
    invalid: "error" raises `DataError` at the first row that is unusable (empty or missing response, wrong type, ...),
        "skip" leaves such rows out and warns once with their number and the first reason.
    Raises DataError: one line that names the file and line (or row) and the remedy.
    """
    if invalid not in ("error", "skip"):
        raise DataError(f"invalid: {invalid!r} is not 'error' or 'skip'")
    check_columns(columns)
    examples, skipped, layout = [], [], None
    for origin, row in read_rows(source, split):
        if len(examples) == limit:
            break
        layout = layout or detect_layout(row, columns, origin)
        try:
            examples.append(to_example(row, layout, origin, columns))
        except DataError as error:
            if invalid == "error":
                raise
            skipped.append(error)
    if skipped:
        warnings.warn(f"{source}: {len(skipped)} unusable rows skipped, the first: {skipped[0]}", stacklevel=2)
    if not examples:
        raise DataError(f"{source}: no examples in split {split!r}{' (limit 0)' if limit == 0 else ''}")
    return examples


def read_rows(source, split="train"):
    """Iterate over (origin, row) of a source's split, row being a dict as it stands in the file."""
    source = str(source)
    match = _SPLIT.fullmatch(split)
    if not match:
        raise DataError(f"split: {split!r} is not like 'train', 'test[:500]' or 'train[90%:]'")
    name, *bounds = match.groups()
    path = Path(source).expanduser()
    if source.startswith("embedded:"):
        path = _embedded(source.removeprefix("embedded:"))
    if path.is_dir():
        saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
        rows = _saved_rows(path, name) if saved else [row for file in _split_files(path, name) for row in _read(file)]
    elif path.is_file():
        if name != "train":
            raise DataError(f"{source}: a single file is split 'train', not {name!r}; ranges work: train[90%:]")
        rows = _read(path)
    elif _looks_like_path(source):
        raise DataError(f"{source}: no such file or folder (from {Path.cwd()}); hub data sets are named org/name")
    else:
        rows = _hub_rows(source, name)
    start, stop = (_position(bound, len(rows), default) for bound, default in zip(bounds, (0, len(rows)), strict=True))
    return islice(rows, start, max(start, stop))


def _position(bound, total, default):
    if bound is None:
        return default
    position = round(int(bound[:-1]) * total / 100) if bound.endswith("%") else int(bound)
    return min(max(position + (total if position < 0 else 0), 0), total)


def _looks_like_path(source):
    """Anything that is not plainly org/name[:config]; data/x next to an existing folder data is a path as well."""
    return (
        not _HUB_NAME.fullmatch(source) or source.lower().endswith(SUFFIXES) or Path(source.partition("/")[0]).is_dir()
    )


def _embedded(name):
    folder = files("rto_fast.data") / "embedded"
    path = Path(str(folder / f"{name}.jsonl.gz"))
    if not path.is_file():
        known = sorted(entry.name.removesuffix(".jsonl.gz") for entry in Path(str(folder)).glob("*.jsonl.gz"))
        raise DataError(f"embedded:{name}: not in this package; there are {', '.join(known) or 'none'}")
    return path


def _split_files(folder, split):
    """A folder's data files whose relative name has the split as a word; for train also those that name no split."""
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.name.lower().endswith(SUFFIXES)
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not path.name.startswith("dataset_info")
    )

    def names(path, word):  # train_prefs is a split of its own, train_0 is not
        return re.search(rf"(?<![A-Za-z]){re.escape(word)}(?![A-Za-z]|_[A-Za-z])", str(path.relative_to(folder)))

    chosen = [path for path in found if names(path, split)]
    if not chosen and split == "train":
        chosen = [path for path in found if not any(names(path, word) for word in _SPLIT_WORDS)]
    if not chosen:
        listing = ", ".join(path.name for path in found[:8]) or f"none that ends in {', '.join(SUFFIXES)}"
        raise DataError(f"{folder}: no data files for split {split!r}; found {listing}")
    return chosen


def _read(path):
    """All (origin, row) of one local file."""
    name = path.name.lower()
    try:
        if name.endswith(".parquet"):
            import pyarrow.parquet

            return [(f"{path}[{i}]", row) for i, row in enumerate(pyarrow.parquet.read_table(path).to_pylist())]
        if not name.endswith(SUFFIXES):
            raise DataError(f"{path}: unknown kind of file; expected {', '.join(SUFFIXES)}")
        # utf-8-sig: spreadsheets write a byte-order mark, which would become part of the first column's name
        opener = gzip.open if name.endswith(".gz") else open
        with opener(path, "rt", encoding="utf-8-sig", newline="" if name.endswith(".csv") else None) as file:
            if name.endswith(".csv"):
                return _csv_rows(file, path)
            if ".jsonl" in name:
                return _json_lines(file, path)
            return _json_rows(file.read(), path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert the file") from error
    except (OSError, EOFError) as error:  # a damaged gzip raises either
        raise DataError(f"{path}: cannot be read: {error}") from error
    except ValueError as error:
        if isinstance(error, DataError) or not name.endswith(".parquet"):
            raise
        raise DataError(f"{path}: not a readable parquet file: {error}") from error  # pyarrow.ArrowInvalid


def _json_lines(lines, path):
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line.strip())
            except json.JSONDecodeError as error:
                where = f"{error.msg} at column {error.colno}: {line.strip()[:60]!r}"
                raise DataError(f"{path}:{number}: malformed JSON: {where}") from None
            rows.append((f"{path}:{number}", _object(row, f"{path}:{number}")))
    return rows


def _json_rows(text, path):
    """A list of objects; or, as often under this suffix, one object a line."""
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("{"):
            return _json_lines(text.split("\n"), path)  # splitlines() would also split at U+2028
        raise DataError(f"{path}:{error.lineno}: malformed JSON: {error.msg} at column {error.colno}") from None
    rows = rows if isinstance(rows, list) else [rows]
    return [(f"{path}[{i}]", _object(row, f"{path}[{i}]")) for i, row in enumerate(rows)]


def _object(row, origin):
    if not isinstance(row, dict):
        raise DataError(f"{origin}: expected a JSON object with columns, found {type(row).__name__}")
    return row


def _csv_rows(file, path):
    reader, rows, start = csv.DictReader(file, strict=True), [], 2
    try:
        for row in reader:
            origin, start = f"{path}:{start}", reader.line_num + 1
            if None in row or None in row.values():
                raise DataError(f"{origin}: the row does not have the {len(reader.fieldnames)} fields of the header")
            rows.append((origin, row))
    except csv.Error as error:
        raise DataError(f"{path}:{start}: malformed csv: {error}") from None
    return rows


class _DatasetRows:
    """(origin, row) of a `datasets.Dataset`, which stays on disk."""

    def __init__(self, dataset, name):
        self.dataset, self.name = dataset, name

    def __len__(self):
        return len(self.dataset)

    def __iter__(self):
        return ((f"{self.name}[{i}]", row) for i, row in enumerate(self.dataset))


def _saved_rows(folder, split):
    from datasets import DatasetDict, load_from_disk

    dataset = load_from_disk(str(folder))
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise DataError(f"{folder}: no split {split!r}; there are {', '.join(dataset)}")
        dataset = dataset[split]
    elif split != "train":
        raise DataError(f"{folder}: a single saved data set is split 'train', not {split!r}; ranges work: train[90%:]")
    return _DatasetRows(dataset, str(folder))


def _hub_rows(source, split):
    import datasets

    name, _, config = source.partition(":")
    try:
        dataset = datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"{source}: no such local file or folder, and the hub did not give split {split!r}: {reason}"
        ) from error
    return _DatasetRows(dataset, source)
