"""Warnings about the rows, of one line each, that users should see before they train."""

from collections import Counter
from collections.abc import Iterator, Sequence

from rto_fast.data.encoding import ConversationEncoder, Row
from rto_fast.data.layouts import Example
from rto_fast.data.messages import as_messages
from rto_fast.data.recognition import looks_rendered

_SHOWN = 60  # characters of a prompt


def notes(
    source: str, encoder: ConversationEncoder, rows: Sequence[Row], examples: Sequence[Example]
) -> Iterator[tuple[str, str]]:
    """Yields the kind and the text of each warning. A kind need not be shown twice.

    Args:
        source: the name of the rows' file.
        encoder: the encoder that read the rows.
        rows: the rows.
        examples: the example of each row.
    """
    ignored = Counter(key for row in rows for key in row.ignored)
    if ignored:
        keys = ", ".join(f"{key} ({count:,} rows)" for key, count in sorted(ignored.items()))
        yield f"{source} ignored", f"{source}: the chat template (or data.prompt_format) leaves out {keys}"

    pairs = list(zip(rows, examples, strict=True))
    templated = [example for row, example in pairs if row.format == "templated"]
    if templated:
        yield (
            f"{source} templated",
            f"{source}: {len(templated):,} prompts are chat-templated already and used as they are, special tokens "
            f"included, the first {templated[0].origin}: {_begins(templated[0])}; data.prompt_format chat makes them a "
            "user's message",
        )
    if encoder.prompt_format == "auto":
        inside = [example for row, example in pairs if row.format == "chat" and looks_rendered(_first_text(example))]
        if inside:
            yield (
                f"{source} inside",
                f"{source}: {len(inside):,} prompts hold text that some chat template has rendered, and this one renders "
                f"it once more, the first {inside[0].origin}: {_begins(inside[0])}; give messages, or plain text",
            )
    spelled = [example for row, example in pairs if row.hidden]
    if spelled:
        yield (
            f"{source} spelled",
            f"{source}: special tokens that stand in the text of {len(spelled):,} rows stay text, the first "
            f"{spelled[0].origin}",
        )
    chat = any(row.format == "chat" for row in rows)
    if chat and encoder.thinking and (opening := encoder.template.opening_left_out(encoder.thinking)):
        yield (
            "opening",
            f"the chat template's generation prompt opens a thought ({opening!r}), responses of the data begin without "
            "one, or write it otherwise: prompts end before it (data.thinking)",
        )


def _first_text(example: Example) -> str:
    content = as_messages(example.prompt)[0]["content"]
    return content if isinstance(content, str) else ""


def _begins(example: Example) -> str:
    return repr(_first_text(example)[:_SHOWN])
