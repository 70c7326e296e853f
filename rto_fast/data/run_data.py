"""The data of a run: each stage's tokenised examples, and what is held out of them."""

import random
from functools import cached_property

from rto_fast.data.sources import load_examples
from rto_fast.data.tokenizing import Limits, preference_pairs, prompts, sft_sequences


class RunData:
    """Loads what a stage asks for, when it asks; every builder's report goes to `say`.

    Args:
        config: `DataConfig`. tokenizer: the policy's. stop_ids: ids that end a response. say: called with one line of text.
    """

    def __init__(self, config, tokenizer, stop_ids, say):
        self.config, self.tokenizer, self.stop_ids, self.say = config, tokenizer, stop_ids, say
        self.limits = Limits(config.max_prompt_tokens, config.max_response_tokens, config.overlong_prompt)

    def _examples(self, source):
        config = self.config
        return load_examples(source, split=config.split, columns=config.columns or None, limit=config.limit)

    def _build(self, builder, examples, what, *options):
        built, report = builder(examples, self.tokenizer, self.limits, self.config.prompt_format, *options)
        self.say(f"{what}: {report}")
        return built

    @cached_property
    def _split(self):
        """(training examples, held-out examples) of the preferences; no held-out prompt occurs in training."""
        examples = self._examples(self.config.preferences)
        count = min(self.config.held_out, max(len(examples) // 10, 1 if len(examples) > 1 else 0))
        # A fixed seed: which examples are held out must not change from run to run.
        held_out = sorted(random.Random(0).sample(range(len(examples)), count))
        prompts_held_out = {repr(examples[i].prompt) for i in held_out}
        train = [e for e in examples if repr(e.prompt) not in prompts_held_out]
        return train, [examples[i] for i in held_out]

    @cached_property
    def sft(self):
        examples = self._examples(self.config.sft) if self.config.sft else self._split[0]
        return self._build(sft_sequences, examples, "demonstrations", self.stop_ids)

    @cached_property
    def pairs(self):
        return self._build(preference_pairs, self._split[0], "preferences", self.stop_ids)

    @cached_property
    def held_out_pairs(self):
        held_out = self._split[1]
        return self._build(preference_pairs, held_out, "held-out preferences", self.stop_ids) if held_out else []

    @cached_property
    def prompts(self):
        examples = self._examples(self.config.prompts) if self.config.prompts else self._split[0]
        return self._build(prompts, examples, "prompts")

    @cached_property
    def eval_prompts(self):
        source = self.config.eval_prompts
        examples = self._examples(source) if source else self._split[1]
        return self._build(prompts, examples, "evaluation prompts")
