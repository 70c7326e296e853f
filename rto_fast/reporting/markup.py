"""Text as HTML. All text that comes from a model, a data set or a folder's name is escaped here."""

import html
import math
from collections.abc import Collection, Sequence

from rto_fast.data.messages import message_text
from rto_fast.system.terminal import visible


def brief(text: object, length: int = 34) -> str:
    """A name on one line of at most `length` characters; the middle of a longer one is left out."""
    text = visible(text).replace("\n", " ").replace("\t", " ")
    half = (length - 1) // 2
    return text if len(text) <= length else f"{text[:half]}…{text[-half:]}"


def escape(text: object) -> str:
    """`visible` text that is safe as an element's content and within a quoted attribute."""
    return html.escape(visible(text), quote=True)


def conversation(prompt: object) -> str:
    """A prompt as text. Of a list of messages each begins with its role."""
    if isinstance(prompt, (list, tuple)):
        turns = [turn if isinstance(turn, dict) else {"content": turn} for turn in prompt]
        return "\n".join(f"{turn.get('role', '')}: {message_text(turn)}" for turn in turns)
    return str(prompt)


def show(value: object) -> str:
    """A number as tables and tooltips show it; "–" where there is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "–" if value is None else str(value)
    if not math.isfinite(value):
        return "–"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{value:,.0f}".replace("-", "\u2212")
    digits = f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3f}" if abs(value) >= 0.01 else f"{value:.2g}"
    return digits.replace("-", "\u2212")


def signed(value: object) -> str:
    """`show`, with a + in front of a positive number."""
    return ("+" if isinstance(value, (int, float)) and value > 0 else "") + show(value)


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], names: int = 1, best: Collection[tuple[int, int]] = ()
) -> str:
    """A table in HTML.

    Args:
        header: the columns' titles.
        rows: the cells.
        names: how many of the first columns are text.
        best: (row, column) of the cells that are set in bold.
    """
    head = "".join(f"<th{_name(i < names)}>{escape(cell)}</th>" for i, cell in enumerate(header))
    body = "".join(
        "<tr>"
        + "".join(f"<td{_name(i < names, (number, i) in best)}>{escape(cell)}</td>" for i, cell in enumerate(row))
        + "</tr>"
        for number, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _name(is_name: bool, is_best: bool = False) -> str:
    classes = " ".join(["name"] * is_name + ["best"] * is_best)
    return f' class="{classes}"' if classes else ""
