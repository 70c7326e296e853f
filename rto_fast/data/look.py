"""What `python -m rto_fast.data` says about a source: it loads through `RunData`, as a run does."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from rto_fast.config import DataConfig
from rto_fast.data.cleaning import repeated_prompts
from rto_fast.data.inspection import Page, as_roles, as_tokens, columns_table, histogram
from rto_fast.data.layouts import Example
from rto_fast.data.messages import as_messages, message_text, response_text
from rto_fast.data.run_data import RunData, split_of_source
from rto_fast.data.sources import WINDOW, open_examples
from rto_fast.data.tokenizing import Limits, preference_pairs, prompts, sft_sequences, stop_token_ids
from rto_fast.errors import DataError
from rto_fast.system.terminal import Styled, one_line

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
