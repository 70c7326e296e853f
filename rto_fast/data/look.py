"""What `python -m rto_fast.data` says about a source: it loads through `RunData`, as a run does.

Data may hold control characters. `say` spells them out in plain text; in `Styled` text they are spelled out here.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from rto_fast.config import DataConfig
from rto_fast.data.cleaning import repeated_prompts
from rto_fast.data.layouts import Example
from rto_fast.data.messages import as_messages, message_text, response_text
from rto_fast.data.run_data import RunData, split_of_source
from rto_fast.data.sources import WINDOW, open_examples
from rto_fast.data.tokenizing import Limits, preference_pairs, prompts, sft_sequences, stop_token_ids
from rto_fast.errors import DataError
from rto_fast.system.terminal import Styled, one_line, styled, visible

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


UNLIMITED = Limits(2**40, 2**40)


class Kind(NamedTuple):
    """What a source holds."""

    field: str  # of `DataConfig`, which a run would name the source in
    examples: str  # attribute of `RunData`: the training examples
    items: str  # attribute of `RunData`: the same, tokenised
    held_out: str  # attribute of `RunData`: what is held out of them, tokenised; "" for nothing
    sides: tuple[str, ...]  # attributes of an example that are responses
    build: Callable[..., tuple[list[Any], Any]]  # tokenises examples


PAIRS = Kind("preferences", "pair_examples", "pairs", "held_out_pairs", ("chosen", "rejected"), preference_pairs)
DEMONSTRATIONS = Kind("sft", "sft_examples", "sft", "", ("response",), sft_sequences)
PROMPTS = Kind("prompts", "prompt_examples", "prompts", "eval_prompts", (), prompts)


def load_tokenizer_and_stops(path: str, trust_remote_code: bool) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """The tokenizer at `path`, and the ids that end a response, as a run has them."""
    from rto_fast.data.world import build_tokenizer
    from rto_fast.models.directory import generation_config, load_tokenizer

    if path == "embedded":
        return build_tokenizer(), stop_token_ids(build_tokenizer())
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    return tokenizer, stop_token_ids(tokenizer, generation_config(path, trust_remote_code=trust_remote_code))


def look(
    source: str,
    config: DataConfig,
    page: Page,
    say: Callable[..., None],
    *,
    tokenizer_path: str | None,
    trust_remote_code: bool,
    examples_shown: int,
) -> None:
    """Prints all that is known of a source.

    Args:
        config: the settings with which the source is read.
        tokenizer_path: directory or hub id of the tokenizer. Without one, lengths are in words.
    """
    name, split = split_of_source(source)
    layout, rows = open_examples(
        name,
        split=split,
        columns=config.columns or None,
        streaming=config.streaming,
        max_unpacked_gib=config.max_unpacked_gib,
    )
    say(page.title("layout"), f"  {layout}")
    kind, row, first = _typical(rows, config.limit or WINDOW)
    say("\n".join(columns_table(layout, row, config.columns, first)))

    given: dict[str, Any] = {"preferences": None, "sft": None, "prompts": None, kind.field: source}
    path = tokenizer_path or ("embedded" if name.startswith("embedded:") else None)
    tokenizer, stop_ids = load_tokenizer_and_stops(path, trust_remote_code) if path else (None, [])

    said: list[str] = []
    data = RunData(dataclasses.replace(config, **given), tokenizer, stop_ids, said.append)
    training: list[Example] = getattr(data, kind.examples)
    held_out = data.held_out_examples if kind is PAIRS else data.eval_examples if kind is PROMPTS else []
    examples = training + held_out
    counts = f"{data.read[given[kind.field]]:,} read: as data.{kind.field} {len(training):,} to train on"
    say("\n", page.title("examples"), f"  {counts}" + (f", {len(held_out):,} held out" if held_out else ""))
    repeated = repeated_prompts(examples)
    duplicates = [] if any("exact duplicates" in line for line in said) else ["no exact duplicates"]
    if repeated:
        duplicates.append(f"prompts with more than one example: {repeated:,}")
    shown = _show(page, data, kind, tokenizer, examples, examples_shown)
    for line in [*duplicates, *said]:
        say(f"  {one_line(line)}")
    unit = "tokens" if tokenizer else "words"
    say("\n", page.title("lengths"), f" in {unit}, before anything is cut")
    say("\n".join(_lengths(data, kind, tokenizer, examples)))
    if not tokenizer:
        say("  --tokenizer DIR (the model's directory or hub id) shows tokens, what the limits cut, and the loss mask")
    _say_examples(shown, page, tokenizer, say)


def _typical(rows: Iterable[tuple[dict, Example | DataError]], count: int) -> tuple[Kind, dict, Example]:
    """Finds the kind of most of the first `count` usable rows; returns it with the first row, and example, of that kind."""
    usable: list[tuple[Kind, dict, Example]] = []
    first_error = None
    for row, example in rows:
        if isinstance(example, DataError):
            first_error = first_error or example
            continue
        usable.append((_kind(example), row, example))
        if len(usable) == count:
            break
    if first_error and not usable:
        raise first_error
    most = Counter(kind for kind, _, _ in usable).most_common(1)[0][0]
    return next(found for found in usable if found[0] == most)


def _kind(example: Example) -> Kind:
    return PAIRS if example.chosen is not None else DEMONSTRATIONS if example.response is not None else PROMPTS


def _lengths(
    data: RunData, kind: Kind, tokenizer: PreTrainedTokenizerBase | None, examples: list[Example]
) -> list[str]:
    """The histogram's lines: lengths in tokens, or without a tokenizer in words."""
    if not tokenizer:
        texts = [" ".join(message_text(message) for message in as_messages(e.prompt)) for e in examples]
        words = {"prompt": [len(text.split()) for text in texts]}
        for side in kind.sides:
            words[side] = [len(response_text(getattr(e, side) or e.chosen or "").split()) for e in examples]
        return histogram(words)
    options = () if kind is PROMPTS else (data.stop_ids,)
    tokenizer = data.caching_tokenizer(examples)
    built, _ = kind.build(examples, tokenizer, UNLIMITED, data.config.prompt_format, *options, **data.reading_options)
    lengths = {"prompt": [len(item.prompt_ids) for item in built]}
    lengths |= {side: [len(getattr(item, f"{side}_ids")) for item in built] for side in kind.sides}
    limits = {name: data.limits.max_response_tokens for name in lengths} | {"prompt": data.limits.max_prompt_tokens}
    return histogram(lengths, limits)


