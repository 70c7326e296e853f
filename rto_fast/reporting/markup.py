"""Text from data as HTML. Everything a model, a data set or a folder's name put into the page goes through here."""

import html
import math

from rto_fast.data.messages import message_text
from rto_fast.system.terminal import visible


def brief(text, length=34):
    """A name on one line, its middle left out if it is long."""
    text = visible(text).replace("\n", " ").replace("\t", " ")
    half = (length - 1) // 2
    return text if len(text) <= length else f"{text[:half]}…{text[-half:]}"


def escape(text):
    """`visible` text, safe as an element's content and within a quoted attribute."""
    return html.escape(visible(text), quote=True)


def conversation(prompt):
    """A prompt as text: messages one after another, behind their roles."""
    if isinstance(prompt, (list, tuple)):
        turns = [turn if isinstance(turn, dict) else {"content": turn} for turn in prompt]
        return "\n".join(f"{turn.get('role', '')}: {message_text(turn)}" for turn in turns)
    return str(prompt)


def show(value):
    """A number for a table or a tooltip."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "–" if value is None else str(value)
    if not math.isfinite(value):
        return "–"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{value:,.0f}".replace("-", "\u2212")
    digits = f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3f}" if abs(value) >= 0.01 else f"{value:.2g}"
    return digits.replace("-", "\u2212")


def signed(value):
    return ("+" if isinstance(value, (int, float)) and value > 0 else "") + show(value)


def table(header, rows, names=1, best=None):
    """A table; the first `names` columns are text. best: (row, column) pairs set in bold."""
    best = best or set()
    head = "".join(f"<th{_name(i < names)}>{escape(cell)}</th>" for i, cell in enumerate(header))
    body = "".join(
        "<tr>"
        + "".join(f"<td{_name(i < names, (number, i) in best)}>{escape(cell)}</td>" for i, cell in enumerate(row))
        + "</tr>"
        for number, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _name(is_name, is_best=False):
    classes = " ".join(["name"] * is_name + ["best"] * is_best)
    return f' class="{classes}"' if classes else ""
