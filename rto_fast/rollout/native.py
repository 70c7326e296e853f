"""The native engine: decodes on the training weights, in the training process.

No second copy of the model, no sync, no staleness: each call reads the weights as they are, and the log-probs it returns
are the behaviour policy's own. Continuous batching over a paged KV cache; on a GPU, Triton kernels in CUDA graphs.
"""

import time

import torch

from rto_fast.batch import pack_whole
from rto_fast.errors import ModelError, RolloutError
from rto_fast.kernels.sampling_reference import philox_uniforms
from rto_fast.ops import token_logps
from rto_fast.rollout.attention import DenseDecode, PagedDecode, Probe
from rto_fast.rollout.base import RolloutBatch, finish_reasons
from rto_fast.rollout.cache import PagedCache, memory_budget
from rto_fast.rollout.decode import DecodeState, DecodeStep, Sampler
from rto_fast.rollout.fuse import lay_side_by_side
from rto_fast.rollout.model import RolloutModel
from rto_fast.rollout.scheduler import Prompt, Scheduler, prefill_chunk


class NativeEngine:
    """Samples from a Hugging Face causal LM.

    Args:
        model: as it is trained: bare, or in DeepSpeed (ZeRO 0–3), DistributedDataParallel, PEFT.
        tokenizer: encodes prompts that are strings. config: `RolloutConfig`.
    Raises:
        ModelError: an architecture whose attention cannot be paged, or whose decoding does not give the log-probs of
            its own forward pass (checked here, on a few tokens).
    """

    def __init__(self, model, tokenizer, config):
        self.tokenizer, self.config = tokenizer, config
        self.model = RolloutModel(model)
        if not self.model.is_zero3:
            lay_side_by_side(self.model.causal_lm.base_model)
        self.state = self.step = None
        self._check()

    @torch.no_grad()
    def generate(self, prompts, n=1, sampling=None, seed=0, *, prompt_numbers=None, limits=None):
        """Samples `n` responses to each prompt.

        Args:
            prompts: lists of token ids, or strings. n: samples per prompt. sampling: `Sampling`.
            seed: with a prompt's number and the sample's among its n, it determines the random numbers of a sample: not
                the batch, its order or the number of ranks. The global random state is neither used nor changed.
            prompt_numbers: of the prompts among those of all ranks (default: 0, 1, …).
            limits: tokens that each of the len(prompts)·n responses may have, where this is less than max_new_tokens.
        Returns:
            RolloutBatch
        Raises:
            RolloutError: a prompt that leaves no room for a response, a stop token outside of the vocabulary, too little
                memory for one sequence, NaN logits. The model is as before, all memory is given back.
        """
        start = time.perf_counter()
        prompt_ids = [self.tokenizer(p)["input_ids"] if isinstance(p, str) else list(p) for p in prompts]
        repeated = [ids for ids in prompt_ids for _ in range(n)]
        context = self._check_input(prompt_ids, sampling)
        limits = [
            min(limit, context - len(ids))
            for ids, limit in zip(repeated, limits or [sampling.max_new_tokens] * len(repeated), strict=True)
        ]
        with self.model.decoding():
            scheduler = self._scheduler(prompt_ids, n, limits, sampling)
            try:
                numbers = range(len(prompts)) if prompt_numbers is None else prompt_numbers
                self.state.reset(self._uniforms(seed, [number * n + i for number in numbers for i in range(n)], limits))
                scheduler.run()
                batch = self._batch(repeated, sampling)
            finally:
                self.cache.release()
        batch.timings = {"rollout": time.perf_counter() - start, **scheduler.seconds}
        batch.stats = {
            "occupancy": (batch.num_tokens - len(repeated)) / max(scheduler.slot_steps, 1),
            "preemptions": scheduler.preemptions, "capture_seconds": self.step.capture_seconds,
        }  # fmt: skip
        return batch

    # What one call needs

    def _check_input(self, prompt_ids, sampling):
        """The model's longest context."""
        vocab_size = self.model.vocab_size
        if outside := [token for token in sampling.stop_ids if not 0 <= token < vocab_size]:
            raise RolloutError(f"stop_ids: {outside} are no tokens of the model, whose vocabulary has {vocab_size}")
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 62
        for index, ids in enumerate(prompt_ids):
            if not 1 <= len(ids) < context:
                raise RolloutError(
                    f"prompt {index} has {len(ids)} tokens; the model takes from 1 to {context - 1} and a response; "
                    "shorten it with data.max_prompt_tokens"
                )
        return context

    def _scheduler(self, prompt_ids, n, limits, sampling):
        device, config = self.model.device, self.config
        samples, is_cuda = len(prompt_ids) * n, device.type == "cuda"
        slots = min(config.batch_size, samples)
        totals = sorted((len(prompt_ids[i // n]) + limit for i, limit in enumerate(limits)), reverse=True)
        # A CPU reads a sequence in place if it is one page, and memory is paged by the system anyway.
        page_size = config.page_size or (64 if is_cuda else -(-totals[0] // 16) * 16)
        if page_size != self.cache.page_size:
            self.cache = PagedCache(self.cache.layers, page_size, self.cache.dtype, device)
            self.state = None
        blocks = self.cache.pages_for(totals[0])
        wanted = sum(map(self.cache.pages_for, totals[:slots])) + (n > 1) * blocks
        self.cache.allocate(wanted, blocks, memory_budget(device, config.kv_cache_gib))
        size = (slots, samples, max(limits), blocks)
        if self.state is None or not self.state.fits(*size):
            self.state, self.step = DecodeState(*size, device), None
        key = (sampling, self.model.addresses() if is_cuda else None)
        if self.step is None or key != self.step_key:
            sampler = Sampler(sampling, self.model.head, device)
            self.step, self.step_key = DecodeStep(self.model, self.cache, self.state, sampler), key
        prompts = [Prompt(ids, list(range(i * n, i * n + n))) for i, ids in enumerate(prompt_ids)]
        return Scheduler(
            self.model, self.cache, self.state, self.step, prompts, limits, ahead=8 if is_cuda else 4,
            prefill_tokens=config.prefill_tokens,
        )  # fmt: skip

    def _uniforms(self, seed, sample_ids, limits):
        device = self.model.device
        ids = torch.tensor(sample_ids, device=device)[:, None]
        return philox_uniforms(seed, ids, torch.arange(max(limits), device=device))

    def _batch(self, prompt_ids, sampling):
        state, count = self.state, len(prompt_ids)
        lengths = state.counts[:count]
        drawn = torch.arange(state.tokens.shape[1], device=lengths.device) < lengths[:, None]
        responses = [ids[:length] for ids, length in zip(state.tokens[:count].tolist(), lengths.tolist())]
        return RolloutBatch(
            prompt_ids, responses, finish_reasons(responses, sampling.stop_ids), state.logps[:count][drawn],
            state.sampling_logps[:count][drawn],
        )  # fmt: skip

    # Whether the model can be decoded

    @torch.no_grad()
    def _check(self):
        """Finds the cache every layer needs, and compares log-probs of a prompt in two pieces and some decoded tokens with
        those of the model's own forward pass."""
        device, name = self.model.device, type(self.model.causal_lm).__name__
        vocab_size = self.model.vocab_size
        ids = [(7 * i + 1) % vocab_size for i in range(16)]
        with self.model.decoding():
            layers, dtype = self._probe(ids, name)
            self.cache = PagedCache(layers, self.config.page_size or 64, dtype, device)
            self.cache.allocate(1, 1, memory_budget(device, self.config.kv_cache_gib))
            try:
                logits = self.model.logits(self._decode(ids)).float()
            finally:
                self.cache.release()
            softcap, divisor = self.model.head.softcap, self.model.head.divisor
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits / divisor
        labels = torch.tensor(ids[10:], device=device)
        found = token_logps(logits, labels)
        expected = token_logps(self.model.packed_logits(pack_whole([ids[:-1]], device))[9:].float(), labels)
        error = (found - expected).abs().mean().item()
        if not error < (1e-3 if dtype.itemsize >= 4 else 0.1):
            raise ModelError(f"{name}: decoded log-probs differ from those of its forward pass by {error:.3g} nats")

    def _probe(self, ids, name):
        """([(kv heads, head_dim)] of the layers, dtype), from a forward pass."""
        device = self.model.device
        batch = pack_whole([ids], device)
        probe = Probe(batch.cu_seqlens, batch.max_seqlen)
        hidden = self.model.hidden(batch.input_ids, batch.position_ids, probe)
        if sorted(probe.layers) != list(range(self.model.config.get_text_config().num_hidden_layers)):
            raise ModelError(f"{name}: not every layer is an attention that a KV cache serves")
        return [tuple(probe.layers[i]) for i in sorted(probe.layers)], hidden.dtype

    def _decode(self, ids):
        """[6, D] last hidden states of tokens 9 to 14: a prompt of ten in two pieces, then one token at a time."""
        prompt, device = Prompt(ids[:10], [0]), self.model.device
        for begin, end in ((0, 6), (6, 10)):
            prefill_chunk(self.model, self.cache, [(prompt, [0], begin, end)])
        hidden = [prompt.hidden]
        table = torch.zeros(1, 1, dtype=torch.int32, device=device)
        for position in range(10, 15):
            state = self.cache, table, torch.tensor([position], device=device), torch.tensor([True], device=device)
            decode = PagedDecode(*state) if state[2].is_cuda else DenseDecode(*state, position + 1, (0, 1))
            hidden.append(self.model.hidden(torch.tensor([ids[position]], device=device), state[2], decode)[0])
        return torch.stack(hidden)
