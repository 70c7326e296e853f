"""The data of a run: each stage's tokenised examples, and what is held out of them."""

import re
from functools import cached_property

from rto_fast.data.cache import CachingTokenizer
from rto_fast.data.cleaning import draw_prompts, one_of_each_prompt, without_duplicates, without_prompts_of
from rto_fast.data.layouts import Example
from rto_fast.data.sources import load_examples
from rto_fast.data.templates import MODES, ChatTemplate
from rto_fast.data.tokenizing import Limits, NothingLeft, preference_pairs, prompts, responses_of, sft_sequences
from rto_fast.data.world import EMBEDDED
from rto_fast.errors import DataError
from rto_fast.system.progress import progress
from rto_fast.system.terminal import one_line

# The columns that a mapping may name for each use; a file of prompts has no chosen responses to map.
SFT_ROLES = ("prompt", "response", "completion", "messages", "chosen", "tools")
PROMPT_ROLES = ("prompt", "messages", "tools")


def split_of_source(source: str, default: str = "train") -> tuple[str, str]:
    """(name, split) of a source that may name its split, `name[test]` or `name[test[:500]]`."""
    found = re.fullmatch(r"(.*?)(?:\[([^\[\]]+(?:\[[^\[\]]*\])?)\])?", source, re.S)
    name, split = found.groups()  # type: ignore[union-attr]  # any text matches
    return name, split or default


