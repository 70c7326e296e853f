"""What `python -m rto_fast.data` prints: columns, lengths and examples as text for a terminal.

Data is somebody else's text: what is not `Styled` by us has its control characters spelled out by `say`, and what is styled
has them before.
"""

from itertools import pairwise

from rto_fast.data.messages import message_text, response_text
from rto_fast.system.terminal import one_line, styled, visible

HEAD, TAIL = 400, 300  # characters shown of a longer text
BAR = 16  # characters
STYLES = {"loss": "32", "other": "36", "context": "2", "title": "1"}


class Page:
    """Text with styles: ANSI colours, or, where there are none, ⟦…⟧ around what is trained on."""

    def __init__(self, colour):
        self.colour = colour

    def paint(self, text, style):
        if self.colour and text:
            return styled(text, STYLES[style])
        return f"⟦{text}⟧" if style in ("loss", "other") else text

    def title(self, text):
        return self.paint(text, "title")


def elided(text):
    """The beginning and the end of a long text."""
    left_out = len(text) - HEAD - TAIL
    return text if left_out <= 0 else f"{text[:HEAD]} [… {left_out:,} characters …] {text[-TAIL:]}"


SOURCES = {
    "UltraFeedback": {"prompt": "chosen, without its last message"},
    "implicit prompt": {"prompt": "the beginning that chosen and rejected share"},
    "HH transcript": {"prompt": "chosen, without its last turn"},
    "messages": {"prompt": "messages, without the last if it is the assistant's", "response": "messages, the last"},
}


def columns_table(layout, row, columns, example):
    """Lines: our names, where each comes from, and what the example of `row` has there; then the columns that are left."""
    lines, taken = [], set()
    for ours in ("prompt", "response", "chosen", "rejected"):
        value = getattr(example, ours)
        if value is None:
            continue
        natural = "completion" if ours == "response" and row.get("response") is None else ours
        theirs = SOURCES.get(layout, {}).get(ours) or columns.get(ours, natural)
        taken.add(theirs)
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


def histogram(lengths, limits=None):
    """Lines of a table with a column of bars for each {name: lengths}. limits: {name: longest allowed}, marked by │."""
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
            continue  # nothing is as short as this
        cells = (_bar(row[index], most).ljust(width) for row in counts.values())
        lines.append((f"  {low:>5,}–{high - 1:<6,} " + "".join(cells)).rstrip())
    lines.append("  median        " + "".join(f"{_quantile(v, 0.5):,}".ljust(width) for v in lengths.values()).rstrip())
    lines.append(
        "  95 %          " + "".join(f"{_quantile(v, 0.95):,}".ljust(width) for v in lengths.values()).rstrip()
    )
    lines.append("  longest       " + "".join(f"{max(v, default=0):,}".ljust(width) for v in lengths.values()).rstrip())
    if limits:
        cells = (f"{limits[n]:,} ({sum(v > limits[n] for v in lengths[n]):,} over)" for n in lengths)
        lines.append("  limit         " + "".join(cell.ljust(width) for cell in cells).rstrip())
    return lines


def _bar(count, most):
    return f"{'█' * (-(-BAR * count // most))} {count:,}" if count else ""


def _quantile(values, share):
    return sorted(values)[min(int(share * len(values)), len(values) - 1)] if values else 0


def as_roles(page, example):
    """Lines of an example without a tokenizer: who says what."""
    prompt = example.prompt
    turns = [(m["role"], message_text(m)) for m in prompt] if isinstance(prompt, tuple) else [("prompt", prompt)]
    lines = [page.paint(f"{role}: {elided(visible(text))}", "context") for role, text in turns]
    for name in ("response", "chosen", "rejected"):
        response = getattr(example, name)
        if response is not None:
            style = "other" if name == "rejected" else "loss"
            lines.append(f"{name}: " + page.paint(elided(visible(response_text(response).strip())), style))
    return lines


def as_tokens(page, tokenizer, prompt_ids, responses, stop_ids):
    """Lines of an example as the model sees it. responses: {name: ids}; they are what is trained on."""

    def text(ids):
        return elided(visible(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)))

    lines = [page.paint(text(prompt_ids), "context")]
    for name, ids in responses.items():
        end = "" if ids[-1] in stop_ids else " (cut: no end token)"
        style = "other" if name == "rejected" else "loss"
        lines.append(f"{name}, {len(ids):,} tokens{end}: " + page.paint(text(ids), style))
    return lines
