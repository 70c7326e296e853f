"""The data of a run: the tokenised examples of each stage, and those that are held out.

Repeated examples are dropped, and no prompt is on both sides.
"""

import random
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, Literal, TypeVar

from transformers import PreTrainedTokenizerBase

from rto_fast.config import DataConfig
from rto_fast.data.cache import CachingTokenizer
from rto_fast.data.layouts import Example
from rto_fast.data.messages import as_messages, content_of, message_text
from rto_fast.data.sources import load_examples
from rto_fast.data.templates import MODES, ChatTemplate, Thinking
from rto_fast.data.tokenizing import (
    CutReport,
    Demonstration,
    Limits,
    NothingLeft,
    Pair,
    Prompt,
    preference_pairs,
    prompts,
    responses_of,
    sft_sequences,
)
from rto_fast.data.visited import Visits, read_visited
from rto_fast.data.world import EMBEDDED
from rto_fast.errors import DataError
from rto_fast.system.progress import progress
from rto_fast.system.terminal import one_line


def prompt_key(prompt: str | Sequence[dict]) -> tuple[tuple[str, str], ...]:
    """A key that is equal for prompts that differ only in case and whitespace. A text equals one message from the user."""
    turns = ((message["role"], message_text(message)) for message in as_messages(prompt))
    return tuple((role, " ".join(text.casefold().split())) for role, text in turns)


def without_duplicates(examples: Iterable[Example]) -> list[Example]:
    """The first of each set of examples whose prompt and responses are exactly equal."""
    unique: dict[str, Example] = {}
    for example in examples:
        parts = (example.prompt, example.response, example.chosen, example.rejected)
        unique.setdefault(repr([*map(content_of, parts), example.tools]), example)
    return list(unique.values())


def without_prompts_of(examples: Iterable[Example], others: Iterable[Example]) -> list[Example]:
    """The examples whose prompt (by `prompt_key`) is in none of `others`."""
    taken = {prompt_key(other.prompt) for other in others}
    return [example for example in examples if prompt_key(example.prompt) not in taken]


def _by_prompt(examples: list[Example]) -> dict[tuple, list[Example]]:
    groups: dict[tuple, list[Example]] = {}
    for example in examples:
        groups.setdefault(prompt_key(example.prompt), []).append(example)
    return groups


def draw_prompts(examples: list[Example], count: int) -> list[Example]:
    """Draws prompts at random and returns all their examples: `count`, or about as many where prompts occur repeatedly.

    A prompt is taken if that brings the number of examples nearer to `count`. A prompt with 2·count examples or more is
    therefore never taken. Fewer than 2·count examples are drawn, and none if every prompt has that many.

    Args:
        examples: the same examples in the same order give the same draw in every run.
        count: the number of examples wanted.
    """
    groups = list(_by_prompt(examples).values())
    generator = random.Random(0)
    # Where no prompt is repeated, exactly these are drawn, as by older versions, which drew examples.
    order = generator.sample(range(len(groups)), min(count, len(groups)))
    others = sorted(set(range(len(groups))) - set(order))
    generator.shuffle(others)
    drawn, missing = set(), count
    for index in order + others:
        if len(groups[index]) < 2 * missing:
            missing -= len(groups[index])
            drawn.update(map(id, groups[index]))
    return [example for example in examples if id(example) in drawn]


def one_of_each_prompt(examples: list[Example]) -> list[Example]:
    """The first example of each prompt."""
    return [group[0] for group in _by_prompt(examples).values()]


def repeated_prompts(examples: list[Example]) -> int:
    """How many prompts occur more than once."""
    return sum(len(group) > 1 for group in _by_prompt(examples).values())


# The columns that a mapping may name for each use. A file of prompts has no chosen responses.
SFT_ROLES = ("prompt", "response", "completion", "messages", "chosen", "tools")
PROMPT_ROLES = ("prompt", "messages", "tools")

Built = TypeVar("Built", Demonstration, Pair, Prompt)
Builder = Callable[..., tuple[list[Built], CutReport]]
Use = Literal["sft", "pairs", "prompts", "eval_prompts"]  # the properties of `RunData` that may be read in part


def split_of_source(source: str, default: str = "train") -> tuple[str, str]:
    """The name and the split of a source, which may give its split: `name[test]`, `name[test[:500]]`."""
    found = re.fullmatch(r"(.*?)(?:\[([^\[\]]+(?:\[[^\[\]]*\])?)\])?", source, re.S)
    name, split = found.groups()  # type: ignore[union-attr]  # any text matches
    return name, split or default