class RunData:
    """Loads what a stage asks for, when it asks; every builder's report goes to `say`.

    Args:
        config: `DataConfig`. tokenizer: the policy's; without one there are only examples. stop_ids: ids that end a
            response. say: called with one line of text. vocabulary_size: of the model, which must know every token.
    """

    def __init__(self, config, tokenizer, stop_ids, say, vocabulary_size=None):
        self.config, self.tokenizer, self.stop_ids = config, tokenizer, stop_ids
        self.say = lambda text: say(one_line(text))  # names of files and columns are no lines of their own
        self.vocabulary_size = vocabulary_size
        self.limits = Limits(config.max_prompt_tokens, config.max_response_tokens, config.overlong_prompt)
        self.read = {}  # {source: usable rows}
        self._noted = set()  # what was warned of

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

    @cached_property
    def _caching(self):
        return CachingTokenizer(self.tokenizer, self.config.cache_dir)

    def caching_tokenizer(self, examples):
        """The tokenizer, with what is on disk (`data.cache_dir`) of these examples' ids."""
        embedded = examples[0].origin.startswith(str(EMBEDDED))  # tokenised in a moment
        return self._caching if self.config.cache_dir and not embedded else self.tokenizer

    def _build(self, builder, examples, what, *options):
        tokenizer = self.caching_tokenizer(examples)
        built, report = builder(
            examples, tokenizer, self.limits, self.config.prompt_format, *options, **self.reading_options
        )
        self.say(f"{what}: {report}")
        if self.vocabulary_size:
            self._check_tokens(built, what)
        return built

    def _build_held_out(self, builder, examples, what, *options):
        """Empty with little data, or if none of the few that were held out can be used: that is no reason to stop."""
        if not examples:
            return []
        try:
            return self._build(builder, examples, what, *options)
        except NothingLeft as error:
            self.say(f"{what}: none ({error})")
            return []

    @cached_property
    def reading_options(self):
        """What the builders of `rto_fast.data.tokenizing` are to do beside: the same for all of them."""
        return {"invalid": self.config.invalid, "thinking": self._thinking, "noted": self._noted}

    @property
    def _thinking(self):
        """How prompts end: one way for all stages, that all responses which are trained on can follow.

        None without such responses: then prompts that come with responses ask for themselves.
        """
        config = self.config
        if config.thinking != "auto":
            return MODES[config.thinking]
        trained = [*self._preferences[0]] if config.preferences else []
        trained += self.sft_examples if config.sft else []
        return ChatTemplate(self.tokenizer).choose_thinking(responses_of(trained)) if trained else None

    def _check_tokens(self, built, what):
        """A token that the model does not know would end a GPU run in a device-side assertion, far from its cause."""
        lists = (ids for item in built for ids in vars(item).values() if isinstance(ids, list) and ids)
        if (largest := max(map(max, lists), default=0)) >= self.vocabulary_size:
            raise DataError(
                f"{what}: the tokenizer makes token {largest} of {self.tokenizer.decode([largest])!r}, the model has "
                f"{self.vocabulary_size} tokens; give the model's own tokenizer, or resize_token_embeddings"
            )

    def _hold_out(self, examples: list[Example], what: str) -> tuple[list[Example], list[Example]]:
        """(training examples, held-out examples): no held-out prompt occurs in training."""
        count = min(self.config.held_out, max(len(examples) // 10, len(examples) > 1))
        held_out = draw_prompts(examples, count)
        if count and not held_out:
            self.say(
                f"{what}: nothing is held out, every prompt has too many of the {len(examples)} examples (about {count} "
                f"{'is' if count == 1 else 'are'} wanted); policies are not compared without data.eval_prompts"
            )
        return without_prompts_of(examples, held_out), held_out

    @cached_property
    def _preferences(self):
        if not self.config.preferences:
            raise DataError("data.preferences: no preference data is given, and this run needs some")
        return self._hold_out(self._examples(self.config.preferences), "preferences")

    @cached_property
    def _prompts(self):
        """(training examples, held-out examples) of the RTO stage's prompts."""
        if not self.config.prompts:
            return self._preferences
        examples = self._examples(self.config.prompts, roles=PROMPT_ROLES)
        return self._hold_out(examples, "prompts") if not self.config.preferences else (examples, self._preferences[1])

    @cached_property
    def eval_examples(self):
        """What policies are judged on; of prompts that are held out, each once, however many pairs it has."""
        config = self.config
        if config.eval_prompts:
            return self._examples(config.eval_prompts, roles=PROMPT_ROLES)
        return one_of_each_prompt(self._prompts[1]) if config.prompts or config.preferences else []

    @cached_property
    def held_out_examples(self):
        """What preference accuracy is measured on."""
        return self._preferences[1] if self.config.preferences else []

    def _train(self, examples, what):
        """`examples` without those whose prompts policies or rewards are judged by."""
        kept = without_prompts_of(examples, self.eval_examples + self.held_out_examples)
        if len(kept) < len(examples):
            self.say(f"{what}: {len(examples) - len(kept)} examples left out, their prompts are for evaluation")
        if not kept:
            raise DataError(f"{what}: no example is left beside those held out for evaluation")
        return kept

    @cached_property
    def sft_examples(self):
        source = self.config.sft
        examples = self._examples(source, roles=SFT_ROLES, demonstrations=True) if source else self._preferences[0]
        return self._train(examples, "demonstrations")

    @cached_property
    def pair_examples(self):
        return self._train(self._preferences[0], "preferences")

    @cached_property
    def prompt_examples(self):
        return self._train(self._prompts[0], "prompts")

    @cached_property
    def sft(self):
        return self._build(sft_sequences, self.sft_examples, "demonstrations", self.stop_ids)

    @cached_property
    def pairs(self):
        return self._build(preference_pairs, self.pair_examples, "preferences", self.stop_ids)

    @cached_property
    def held_out_pairs(self):
        """May be empty."""
        return self._build_held_out(preference_pairs, self.held_out_examples, "held-out preferences", self.stop_ids)

    @cached_property
    def prompts(self):
        return self._build(prompts, self.prompt_examples, "prompts")

    @cached_property
    def eval_prompts(self):
        """May be empty: then policies are not compared."""
        build = self._build if self.config.eval_prompts else self._build_held_out
        return build(prompts, self.eval_examples, "evaluation prompts")
