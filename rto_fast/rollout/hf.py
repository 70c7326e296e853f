"""Rollouts by transformers' `generate`: works for every model, pads inside a decoding batch."""

import time

import torch

from rto_fast.models.loading import attention_implementation
from rto_fast.rollout.base import RolloutBatch, finish_reasons


class HFEngine:
    def __init__(self, model, tokenizer, config):
        self.model, self.tokenizer, self.config = model, tokenizer, config

    @torch.no_grad()
    def generate(self, prompts, n=1, sampling=None, seed=0, *, prompt_numbers=None, limits=None):
        """Samples `n` responses to each prompt; see `NativeEngine.generate`.

        Here a sample also depends on the batch it is decoded in, and a response's limit cuts it after the fact.
        """
        start = time.perf_counter()
        prompt_ids = [self.tokenizer(p)["input_ids"] if isinstance(p, str) else list(p) for p in prompts]
        prompts = [ids for ids in prompt_ids for _ in range(n)]
        responses = [None] * len(prompts)
        # Alike lengths decode together: less padding, and batches that end together.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        training, defaults = self.model.training, self.model.generation_config
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        attention = "sdpa" if self.model._supports_sdpa else "eager"  # Gemma-2 has no sdpa
        with torch.random.fork_rng(devices), attention_implementation(self.model, attention):
            torch.manual_seed(seed + 1_000_003 * (prompt_numbers[0] if prompt_numbers else 0))  # ranks draw differently
            self.model.eval()
            try:
                # What we leave unset, `generate` would take from here: a repetition penalty, say.
                self.model.generation_config = self._generation_config(sampling)
                for i in range(0, len(order), self.config.batch_size):
                    chosen = order[i : i + self.config.batch_size]
                    for index, response in zip(chosen, self._decode([prompts[j] for j in chosen], sampling)):
                        responses[index] = response
            finally:
                self.model.train(training)
                self.model.generation_config = defaults
        if limits:
            responses = [ids[:limit] for ids, limit in zip(responses, limits)]
        reasons = finish_reasons(responses, sampling.stop_ids)
        return RolloutBatch(prompts, responses, reasons, timings={"rollout": time.perf_counter() - start})

    def _decode(self, prompts, sampling):
        device, width = self.model.device, max(map(len, prompts))
        pad = self._pad(sampling)
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        out = self.model.generate(input_ids=ids, attention_mask=mask)[:, width:].tolist()
        return [self._until_stop(row, set(sampling.stop_ids)) for row in out]

    def _pad(self, sampling):
        pad = self.tokenizer.pad_token_id
        return (sampling.stop_ids or (0,))[0] if pad is None else pad

    def _generation_config(self, sampling):
        from transformers import GenerationConfig

        drawing = dict(do_sample=False)
        if sampling.temperature > 0:
            drawing = dict(
                do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k,
                min_p=sampling.min_p or None,
            )  # fmt: skip
        return GenerationConfig(
            max_new_tokens=sampling.max_new_tokens, min_new_tokens=sampling.min_new_tokens,
            eos_token_id=list(sampling.stop_ids) or None, pad_token_id=self._pad(sampling), use_cache=True, **drawing,
        )  # fmt: skip

    @staticmethod
    def _until_stop(row, stops):
        for index, token in enumerate(row):
            if token in stops:
                return row[: index + 1]
        return row
