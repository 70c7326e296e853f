"""Loads examples from files, folders, the package and the Hugging Face hub. `rto_fast.data.layouts` has the layouts.

| source                          | read as                                                                         |
|---------------------------------|---------------------------------------------------------------------------------|
| x.jsonl, x.json (also .gz)      | one object a line; .json may also be one list of objects                        |
| x.parquet, x.csv                | columns; a csv has a header line                                                |
| folder                          | all such files below it, by name; or what `datasets` wrote with `save_to_disk`  |
| embedded:NAME                   | NAME.jsonl.gz in the package                                                    |
| org/name, org/name:config       | `datasets.load_dataset`                                                         |

`split` is a name, which a range of rows may follow: `train`, `test[:500]`, `train[90%:]`. In a folder the files of a split
have its name as a word (`test.jsonl`, `train-00000-of-00002.parquet`). Files without the name of a split are `train`, and so
is a single file.

Rows are read one by one. The layout is found from the first 1,000 rows. Beyond them, a limit, or a range that ends early,
leaves the rest of a local file unread. A data set of the hub is downloaded as a whole, unless it is streamed.

A row that cannot be used is an error, or is left out and counted: a missing or empty value, a wrong type, another layout
than most rows have, a malformed line of JSON, a csv row with too many fields. A file that breaks off, or is not text, is
always an error, because its other rows are unknown.
"""

import contextlib
import re
import sys
from collections.abc import Iterable, Iterator, Sized
from importlib.resources import files
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from rto_fast.data.budget import Budget, check_arrow_files
from rto_fast.data.files import SUFFIXES, Row, counted, rows_of_file, without_filled_keys
from rto_fast.data.layouts import ROLES, Example, check_columns, find_layout, role_values, to_example
from rto_fast.errors import DataError, error_text
from rto_fast.system.notices import notify
from rto_fast.system.progress import advance

if TYPE_CHECKING:
    from datasets import Dataset

WINDOW = 1000  # rows from which the layout is found
OBJECTS_PER_BYTE = 16  # the most bytes of Python objects for a byte of a saved data set that is not packed
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?")
_SPLIT = re.compile(r"([\w.-]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")
_SPLIT_WORDS = ("train", "test", "validation", "valid", "val", "dev", "eval")


def load_examples(
    source: str | Path,
    *,
    split: str = "train",
    columns: dict[str, str] | None = None,
    limit: int | None = None,
    invalid: str = "error",
    streaming: bool = False,
    max_unpacked_gib: float = 4.0,
    demonstrations: bool = False,
) -> list[Example]:
    """The examples of a source (see the module's table).

    Args:
        source, split, columns, streaming, max_unpacked_gib: as in `open_examples`.
        limit: the most examples, None for all.
        invalid: "error" raises `DataError` at the first row that is unusable. "skip" leaves such rows out, and one warning
            gives their number and the first reason.
        demonstrations: whether a row without a response is unusable.
    Raises:
        DataError: names the file, the line (or row) and the remedy.
    """
    if invalid not in ("error", "skip"):
        raise DataError(f"invalid: {invalid!r} is not 'error' or 'skip'")
    if limit == 0:
        raise DataError(f"{source}: no examples in split {split!r} (limit 0)")
    layout, rows = open_examples(
        source, split=split, columns=columns, streaming=streaming, max_unpacked_gib=max_unpacked_gib
    )
    examples: list[Example] = []
    unread: list[str] = []
    skipped, first_error = 0, None
    for row, example in rows:
        advance()
        if demonstrations and isinstance(example, Example) and (example.response or example.chosen) is None:
            example = DataError(
                f"{example.origin}: no response or chosen; this stage needs it: remove the row, or use other data"
            )
        if isinstance(example, DataError):
            if invalid == "error":
                raise example
            skipped, first_error = skipped + 1, first_error or example
            continue
        examples.append(example)
        if layout == "prompt only" and _has_response(row, columns, example.origin):
            unread.append(example.origin)
        if len(examples) == limit:
            break
    if unread:
        notify(
            "data",
            "unread_responses",
            f"{source}: the responses of {len(unread)} rows are not read, the first {unread[0]}: by the first "
            f"{WINDOW:,} rows the layout is prompt only",
        )
    if skipped:
        notify("data", "skipped_rows", f"{source}: {skipped} unusable rows skipped, the first: {first_error}")
    if not examples:
        raise DataError(f"{source}: no examples in split {split!r}: all its rows are unusable")
    return examples


