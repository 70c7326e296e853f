"""The native engine: decodes on the training weights, in the training process.

No second copy of the model, no sync, no staleness: each call reads the weights as they are, and the log-probs it returns
are the behaviour policy's own. Continuous batching over a paged KV cache; on a GPU, Triton kernels in CUDA graphs.
"""

import time
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from rto_fast.batch import pack_whole
from rto_fast.config import RolloutConfig, check_rollout
from rto_fast.errors import ModelError, RolloutError
from rto_fast.kernels.sampling_reference import philox_uniforms
from rto_fast.ops import token_logps
from rto_fast.rollout.attention import DenseDecode, PagedDecode, Probe, runs_triton
from rto_fast.rollout.base import RolloutBatch, Sampling, check_request, finish_reasons, token_ids
from rto_fast.rollout.cache import PagedCache, memory_budget
from rto_fast.rollout.decode import DecodeState, DecodeStep, Sampler
from rto_fast.rollout.model import RolloutModel
from rto_fast.rollout.scheduler import Request, Scheduler, prefill_chunk


class NativeEngine:
    """Samples from a Hugging Face causal LM.

    Args:
        model: as it is trained: bare, or in DeepSpeed (ZeRO 0–3), DistributedDataParallel, PEFT.
        tokenizer: encodes prompts that are strings; without one there are none.
    Raises:
        ConfigError: a setting that cannot be.
        ModelError: an architecture whose attention cannot be paged, or whose decoding does not give the log-probs of
            its own forward pass (checked here, on a few tokens).
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, config: RolloutConfig):
        check_rollout(config)
        self.model, self.tokenizer, self.config = RolloutModel(model), tokenizer, config
        self.state: DecodeState | None
        self.step: DecodeStep | None = None
        self.step_key: tuple | None = None
        self.cache: PagedCache
        self.model.lay_side_by_side()
        self._check()

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int] | str], n: int, sampling: Sampling, seed: int = 0, *,
        prompt_numbers: Sequence[int] | None = None, limits: Sequence[int] | None = None,
    ) -> RolloutBatch:  # fmt: skip
        """Samples `n` responses to each prompt.

        Args:
            prompts: lists of token ids, or strings. n: samples per prompt.
            seed: with a prompt's number and the sample's among its n, it determines the random numbers of a sample: not
                the batch, its order or the number of ranks. The global random state is neither used nor changed.
            prompt_numbers: of the prompts among those of all ranks (default: 0, 1, …).
            limits: tokens that each of the len(prompts)·n responses may have, where this is less than max_new_tokens.
        Raises:
            RolloutError: a prompt that leaves no room for a response, a stop token outside of the vocabulary, too little
                memory for one sequence, NaN logits, a model that another thread has at work. The model is as before, all
                memory is given back.
        """
        start = time.perf_counter()
        prompt_ids = token_ids(prompts, self.tokenizer)
        limits, numbers = check_request(
            prompt_ids, n, sampling, self.model.vocab_size, self.model.context, prompt_numbers, limits
        )  # fmt: skip
        if not prompt_ids:
            return RolloutBatch([], [], [], torch.empty(0), torch.empty(0))
        if self.kind != self.model.kind:
            self._check()
        self.model.lay_side_by_side()  # weights may have been moved
        with self.model.decoding(max(len(prompt_ids[i // n]) + limit for i, limit in enumerate(limits))):
            try:
                scheduler = self._scheduler(prompt_ids, n, limits, sampling)
                captured = scheduler.step.capture_seconds
                sample_ids = [number * n + i for number in numbers for i in range(n)]
                scheduler.state.reset(self._uniforms(seed, sample_ids, limits))
                scheduler.run()
                batch = self._batch(scheduler.state, [ids for ids in prompt_ids for _ in range(n)], sampling)
            except torch.OutOfMemoryError as error:
                raise RolloutError(f"rollout: out of memory ({str(error).splitlines()[0]}); lower rollout.prefill_tokens, "
                                   "rollout.kv_cache_gib or rollout.batch_size") from error  # fmt: skip
            finally:
                self.cache.release()
        batch.timings = {"rollout": time.perf_counter() - start, **scheduler.seconds}
        batch.stats = {
            # Of the tokens that decode steps had room for.
            "occupancy": (batch.num_tokens - scheduler.begun) / max(scheduler.slot_steps, 1),
            "preemptions": scheduler.preemptions, "capture_seconds": scheduler.step.capture_seconds - captured,
        }  # fmt: skip
        return batch

    # What one call needs

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
        # Graphs hold the state: a little more room, and the next rollout need not capture them anew.
        size = (slots, samples, max(limits), 1 << (blocks - 1).bit_length())
        if self.state is None or not self.state.fits(*size):
            self.state, self.step = DecodeState(*size, device), None
        key = (sampling, self.model.addresses() if is_cuda else None)
        if self.step is None or key != self.step_key:
            sampler = Sampler(sampling, self.model.head, device)
            # ZeRO-3 gathers the weights to other addresses every time.
            use_graphs = config.cuda_graphs and not self.model.is_zero3
            self.step, self.step_key = DecodeStep(self.model, self.cache, self.state, sampler, use_graphs), key
        wanted = sum(map(self.cache.pages_for, totals[:slots])) + (n > 1) * blocks
        self.cache.allocate(wanted, blocks, memory_budget(device, config.kv_cache_gib))
        requests = [Request(ids, list(range(i * n, i * n + n))) for i, ids in enumerate(prompt_ids)]
        return Scheduler(
            self.model, self.cache, self.state, self.step, requests, limits, slots=slots, ahead=8 if is_cuda else 4,
            prefill_tokens=config.prefill_tokens,
        )  # fmt: skip

    def _uniforms(self, seed, sample_ids, limits):
        device = self.model.device
        ids = torch.tensor(sample_ids, device=device)[:, None]
        return philox_uniforms(seed, ids, torch.arange(max(limits), device=device))

    @staticmethod
    def _batch(state, prompt_ids, sampling):
        count = len(prompt_ids)
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
        self.state = None
        ids = [(7 * i + 1) % self.model.vocab_size for i in range(16)]
        labels = torch.tensor(ids[10:], device=device)
        try:
            logits, dtype = self._decoded_logits(ids, name)
            own = self.model.packed_logits(pack_whole([ids[:-1]], device))[9:].float()
        except (ModelError, RolloutError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # from code that we do not know: whatever it is, it is no model for this engine
            raise ModelError(f"{name} cannot be decoded natively: {type(error).__name__}: {error}") from error
        error = (token_logps(logits, labels) - token_logps(own, labels)).abs().mean().item()
        if not error < (1e-3 if dtype.itemsize >= 4 else 0.1):
            raise ModelError(f"{name}: decoded log-probs differ from those of its forward pass by {error:.3g} nats")
        self.kind = self.model.kind

    def _decoded_logits(self, ids, name):
        """(logits [6, V] of tokens 9 to 14, dtype of the weights)."""
        with self.model.decoding(len(ids)):
            layers, dtype = self._probe(ids, name)
            device = self.model.device
            self.cache = PagedCache(layers, self.config.page_size or 64, dtype, device)
            self.cache.allocate(1, 1, memory_budget(device, self.config.kv_cache_gib))
            try:
                logits = self.model.logits(self._decode(ids))
            finally:
                self.cache.release()
            softcap, divisor = self.model.head.softcap, self.model.head.divisor
            return softcap * torch.tanh(logits / softcap) if softcap else logits / divisor, dtype

    def _probe(self, ids, name):
        """([(kv heads, head_dim)] of the layers, dtype), from a forward pass."""
        device = self.model.device
        batch = pack_whole([ids], device)
        probe = Probe(batch.cu_seqlens, batch.max_seqlen)
        for module in self.model.causal_lm.modules():
            kinds = getattr(module, "rope_type", None)
            if {"longrope", "dynamic"} & set(kinds.values() if isinstance(kinds, dict) else [kinds]):
                raise ModelError(f"{name}: its RoPE ({kinds}) changes with the longest sequence of a batch, so a sample "
                                 "would depend on its neighbours")  # fmt: skip
        hidden = self.model.backbone(batch.input_ids, batch.position_ids, probe)
        if sorted(probe.layers) != list(range(self.model.config.get_text_config().num_hidden_layers)):
            raise ModelError(f"{name}: not every layer is an attention that a KV cache serves")
        return [tuple(probe.layers[i]) for i in sorted(probe.layers)], hidden.dtype

    def _decode(self, ids):
        """[6, D] last hidden states of tokens 9 to 14: a prompt of ten in two pieces, then one token at a time."""
        prompt, device = Request(ids[:10], [0]), self.model.device
        for begin, end in ((0, 6), (6, 10)):
            prefill_chunk(self.model, self.cache, [(prompt, [0], begin, end)])
        hidden: list = [prompt.hidden]
        table = torch.zeros(1, 1, dtype=torch.int32, device=device)
        for position in range(10, 15):
            where = torch.tensor([position], device=device)
            if runs_triton(where):
                decode = PagedDecode(self.cache, table, where, (where + 1).int())
            else:
                decode = DenseDecode(self.cache, table, where, where >= 0, position + 1, (0, 1))
            hidden.append(self.model.hidden(torch.tensor([ids[position]], device=device), where, decode)[0])
        return torch.stack(hidden)
