"""The native engine: decodes on the training weights, in the training process.

No second copy of the model, no sync, no staleness: each call reads the weights as they are, and the log-probs it returns
are the behaviour policy's own. Continuous batching over a paged KV cache; on a GPU, Triton kernels in CUDA graphs.
"""

import time
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from rto_fast.config import RolloutConfig, check_rollout
from rto_fast.errors import RolloutError
from rto_fast.kernels.sampling_reference import philox_uniforms
from rto_fast.models.model import Model
from rto_fast.rollout.base import RolloutBatch, Sampling, check_request, finish_reasons, token_ids
from rto_fast.rollout.cache import PagedCache, memory_budget
from rto_fast.rollout.decode import DecodeState, DecodeStep, Sampler
from rto_fast.rollout.model import RolloutModel
from rto_fast.rollout.scheduler import PREFILL_TOKENS, Request, Scheduler
from rto_fast.rollout.verify import verified_cache


class NativeEngine:
    """Samples from a Hugging Face causal LM.

    Args:
        model: as it is trained: bare, or in DeepSpeed (ZeRO 0–3), DistributedDataParallel, PEFT.
        tokenizer: encodes prompts that are strings; without one there are none.
        page_size: tokens in a page of the KV cache, a power of two from 16. Default: 64, and on a CPU a whole sequence.
        prefill_tokens: prompt tokens computed at once.
    Raises:
        ConfigError: a setting that cannot be.
        ModelError: an architecture whose attention cannot be paged, or whose decoding does not give the log-probs of
            its own forward pass (checked here, on a few tokens).
    """

    def __init__(
        self,
        model: Model | nn.Module,
        tokenizer: PreTrainedTokenizerBase | None,
        config: RolloutConfig,
        *,
        page_size: int | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
    ):
        check_rollout(config)
        self.page_size, self.prefill_tokens = page_size, prefill_tokens
        self.model, self.tokenizer, self.config = RolloutModel(model), tokenizer, config
        self.state: DecodeState | None
        self.step: DecodeStep | None = None
        self.step_key: tuple | None = None
        self.cache: PagedCache
        self.model.lay_side_by_side()
        self._check()

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int] | str],
        n: int,
        sampling: Sampling,
        seed: int = 0,
        *,
        prompt_numbers: Sequence[int] | None = None,
        limits: Sequence[int] | None = None,
    ) -> RolloutBatch:
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
        )
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
                raise RolloutError(
                    f"rollout: out of memory ({str(error).splitlines()[0]}); lower "
                    "rollout.kv_cache_gib or rollout.batch_size"
                ) from error
            finally:
                self.cache.release()
        batch.timings = {"rollout": time.perf_counter() - start, **scheduler.seconds}
        batch.stats = {
            # Of the tokens that decode steps had room for.
            "occupancy": (batch.num_tokens - scheduler.begun) / max(scheduler.slot_steps, 1),
            "preemptions": scheduler.preemptions,
            "capture_seconds": scheduler.step.capture_seconds - captured,
        }
        return batch

    # What one call needs

    def _scheduler(self, prompt_ids, n, limits, sampling):
        device, config = self.model.device, self.config
        samples, is_cuda = len(prompt_ids) * n, device.type == "cuda"
        slots = min(config.batch_size, samples)
        totals = sorted((len(prompt_ids[i // n]) + limit for i, limit in enumerate(limits)), reverse=True)
        # A CPU reads a sequence in place if it is one page, and memory is paged by the system anyway.
        page_size = self.page_size or (64 if is_cuda else -(-totals[0] // 16) * 16)
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
            self.model,
            self.cache,
            self.state,
            self.step,
            requests,
            limits,
            slots=slots,
            ahead=8 if is_cuda else 4,
            prefill_tokens=self.prefill_tokens,
        )

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
            prompt_ids,
            responses,
            finish_reasons(responses, sampling.stop_ids),
            state.logps[:count][drawn],
            state.sampling_logps[:count][drawn],
        )

    def _check(self) -> None:
        self.state = None
        self.cache = verified_cache(self.model, self.page_size or 64)
        self.kind = self.model.kind
