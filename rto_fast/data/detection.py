"""Finds the layout of a source by a vote of its first rows."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rto_fast.data.layouts import PAIR_LAYOUTS, layout_of, listing, role_values
from rto_fast.errors import DataError

# Of layouts with equal votes the first one wins: first the prompt alone, which any row with a prompt has, then the layouts
# that use more of the columns.
LAYOUTS = ("prompt only", *PAIR_LAYOUTS, "messages", "prompt/response")


def find_layout(rows: Sequence[tuple[str, dict | DataError]], columns: Mapping[str, str] | None = None) -> str:
    """The name of the layout that most rows have (see the table of `rto_fast.data.layouts`).

    Empty text, and a value that is neither text nor messages, count as null: a row whose layout depends on one does not
    vote. Only where no row can vote do they count as values, and nulls as missing columns.

    Args:
        rows: the origin and the row of the first rows, or the error of a row that could not be read.
        columns: {our name: the rows' name}.
    Raises:
        DataError: no row has a known layout.
    """
    read, errors = [], []
    for origin, row in rows:
        try:
            if isinstance(row, DataError):
                raise row
            read.append((origin, row, role_values(row, columns or {}, origin)))
        except DataError as error:
            errors.append(error)
    if not read:
        raise errors[0]
    for strict in (True, False):
        votes = Counter(layout for _, _, values in read if (layout := _vote(values, strict)))
        if votes:
            return max(LAYOUTS, key=lambda layout: votes[layout])
    raise _unknown_layout(read)


def _vote(values: Mapping[str, Any], strict: bool) -> str | None:
    """The layout of a row. If `strict`, None where it depends on a null or on a value that counts as one."""
    held = {name: value for name, value in values.items() if (_is_usable(value) if strict else value is not None)}
    return layout_of(held, values.keys() - held.keys() if strict else ())


def _is_usable(value: Any) -> bool:
    """Whether a value is messages, or text that is not blank: a csv writes null as blank text."""
    if isinstance(value, str):
        return value != "" and not value.isspace()
    return isinstance(value, list) and value != [] and isinstance(value[0], dict)


def _unknown_layout(read: list[tuple[str, dict, dict]]) -> DataError:
    origin = read[0][0]
    names = dict.fromkeys(name for _, row, _ in read for name in row)
    filled = {name for _, row, _ in read for name, value in row.items() if value is not None}
    header = " (a csv begins with a line of their names)" if ".csv:" in origin else ""
    return DataError(
        f"{origin}: no known layout in columns {listing([n if n in filled else f'{n} (null)' for n in names])}{header}; "
        'map them with columns, such as columns={"prompt": "question", "chosen": "better", "rejected": "worse"}'
    )
