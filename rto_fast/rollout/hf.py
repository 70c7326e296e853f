"""Rollouts by transformers' `generate`. It works for every model, and pads the prompts of a batch."""

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase

from rto_fast.config import RolloutConfig
from rto_fast.errors import ModelError, UserError, error_text
from rto_fast.models.attention import attention_implementation
from rto_fast.models.checks import check_sequences
from rto_fast.models.model import Model
from rto_fast.models.trace import failing_layer
from rto_fast.rollout.base import Engine, RolloutBatch, Sampling, finish_reasons, nan_logits
from rto_fast.rollout.model import RolloutModel
from rto_fast.system.progress import advance


def _refuse_nan(input_ids: Tensor, scores: Tensor) -> Tensor:
    """A logits processor. Without it torch would name no cause and, on a GPU, not even the place."""
    valid = (scores < torch.inf).all(1)
    if not valid.all():
        raise nan_logits(f"sequence {int(valid.int().argmin())} of a batch, position {input_ids.shape[1]}")
    return scores


class HFEngine(Engine):
    """Samples from a Hugging Face causal LM by its own `generate`. Arguments as those of `NativeEngine`.

    A sample also depends on the batch in which it is decoded, and is cut to its limit only afterwards.

    Raises:
        ModelError: `generate` fails on a few tokens, which are tried here.
    """

    def __init__(self, model: Model | nn.Module, tokenizer: PreTrainedTokenizerBase | None, config: RolloutConfig):
        self.policy, self.tokenizer, self.config = RolloutModel(model), tokenizer, config
        self.model = self.policy.causal_lm
        try:
            self.generate(check_sequences(self.policy.vocab_size, [3, 5]), 1, Sampling(2, temperature=0.0))
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever foreign code raises, the model cannot be sampled
            layer = failing_layer(self.model, error) or "it"
            raise ModelError(
                f"{type(self.model).__name__} cannot be decoded by transformers' generate: {layer}: {error_text(error)}"
            ) from error

    def _sample(
        self, prompt_ids: list[list[int]], n: int, sampling: Sampling, seed: int, numbers: list[int], limits: list[int]
    ) -> RolloutBatch:
        prompt_ids = [ids for ids in prompt_ids for _ in range(n)]
        responses: list[list[int]] = [[] for _ in prompt_ids]
        # Prompts of similar length are decoded together, which saves padding.
        order = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        attention = "sdpa" if self.model._supports_sdpa else "eager"  # Gemma-2 has no sdpa
        defaults = self.model.generation_config
        with self.policy.evaluating(), torch.random.fork_rng(devices), attention_implementation(self.model, attention):
            torch.manual_seed(seed + 1_000_003 * (numbers[0] if numbers else 0))  # ranks draw differently
            try:
                # `generate` takes from here what we leave unset, for example a repetition penalty.
                self.model.generation_config = self._generation_config(sampling)
                for i in range(0, len(order), self.config.batch_size):
                    chosen = order[i : i + self.config.batch_size]
                    for index, response in zip(chosen, self._decode([prompt_ids[j] for j in chosen], sampling)):
                        responses[index] = response[: limits[index]]
                    advance(len(chosen))
            finally:
                self.model.generation_config = defaults
        return RolloutBatch(prompt_ids, responses, finish_reasons(responses, sampling.stop_ids))

    def _decode(self, prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
        device, width = self.model.device, max(map(len, prompts))
        pad = self._pad(sampling)
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        checks = LogitsProcessorList([_refuse_nan])
        out = self.model.generate(input_ids=ids, attention_mask=mask, logits_processor=checks)[:, width:].tolist()
        ends = [next((i for i, token in enumerate(row) if token in sampling.stop_ids), len(row)) for row in out]
        return [row[: end + 1] for row, end in zip(out, ends)]

    def _pad(self, sampling: Sampling) -> int:
        pad = getattr(self.tokenizer, "pad_token_id", None)  # there may be no tokenizer
        return (sampling.stop_ids or (0,))[0] if pad is None else pad

    def _generation_config(self, sampling: Sampling) -> GenerationConfig:
        drawing = dict(do_sample=False)
        if sampling.temperature > 0:
            drawing = dict(
                do_sample=True,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                min_p=sampling.min_p or None,
            )
        return GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            min_new_tokens=sampling.min_new_tokens,
            eos_token_id=list(sampling.stop_ids) or None,
            pad_token_id=self._pad(sampling),
            use_cache=True,
            **drawing,
        )
