"""The data of a run: each stage's tokenised examples, and what is held out of them."""

import random
import re
from functools import cached_property

from rto_fast.data.sources import load_examples
from rto_fast.data.tokenizing import Limits, preference_pairs, prompts, sft_sequences
from rto_fast.errors import DataError

# The columns that a mapping may name for each use; a file of prompts has no chosen responses to map.
SFT_ROLES = ("prompt", "response", "completion", "messages", "chosen")
PROMPT_ROLES = ("prompt", "messages")


class RunData:
    """Loads what a stage asks for, when it asks; every builder's report goes to `say`.

    Args:
        config: `DataConfig`. tokenizer: the policy's. stop_ids: ids that end a response. say: called with one line of text.
    """

    def __init__(self, config, tokenizer, stop_ids, say):
        self.config, self.tokenizer, self.stop_ids, self.say = config, tokenizer, stop_ids, say
        self.limits = Limits(config.max_prompt_tokens, config.max_response_tokens, config.overlong_prompt)

    def _examples(self, source, split="train", roles=None):
        config = self.config
        name, named_split = re.fullmatch(r"(.*?)(?:\[([^\[\]]+)\])?", source).groups()
        columns = {ours: theirs for ours, theirs in config.columns.items() if roles is None or ours in roles}
        return load_examples(
            name, split=named_split or split, columns=columns or None, limit=config.limit, invalid=config.invalid
        )

    def _build(self, builder, examples, what, *options):
        built, report = builder(examples, self.tokenizer, self.limits, self.config.prompt_format, *options)
        self.say(f"{what}: {report}")
        return built

    def _hold_out(self, examples):
        """(training examples, held-out examples): no held-out prompt occurs in training."""
        count = min(self.config.held_out, max(len(examples) // 10, len(examples) > 1))
        # A fixed seed: which examples are held out must not change from run to run.
        held_out = [examples[i] for i in sorted(random.Random(0).sample(range(len(examples)), count))]
        return self._without(examples, held_out), held_out

    @staticmethod
    def _without(examples, others):
        seen = {repr(e.prompt) for e in others}
        return [e for e in examples if repr(e.prompt) not in seen]

    @cached_property
    def _preferences(self):
        if not self.config.preferences:
            raise DataError("data.preferences: no preference data is given, and this run needs some")
        return self._hold_out(self._examples(self.config.preferences, self.config.split))

    @cached_property
    def _prompts(self):
        """(training examples, held-out examples) of the RTO stage's prompts."""
        if not self.config.prompts:
            return self._preferences
        examples = self._examples(self.config.prompts, roles=PROMPT_ROLES)
        return self._hold_out(examples) if not self.config.preferences else (examples, self._preferences[1])

    @cached_property
    def _eval_examples(self):
        source = self.config.eval_prompts
        return self._examples(source, roles=PROMPT_ROLES) if source else self._prompts[1]

    def _train(self, examples, what):
        """`examples` without those whose prompts policies are judged by."""
        kept = self._without(examples, self._eval_examples)
        if len(kept) < len(examples):
            self.say(f"{what}: {len(examples) - len(kept)} examples left out, their prompts are for evaluation")
        if not kept:
            raise DataError(f"{what}: no example is left beside those held out for evaluation")
        return kept

    @cached_property
    def sft(self):
        source = self.config.sft
        examples = self._examples(source, roles=SFT_ROLES) if source else self._preferences[0]
        return self._build(sft_sequences, self._train(examples, "demonstrations"), "demonstrations", self.stop_ids)

    @cached_property
    def pairs(self):
        examples = self._train(self._preferences[0], "preferences")
        return self._build(preference_pairs, examples, "preferences", self.stop_ids)

    @cached_property
    def held_out_pairs(self):
        """May be empty: little data, or none of the few held out within the limits."""
        if not self._preferences[1]:
            return []
        try:
            return self._build(preference_pairs, self._preferences[1], "held-out preferences", self.stop_ids)
        except DataError as error:
            self.say(f"held-out preferences: none ({error})")
            return []

    @cached_property
    def prompts(self):
        return self._build(prompts, self._train(self._prompts[0], "prompts"), "prompts")

    @cached_property
    def eval_prompts(self):
        """May be empty: then policies are not compared."""
        examples = self._eval_examples
        return self._build(prompts, examples, "evaluation prompts") if examples else []