class RunData:
    """Loads and tokenises the data of a stage when the stage asks for it.

    Args:
        config: the group `data` of the configuration.
        tokenizer: the policy's. Without one there are only examples, no tokens.
        stop_ids: the ids that end a response.
        say: prints a line, such as a report of what was cut.
        vocabulary_size: the number of tokens that the model knows; None does not check the ids.
        visits: tells what the run visits of a number of examples; None where it visits, or reads, all of them.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        stop_ids: list[int],
        say: Callable[[str], object],
        vocabulary_size: int | None = None,
        visits: Callable[[Use, int], Visits | None] = lambda use, count: None,
    ):
        self.config, self.tokenizer, self.stop_ids = config, tokenizer, stop_ids
        self.say = lambda text: say(one_line(text))  # names of files and columns may hold line breaks
        self.vocabulary_size, self.visits = vocabulary_size, visits
        self.limits = Limits(config.max_prompt_tokens, config.max_response_tokens, config.overlong_prompt)
        self.read: dict[str, int] = {}  # {source: number of usable rows}
        self._noted: set[str] = set()  # the warnings that were given

    def _examples(
        self, source: str, roles: tuple[str, ...] | None = None, demonstrations: bool = False
    ) -> list[Example]:
        config = self.config
        name, split = split_of_source(source)
        columns = {ours: theirs for ours, theirs in config.columns.items() if roles is None or ours in roles}
        with progress(f"reading {source}", config.limit, "rows"):
            examples = load_examples(
                name,
                split=split,
                columns=columns or None,
                limit=config.limit,
                invalid=config.invalid,
                streaming=config.streaming,
                max_unpacked_gib=config.max_unpacked_gib,
                demonstrations=demonstrations,
            )
        self.read[source] = len(examples)
        unique = without_duplicates(examples)
        if len(unique) < len(examples):
            done = "dropped" if config.deduplicate else "kept (data.deduplicate)"
            self.say(f"{source}: exact duplicates {done}: {len(examples) - len(unique)}")
        return unique if config.deduplicate else examples

    @property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        assert self.tokenizer is not None, "without a tokenizer there are only examples"
        return self.tokenizer

    @cached_property
    def _caching(self) -> CachingTokenizer:
        return CachingTokenizer(self._tokenizer, str(self.config.cache_dir))

    def caching_tokenizer(self, examples: Sequence[Example]) -> Any:
        """The tokenizer, which reads ids from `data.cache_dir` except for the embedded data."""
        embedded = examples[0].origin.startswith(str(EMBEDDED))  # small enough to be tokenised each time
        return self._caching if self.config.cache_dir and not embedded else self._tokenizer

    def _build(
        self, builder: Builder[Built], examples: list[Example], what: str, *options: Any, use: Use | None = None
    ) -> list[Built]:
        tokenizer = self.caching_tokenizer(examples)

        def build(part: list[Example]) -> tuple[list[Built], CutReport]:
            return builder(part, tokenizer, self.limits, self.config.prompt_format, *options, **self.reading_options)

        visits = self.visits(use, len(examples)) if use else None
        built, report = build(examples) if visits is None else read_visited(build, examples, visits)
        self.say(f"{what}: {report}")
        self._check_tokens(built, what)
        return built

    def _build_held_out(
        self, builder: Builder[Built], examples: list[Example], what: str, *options: Any, use: Use | None = None
    ) -> list[Built]:
        """`_build`, which returns an empty list where no held-out example can be used: there may be few of them."""
        if not examples:
            return []
        try:
            return self._build(builder, examples, what, *options, use=use)
        except NothingLeft as error:
            self.say(f"{what}: none ({error})")
            return []

    @cached_property
    def reading_options(self) -> dict[str, Any]:
        """The options that all builders of `rto_fast.data.tokenizing` get."""
        return {"invalid": self.config.invalid, "thinking": self._thinking, "noted": self._noted}

    @property
    def _thinking(self) -> Thinking | None:
        """How prompts end: one way for all stages, which all responses of the training data can follow. None where there
        are no such responses; then the builders choose a way for the examples that they get.
        """
        config = self.config
        if config.thinking != "auto":
            return MODES[config.thinking]
        trained = [*self._preferences[0]] if config.preferences else []
        trained += self.sft_examples if config.sft else []
        return ChatTemplate(self._tokenizer).choose_thinking(responses_of(trained)) if trained else None

    def _check_tokens(self, built: Sequence[Any], what: str) -> None:
        """Raises DataError for a token that the model does not know; on a GPU it would end the run in a device assertion."""
        if self.vocabulary_size is None:
            return
        lists = (ids for item in built for ids in vars(item).values() if isinstance(ids, list) and ids)
        if (largest := max(map(max, lists), default=0)) >= self.vocabulary_size:
            raise DataError(
                f"{what}: the tokenizer makes token {largest} of {self._tokenizer.decode([largest])!r}, the model has "
                f"{self.vocabulary_size} tokens; give the model's own tokenizer, or resize_token_embeddings"
            )

    def _hold_out(self, examples: list[Example], what: str) -> tuple[list[Example], list[Example]]:
        """Splits examples into those for training and those that are held out; no prompt is on both sides."""
        count = min(self.config.held_out, max(len(examples) // 10, len(examples) > 1))
        held_out = draw_prompts(examples, count)
        if count and not held_out:
            self.say(
                f"{what}: nothing is held out, every prompt has too many of the {len(examples)} examples (about {count} "
                f"{'is' if count == 1 else 'are'} wanted); policies are not compared without data.eval_prompts"
            )
        return without_prompts_of(examples, held_out), held_out

    @cached_property
    def _preferences(self) -> tuple[list[Example], list[Example]]:
        if not self.config.preferences:
            raise DataError("data.preferences: no preference data is given, and this run needs some")
        return self._hold_out(self._examples(self.config.preferences), "preferences")

    @cached_property
    def _prompts(self) -> tuple[list[Example], list[Example]]:
        """The prompts of the RTO stage: for training, and held out."""
        if not self.config.prompts:
            return self._preferences
        examples = self._examples(self.config.prompts, roles=PROMPT_ROLES)
        return self._hold_out(examples, "prompts") if not self.config.preferences else (examples, self._preferences[1])

    @cached_property
    def eval_examples(self) -> list[Example]:
        """The prompts on which policies are judged. A held-out prompt with several pairs appears once."""
        config = self.config
        if config.eval_prompts:
            return self._examples(config.eval_prompts, roles=PROMPT_ROLES)
        return one_of_each_prompt(self._prompts[1]) if config.prompts or config.preferences else []

    @cached_property
    def held_out_examples(self) -> list[Example]:
        """The pairs on which the accuracy of preferences is measured."""
        return self._preferences[1] if self.config.preferences else []

    def _train(self, examples: Sequence[Example], what: str) -> list[Example]:
        """The examples whose prompts are not used to judge policies or rewards."""
        kept = without_prompts_of(examples, self.eval_examples + self.held_out_examples)
        if len(kept) < len(examples):
            self.say(f"{what}: {len(examples) - len(kept)} examples left out, their prompts are for evaluation")
        if not kept:
            raise DataError(f"{what}: no example is left beside those held out for evaluation")
        return kept

    @cached_property
    def sft_examples(self) -> list[Example]:
        source = self.config.sft
        examples = self._examples(source, roles=SFT_ROLES, demonstrations=True) if source else self._preferences[0]
        return self._train(examples, "demonstrations")

    @cached_property
    def pair_examples(self) -> list[Example]:
        return self._train(self._preferences[0], "preferences")

    @cached_property
    def prompt_examples(self) -> list[Example]:
        return self._train(self._prompts[0], "prompts")

    @cached_property
    def sft(self) -> list[Demonstration]:
        return self._build(sft_sequences, self.sft_examples, "demonstrations", self.stop_ids, use="sft")

    @cached_property
    def pairs(self) -> list[Pair]:
        return self._build(preference_pairs, self.pair_examples, "preferences", self.stop_ids, use="pairs")

    @cached_property
    def held_out_pairs(self) -> list[Pair]:
        """May be empty."""
        return self._build_held_out(preference_pairs, self.held_out_examples, "held-out preferences", self.stop_ids)

    @cached_property
    def prompts(self) -> list[Prompt]:
        return self._build(prompts, self.prompt_examples, "prompts", use="prompts")

    @cached_property
    def eval_prompts(self) -> list[Prompt]:
        """May be empty; then policies are not compared."""
        build = self._build if self.config.eval_prompts else self._build_held_out
        return build(prompts, self.eval_examples, "evaluation prompts", use="eval_prompts")
