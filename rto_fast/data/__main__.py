"""`python -m rto_fast.data SOURCE [--tokenizer DIR]`: what a run would load from a source, seen before the run.

Detected layout, counts, duplicates and leaks, lengths, what the limits cut, and examples as the model will see them. It
loads through `RunData`, as a run does: what is said here is what happens there.
"""

import dataclasses
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rto_fast.config import Config, DataConfig, ModelConfig
from rto_fast.config.fields import CountOr0, Location, check_fields
from rto_fast.config.help import Command
from rto_fast.config.options import parse as parse_options
from rto_fast.data.cleaning import repeated_prompts
from rto_fast.data.inspection import Page, as_roles, as_tokens, columns_table, histogram
from rto_fast.data.layouts import Example
from rto_fast.data.messages import as_messages, message_text, response_text
from rto_fast.data.run_data import RunData, split_of_source
from rto_fast.data.sources import WINDOW, open_examples
from rto_fast.data.tokenizing import Limits, preference_pairs, prompts, sft_sequences, stop_token_ids
from rto_fast.errors import ConfigError, DataError
from rto_fast.system.command_line import as_command
from rto_fast.system.notices import Notice
from rto_fast.system.terminal import Styled, one_line, say, wants_styles

UNLIMITED = Limits(2**40, 2**40)