def open_examples(
    source: str | Path,
    *,
    split: str = "train",
    columns: dict[str, str] | None = None,
    streaming: bool = False,
    max_unpacked_gib: float = 4.0,
) -> tuple[str, Iterator[tuple[dict, Example | DataError]]]:
    """Opens a source. The first `WINDOW` rows are read at once, the others when the iterator reaches them. No row is read
    twice, and an error past the first row is raised where the iterator reaches it.

    Args:
        source: a file, a folder or the name of a data set.
        split: its split, which a range of rows may follow.
        columns: {ours: theirs} for layouts that are not detected. Ours are prompt, response, chosen, rejected, messages.
        streaming: download only the rows of a hub data set that are read.
        max_unpacked_gib: the most GiB that the rows of a packed file (.gz, .parquet, a saved data set) may take.
    Returns:
        The layout, and an iterator over each row and its example, or the error why it has none.
    Raises:
        DataError: the source has no rows, or no known layout.
    """
    check_columns(columns)
    first, rows = _window(read_rows(source, split, streaming, max_unpacked_gib))
    if not first:
        raise DataError(f"{source}: no examples in split {split!r}: it is empty; give other data, or another split")
    layout = find_layout(first, columns)
    return layout, (_with_example(row, layout, origin, columns) for origin, row in chain(first, rows))


def _with_example(
    row: Row, layout: str, origin: str, columns: dict[str, str] | None
) -> tuple[dict, Example | DataError]:
    if isinstance(row, DataError):
        return {}, row
    try:
        return row, to_example(row, layout, origin, columns)
    except DataError as error:
        return row, error


def _has_response(row: dict, columns: dict[str, str] | None, origin: str) -> bool:
    values = role_values(row, columns or {}, origin)
    return any(values.get(name) for name in ROLES if name != "prompt")


def _window(rows: Iterator[tuple[str, Row]]) -> tuple[list[tuple[str, Row]], Iterator[tuple[str, Row]]]:
    """The first rows, and an iterator over the others. An error after at least one row is raised by the iterator."""
    first: list[tuple[str, Row]] = []
    try:
        for item in islice(rows, WINDOW):
            first.append(item)
    except DataError as error:
        if not first:
            raise
        return first, _raising(error)
    return first, rows


def _raising(error: DataError) -> Iterator[tuple[str, Row]]:
    raise error
    yield  # makes this a generator, which raises when it is asked for a row


def read_rows(
    source: str | Path, split: str = "train", streaming: bool = False, max_unpacked_gib: float = 4.0
) -> Iterator[tuple[str, Row]]:
    """Yields the origin and the row of each row of a source's split; the row as it stands in the file, or its error."""
    source = str(source)
    match = _SPLIT.fullmatch(split)
    if not match:
        raise DataError(f"split: {split!r} is not like 'train', 'test[:500]' or 'train[90%:]'")
    name, *bounds = match.groups()
    streamed = False
    path = Path(source).expanduser()
    if source.startswith("embedded:"):
        path = _embedded(source.removeprefix("embedded:"))
    if path.is_dir():
        saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
        found = [] if saved else _split_files(path, name)
        each = (rows_of_file(file, max_unpacked_gib) for file in found)
        rows = _saved_rows(path, name, max_unpacked_gib) if saved else chain.from_iterable(each)
    elif path.is_file():
        if name != "train":
            raise DataError(f"{source}: a single file is split 'train', not {name!r}; ranges work: train[90%:]")
        rows = rows_of_file(path, max_unpacked_gib)
    elif _looks_like_path(source):
        raise DataError(f"{source}: no such file or folder (from {Path.cwd()}); hub data sets are named org/name")
    else:
        rows = _hub_rows(source, name, streaming)
        streamed = streaming
    if any(bound and not bound.isdigit() for bound in bounds) and not isinstance(rows, Sized):
        if streamed:
            raise DataError(f"split: {split!r} needs the number of rows, which a stream does not tell; as in [:500]")
        rows = list(rows)
    total = len(rows) if isinstance(rows, Sized) else sys.maxsize
    start, stop = (_position(bound, total, default) for bound, default in zip(bounds, (0, total), strict=True))
    return islice(rows, start, max(start, stop))