def _show(
    page: Page,
    data: RunData,
    kind: Kind,
    tokenizer: PreTrainedTokenizerBase | None,
    examples: list[Example],
    count: int,
) -> list[list[str]]:
    """The lines of each of `count` examples, evenly spread over the data; `data` says what it cuts as it tokenises them."""
    items: list[Any] = getattr(data, kind.items) if tokenizer else examples
    if tokenizer and kind.held_out:
        getattr(data, kind.held_out)
    count = max(0, min(count, len(items)))
    chosen = [items[i * (len(items) - 1) // max(count - 1, 1)] for i in range(count)]
    if not tokenizer:
        return [as_roles(page, example) for example in chosen]
    return [
        as_tokens(page, tokenizer, item.prompt_ids, {s: getattr(item, f"{s}_ids") for s in kind.sides}, data.stop_ids)
        for item in chosen
    ]


def _say_examples(
    shown: list[list[str]], page: Page, tokenizer: PreTrainedTokenizerBase | None, say: Callable[..., None]
) -> None:
    if not shown:
        return
    title = page.title("examples as the model sees them" if tokenizer else "examples")
    mask = page.paint("trained on", "loss")
    say("\n", title, ": context, ", mask, " (the loss mask; with sft.loss_on_prompt the prompt too)")
    for number, lines in enumerate(shown, 1):
        say("\n", page.title(f"── {number} ──"), "\n", Styled("\n").join(lines))