@dataclass
class InspectConfig:
    """What is looked at, and how."""

    source: Location | None = None
    """File, folder, HF dataset name or embedded:NAME, perhaps with a split: x[test]."""
    tokenizer: Location | None = None
    """Directory or hub id of the model or tokenizer; without, words are shown."""
    trust_remote_code: bool = False
    """As model.trust_remote_code."""
    examples: CountOr0 = 3
    """Examples shown."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.source:
            raise ConfigError("expected a source: a file, a folder, the name of an HF dataset or embedded:NAME")
        Config(model=ModelConfig(path="any"), data=self.data)


DATA = Command(
    "rto_fast.data",
    "Shows what a run would load from a source: layout, counts, duplicates, lengths, what the limits cut, and examples as "
    "the model will see them.",
    {
        "pairs.jsonl": "a file as it is detected, with lengths in words",
        "pairs.jsonl --tokenizer DIR": "lengths in tokens, what the limits cut, and the loss mask",
        "HuggingFaceH4/ultrafeedback_binarized[test_prefs] --data.limit 1000": "the first rows of a split of an HF dataset",
    },
    positional="source",
)


def parse(arguments: list[str]) -> tuple[InspectConfig, DataConfig]:
    """(options, those of the data)."""
    options = parse_options(InspectConfig, arguments, DATA)
    return options, options.data


def load_tokenizer_and_stops(path, trust_remote_code):
    """(tokenizer, ids that end a response), as a run has them."""
    from rto_fast.data.world import build_tokenizer
    from rto_fast.models.directory import generation_config, load_tokenizer

    if path == "embedded":
        return build_tokenizer(), stop_token_ids(build_tokenizer())
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    return tokenizer, stop_token_ids(tokenizer, generation_config(path, trust_remote_code=trust_remote_code))


def look(options, config, page, say):
    """Says everything there is to say about `options.source`."""
    name, split = split_of_source(options.source)
    reading = {"streaming": config.streaming, "max_unpacked_gib": config.max_unpacked_gib}
    layout, rows = open_examples(name, split=split, columns=config.columns or None, **reading)
    say(page.title("layout"), f"  {layout}")
    kind, row, first = _typical(rows, config.limit or WINDOW)
    say("\n".join(columns_table(layout, row, config.columns, first)))

    field = {"pairs": "preferences", "sft": "sft", "prompts": "prompts"}[kind]
    given = {"preferences": None, "sft": None, "prompts": None, field: options.source}
    path = options.tokenizer or ("embedded" if name.startswith("embedded:") else None)
    tokenizer, stop_ids = load_tokenizer_and_stops(path, options.trust_remote_code) if path else (None, [])

    said = []
    data = RunData(dataclasses.replace(config, **given), tokenizer, stop_ids, said.append)
    kept = {"pairs": "pair_examples", "sft": "sft_examples", "prompts": "prompt_examples"}[kind]
    training = getattr(data, kept)
    held_out = data.held_out_examples if kind == "pairs" else [] if kind == "sft" else data.eval_examples
    examples = training + held_out
    counts = f"{data.read[given[field]]:,} read: as data.{field} {len(training):,} to train on"
    say("\n", page.title("examples"), f"  {counts}" + (f", {len(held_out):,} held out" if held_out else ""))
    repeated = repeated_prompts(examples)
    duplicates = [] if any("exact duplicates" in line for line in said) else ["no exact duplicates"]
    if repeated:
        duplicates.append(f"prompts with more than one example: {repeated:,}")
    shown = _show(page, data, kind, tokenizer, examples, options.examples)
    for line in [*duplicates, *said]:
        say(f"  {one_line(line)}")
    unit = "tokens" if tokenizer else "words"
    say("\n", page.title("lengths"), f" in {unit}, before anything is cut")
    say("\n".join(_lengths(data, kind, tokenizer, examples)))
    if not tokenizer:
        say("  --tokenizer DIR (the model's directory or hub id) shows tokens, what the limits cut, and the loss mask")
    _say_examples(shown, page, tokenizer, say)


def _typical(rows: Iterable[tuple[dict, Example | DataError]], count: int) -> tuple[str, dict, Example]:
    """(kind, row, example) of the first row whose kind is that of most of the first `count` usable rows."""
    usable: list[tuple[str, dict, Example]] = []
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


def _kind(example: Example) -> str:
    return "pairs" if example.chosen is not None else "sft" if example.response is not None else "prompts"


def _lengths(data, kind, tokenizer, examples):
    sides = {"pairs": ("chosen", "rejected"), "sft": ("response",), "prompts": ()}[kind]
    if not tokenizer:
        texts = [" ".join(message_text(message) for message in as_messages(e.prompt)) for e in examples]
        words = {"prompt": [len(text.split()) for text in texts]}
        words |= {side: [len(response_text(getattr(e, side) or e.chosen).split()) for e in examples] for side in sides}
        return histogram(words)
    builders: dict[str, Callable] = {"pairs": preference_pairs, "sft": sft_sequences, "prompts": prompts}
    options = () if kind == "prompts" else (data.stop_ids,)
    tokenizer = data.caching_tokenizer(examples)
    built, _ = builders[kind](
        examples, tokenizer, UNLIMITED, data.config.prompt_format, *options, **data.reading_options
    )
    lengths = {"prompt": [len(item.prompt_ids) for item in built]}
    lengths |= {side: [len(getattr(item, f"{side}_ids")) for item in built] for side in sides}
    limits = {name: data.limits.max_response_tokens for name in lengths} | {"prompt": data.limits.max_prompt_tokens}
    return histogram(lengths, limits)


def _show(page, data, kind, tokenizer, examples, count):
    """The lines of each of `count` examples from all over the data; tokenises, so that `data` says what is cut."""
    items = getattr(data, kind) if tokenizer else examples
    if tokenizer and kind == "pairs":
        data.held_out_pairs  # noqa: B018 (for what it says)
    if tokenizer and kind == "prompts":
        data.eval_prompts  # noqa: B018
    count = max(0, min(count, len(items)))
    chosen = [items[i * (len(items) - 1) // max(count - 1, 1)] for i in range(count)]
    if not tokenizer:
        return [as_roles(page, example) for example in chosen]
    sides = {"pairs": ("chosen", "rejected"), "sft": ("response",), "prompts": ()}[kind]
    return [
        as_tokens(page, tokenizer, item.prompt_ids, {s: getattr(item, f"{s}_ids") for s in sides}, data.stop_ids)
        for item in chosen
    ]


def _say_examples(shown, page, tokenizer, say):
    if not shown:
        return
    title = page.title("examples as the model sees them" if tokenizer else "examples")
    mask = page.paint("trained on", "loss")
    say("\n", title, ": context, ", mask, " (the loss mask; with sft.loss_on_prompt the prompt too)")
    for number, lines in enumerate(shown, 1):
        say("\n", page.title(f"── {number} ──"), "\n", Styled("\n").join(lines))


def main(arguments=None):
    options, config = parse(sys.argv[1:] if arguments is None else list(arguments))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", Notice)
        look(options, config, Page(wants_styles()), say)
    for message in dict.fromkeys(str(warning.message) for warning in caught if isinstance(warning.message, Notice)):
        say("\nnote: ", one_line(message))


def command():
    with as_command(only_prints=True):
        main()


if __name__ == "__main__":
    command()
