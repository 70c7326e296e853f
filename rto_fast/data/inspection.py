"""The text that `python -m rto_fast.data` prints: columns, lengths and examples.

Data may hold control characters. `say` spells them out in plain text; in `Styled` text they are spelled out here.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from rto_fast.data.layouts import Example
from rto_fast.data.messages import message_text, response_text
from rto_fast.system.terminal import one_line, styled, visible

HEAD, TAIL = 400, 300  # characters shown of a longer text
BAR = 16  # characters
STYLES = {"loss": "32", "other": "36", "context": "2", "title": "1"}


class Page:
    """Text with styles: ANSI colours where `colour` is true, else ⟦…⟧ around the text that is trained on."""

    def __init__(self, colour: bool):
        self.colour = colour

    def paint(self, text: str, style: str) -> str:
        if self.colour and text:
            return styled(text, STYLES[style])
        return f"⟦{text}⟧" if style in ("loss", "other") else text

    def title(self, text: str) -> str:
        return self.paint(text, "title")


def elided(text: str) -> str:
    """The beginning and the end of a long text."""
    left_out = len(text) - HEAD - TAIL
    return text if left_out <= 0 else f"{text[:HEAD]} [… {left_out:,} characters …] {text[-TAIL:]}"


SOURCES = {
    "UltraFeedback": {"prompt": "chosen, without its last message"},
    "implicit prompt": {"prompt": "the beginning that chosen and rejected share"},
    "HH transcript": {"prompt": "chosen, without its last turn"},
    "messages": {"prompt": "messages, without the last if it is the assistant's", "response": "messages, the last"},
}


def columns_table(layout: str, row: Mapping[str, Any], columns: Mapping[str, str], example: Example) -> list[str]:
    """Lines with our names, the column that each comes from and its size in `example`; then the remaining columns.

    Args:
        layout: the layout that was detected.
        row: the row of `example`.
        columns: the user's mapping, {ours: theirs}.
        example: the example.
    """
    lines = []
    for ours in ("prompt", "response", "chosen", "rejected"):
        value = getattr(example, ours)
        if value is None:
            continue
        natural = "completion" if ours == "response" and row.get("response") is None else ours
        theirs = SOURCES.get(layout, {}).get(ours) or columns.get(ours, natural)
        is_chat = isinstance(value, tuple)
        size, unit = (len(value), "message") if is_chat else (len(response_text(value).split()), "word")
        kind = f"{size:,} {unit}{'s' * (size != 1)}"
        lines.append(f"  {ours:<9} ← {one_line(theirs)}   ({kind} in the first example)")
    if example.tools:
        theirs = one_line(columns.get("tools", "tools"))
        lines.append(f"  tools     ← {theirs}   ({len(example.tools):,} in the first example)")
    if example.extra:
        lines.append(f"  for reward functions: {one_line(', '.join(map(str, example.extra)))}")
    return lines


def histogram(lengths: Mapping[str, Sequence[int]], limits: Mapping[str, int] | None = None) -> list[str]:
    """Lines of a table with a column of bars for each name.

    Args:
        lengths: {name: lengths}.
        limits: {name: longest length that is kept}.
    """
    longest = max((max(values, default=0) for values in lengths.values()), default=0)
    edges = [0, 8]
    while edges[-1] <= longest:
        edges.append(edges[-1] * 2)
    counts = {name: [sum(a <= v < b for v in values) for a, b in pairwise(edges)] for name, values in lengths.items()}
    most = max((max(row) for row in counts.values()), default=0)
    width = BAR + 8
    lines = [" " * 15 + "".join(f"{name:<{width}}" for name in lengths).rstrip()]
    for index, (low, high) in enumerate(pairwise(edges)):
        if not any(sum(row[: index + 1]) for row in counts.values()):
            continue  # all lengths are greater
        cells = (_bar(row[index], most).ljust(width) for row in counts.values())
        lines.append((f"  {low:>5,}–{high - 1:<6,} " + "".join(cells)).rstrip())
    for name, share in (("median", 0.5), ("95 %", 0.95), ("longest", 1.0)):
        cells = (f"{_quantile(values, share):,}".ljust(width) for values in lengths.values())
        lines.append(f"  {name:<14}" + "".join(cells).rstrip())
    if limits:
        cells = (f"{limits[n]:,} ({sum(v > limits[n] for v in lengths[n]):,} over)" for n in lengths)
        lines.append("  limit         " + "".join(cell.ljust(width) for cell in cells).rstrip())
    return lines


def _bar(count: int, most: int) -> str:
    return f"{'█' * (-(-BAR * count // most))} {count:,}" if count else ""


def _quantile(values: Sequence[int], share: float) -> int:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)] if values else 0


def as_roles(page: Page, example: Example) -> list[str]:
    """Lines of an example without a tokenizer: the roles and their text."""
    prompt = example.prompt
    turns = [(m["role"], message_text(m)) for m in prompt] if isinstance(prompt, tuple) else [("prompt", prompt)]
    lines = [page.paint(f"{role}: {elided(visible(text))}", "context") for role, text in turns]
    for name in ("response", "chosen", "rejected"):
        response = getattr(example, name)
        if response is not None:
            style = "other" if name == "rejected" else "loss"
            lines.append(f"{name}: " + page.paint(elided(visible(response_text(response).strip())), style))
    return lines


def as_tokens(
    page: Page,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    responses: Mapping[str, list[int]],
    stop_ids: Sequence[int],
) -> list[str]:
    """Lines of an example as the model sees it.

    Args:
        page: styles the text.
        tokenizer: decodes the ids.
        prompt_ids: the prompt.
        responses: {name: ids} of the responses, which are trained on.
        stop_ids: the ids that end a response.
    """

    def text(ids: list[int]) -> str:
        return elided(visible(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)))

    lines = [page.paint(text(prompt_ids), "context")]
    for name, ids in responses.items():
        end = "" if ids[-1] in stop_ids else " (cut: no end token)"
        style = "other" if name == "rejected" else "loss"
        lines.append(f"{name}, {len(ids):,} tokens{end}: " + page.paint(text(ids), style))
    return lines