def _position(bound: str | None, total: int, default: int) -> int:
    if bound is None:
        return default
    position = round(int(bound[:-1]) * total / 100) if bound.endswith("%") else int(bound)
    return min(max(position + (total if position < 0 else 0), 0), total)


def _looks_like_path(source: str) -> bool:
    """Whether a source is not org/name[:config]. Beside an existing folder `data`, data/x is a path as well."""
    return (
        not _HUB_NAME.fullmatch(source) or source.lower().endswith(SUFFIXES) or Path(source.partition("/")[0]).is_dir()
    )


def _embedded(name: str) -> Path:
    folder = files("rto_fast.data") / "embedded"
    path = Path(str(folder / f"{name}.jsonl.gz"))
    if not path.is_file():
        known = sorted(entry.name.removesuffix(".jsonl.gz") for entry in Path(str(folder)).glob("*.jsonl.gz"))
        raise DataError(f"embedded:{name}: not in this package; there are {', '.join(known) or 'none'}")
    return path


def _split_files(folder: Path, split: str) -> list[Path]:
    """The data files in a folder whose relative name has the split as a word; for train also those that name no split."""
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.name.lower().endswith(SUFFIXES)
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not path.name.startswith("dataset_info")
    )

    def names(path: Path, word: str) -> bool:  # train_prefs is another split than train, train_0 is not
        return None is not re.search(
            rf"(?<![A-Za-z]){re.escape(word)}(?![A-Za-z]|_[A-Za-z])", str(path.relative_to(folder))
        )

    chosen = [path for path in found if names(path, split)]
    if not chosen and split == "train":
        chosen = [path for path in found if not any(names(path, word) for word in _SPLIT_WORDS)]
    if not chosen:
        listing = ", ".join(path.name for path in found[:8]) or f"none that ends in {', '.join(SUFFIXES)}"
        raise DataError(f"{folder}: no data files for split {split!r}; found {listing}")
    return chosen


class _DatasetRows:
    """The origins and rows of a `datasets.Dataset`, which stays on disk. Their sizes are taken from `budget`."""

    def __init__(self, dataset: "Dataset", name: str, budget: Budget | None = None):
        self.dataset, self.name, self.budget = dataset, name, budget

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        rows = ((f"{self.name}[{i}]", without_filled_keys(row)) for i, row in enumerate(self.dataset))
        return counted(rows, self.budget)


def _saved_rows(folder: Path, split: str, max_unpacked_gib: float) -> _DatasetRows:
    from datasets import DatasetDict, load_from_disk

    size = sum(path.stat().st_size for path in folder.rglob("*.arrow"))
    budget = Budget(folder, max_unpacked_gib, OBJECTS_PER_BYTE * size)
    try:
        check_arrow_files(folder, Budget(folder, max_unpacked_gib))
        dataset = load_from_disk(str(folder))
    except DataError:
        raise
    except Exception as error:  # for a JSON file of another kind, or an unknown schema, `datasets` may raise anything
        raise DataError(
            f"{folder}: not a data set that can be read ({error_text(error, with_type=True)}); save it again "
            "with save_to_disk"
        ) from error
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise DataError(f"{folder}: no split {split!r}; there are {', '.join(dataset)}")
        dataset = dataset[split]
    elif split != "train":
        raise DataError(f"{folder}: a single saved data set is split 'train', not {split!r}; ranges work: train[90%:]")
    return _DatasetRows(dataset, str(folder), budget)


@contextlib.contextmanager
def _hub_errors(source: str, split: str) -> Iterator[None]:
    import datasets

    try:
        yield
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{source}: no such local file or folder, and the hub did not give split {split!r}: {error_text(error)}; "
            "check the name, the split and the network, or give a local copy"
        ) from error


def _hub_rows(source: str, split: str, streaming: bool) -> Iterator[tuple[str, Row]] | _DatasetRows:
    import datasets

    name, _, config = source.partition(":")
    with _hub_errors(source, split):
        dataset = datasets.load_dataset(name, config or None, split=split, **{"streaming": True} if streaming else {})
    return _streamed_rows(dataset, source, split) if streaming else _DatasetRows(dataset, source)


def _streamed_rows(dataset: Iterable[dict], source: str, split: str) -> Iterator[tuple[str, Row]]:
    with _hub_errors(source, split):  # the download happens here
        for index, row in enumerate(dataset):
            yield f"{source}[{index}]", without_filled_keys(row)
