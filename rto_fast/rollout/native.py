"""The native engine: decodes on the training weights, in the training process.

There is no second copy of the model, so nothing is synchronised or stale: each call reads the present weights, and returns
the log-probs of the policy that sampled. It batches continuously over a paged KV cache, on a GPU with Triton kernels in CUDA
graphs.
"""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rto_fast.batch import pack_whole
from rto_fast.config import RolloutConfig, check_rollout
from rto_fast.errors import ModelError, RolloutError, error_text
from rto_fast.kernels.sampling_reference import philox_uniforms
from rto_fast.models.agreement import compare_logits
from rto_fast.models.checks import check_sequences
from rto_fast.models.model import Model
from rto_fast.models.precision import higher_precision
from rto_fast.rollout import exactness
from rto_fast.rollout.attention import DenseDecode, PagedDecode, Probe, runs_triton
from rto_fast.rollout.base import Engine, Exactness, RolloutBatch, Sampling, finish_reasons
from rto_fast.rollout.cache import PagedCache, choose_page_size, memory_budget, wanted_pages
from rto_fast.rollout.decode import DecodeState, DecodeStep, Sampler
from rto_fast.rollout.model import RolloutModel
from rto_fast.rollout.scheduler import PREFILL_TOKENS, Request, Scheduler, prefill_chunk

PROMPT_LENGTHS = (7, 10, 13, 16)  # of the sequences that are decoded together and compared
DECODED = 6  # positions compared of each: the prompt's last token and the tokens decoded after it


class NativeEngine(Engine):
    """Samples from a Hugging Face causal LM.

    The random numbers of a sample are determined by the seed and by the numbers of the prompt and of the sample. They do not
    depend on the batch, its order or the number of ranks, and the global random state is not used. After an error the model
    is as before, and all memory is freed.

    Args:
        model: the model that is trained, bare or inside DeepSpeed (ZeRO 0–3), DistributedDataParallel or PEFT.
        tokenizer: encodes prompts that are strings. Without a tokenizer, prompts must be token ids.
        page_size: tokens in a page of the KV cache, a power of two from 16. Default: see `choose_page_size`.
        prefill_tokens: prompt tokens that are computed at once.
    Raises:
        ConfigError: a setting is invalid.
        ModelError: the model's attention cannot use a paged cache, or decoded log-probs differ from those of its forward
            pass. A few tokens are decoded here to check this. On a GPU more are, for `exactness`.
    """

    def __init__(
        self,
        model: Model | nn.Module,
        tokenizer: PreTrainedTokenizerBase | None,
        config: RolloutConfig,
        *,
        page_size: int | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
    ) -> None:
        check_rollout(config)
        self.page_size, self.prefill_tokens = page_size, prefill_tokens
        self.policy, self.tokenizer, self.config = RolloutModel(model), tokenizer, config
        self.state: DecodeState | None
        self.step: DecodeStep | None = None
        self.step_key: tuple[Any, ...] | None = None
        self.cache: PagedCache
        self.policy.lay_side_by_side()
        self._check()

    def _sample(
        self, prompt_ids: list[list[int]], n: int, sampling: Sampling, seed: int, numbers: list[int], limits: list[int]
    ) -> RolloutBatch:
        if not prompt_ids:
            return RolloutBatch([], [], [], torch.empty(0), torch.empty(0))
        if self.kind != self.policy.kind:
            self._check()
        self.policy.lay_side_by_side()  # weights may have been moved
        with self.policy.decoding(max(len(prompt_ids[i // n]) + limit for i, limit in enumerate(limits))):
            try:
                scheduler = self._scheduler(prompt_ids, n, limits, sampling)
                captured = scheduler.step.capture_seconds
                ids = torch.tensor(
                    [[number * n + i] for number in numbers for i in range(n)], device=self.policy.device
                )
                positions = torch.arange(max(limits), device=self.policy.device)
                scheduler.state.reset(philox_uniforms(seed, ids, positions))
                scheduler.run()
                batch = self._batch(scheduler.state, [ids for ids in prompt_ids for _ in range(n)], sampling)
            except torch.OutOfMemoryError as error:
                raise RolloutError(
                    f"rollout: out of memory ({str(error).splitlines()[0]}); lower "
                    "rollout.kv_cache_gib or rollout.batch_size"
                ) from error
            finally:
                self.cache.release()
        batch.exact = self.exactness.holds
        batch.timings = scheduler.seconds
        batch.stats = {
            # The share of the slots of decode steps that gave a token.
            "occupancy": (batch.num_tokens - scheduler.begun) / max(scheduler.slot_steps, 1),
            "preemptions": scheduler.preemptions,
            "capture_seconds": scheduler.step.capture_seconds - captured,
        }
        return batch

    def _scheduler(self, prompt_ids: list[list[int]], n: int, limits: list[int], sampling: Sampling) -> Scheduler:
        device, config = self.policy.device, self.config
        samples, is_cuda = len(prompt_ids) * n, device.type == "cuda"
        slots = min(config.batch_size, samples)
        totals = sorted((len(prompt_ids[i // n]) + limit for i, limit in enumerate(limits)), reverse=True)
        page_size = self.page_size or choose_page_size(totals[0], is_cuda)
        if page_size != self.cache.page_size:
            self.cache = PagedCache(self.cache.layers, page_size, self.cache.dtype, device)
            self.state = None
        blocks = self.cache.pages_for(totals[0])
        # CUDA graphs hold the state. It gets a little more room, so that the next rollout need not capture them again.
        size = (slots, samples, max(limits), 1 << (blocks - 1).bit_length())
        if self.state is None or not self.state.fits(*size):
            self.state, self.step = DecodeState(*size, device), None
        key = (sampling, self.policy.addresses() if is_cuda else None)
        if self.step is None or key != self.step_key:
            sampler = Sampler(sampling, self.policy.head, device)
            # ZeRO-3 gathers the weights to other addresses each time.
            use_graphs = config.cuda_graphs and not self.policy.is_zero3
            self.step, self.step_key = DecodeStep(self.policy, self.cache, self.state, sampler, use_graphs), key
        self.cache.allocate(
            wanted_pages(totals[:slots], totals[0], n, page_size), blocks, memory_budget(device, config.kv_cache_gib)
        )
        requests = [Request(ids, list(range(i * n, i * n + n))) for i, ids in enumerate(prompt_ids)]
        return Scheduler(
            self.policy,
            self.cache,
            self.state,
            self.step,
            requests,
            limits,
            slots=slots,
            ahead=8 if is_cuda else 4,
            prefill_tokens=self.prefill_tokens,
        )

    @staticmethod
    def _batch(state: DecodeState, prompt_ids: list[list[int]], sampling: Sampling) -> RolloutBatch:
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
        self.cache = verified_cache(self.policy, self.page_size or 64)
        self.kind, self.exactness = self.policy.kind, Exactness()
        self.exactness = self.measure_exactness()

    def measure_exactness(self) -> Exactness:
        """Compares the log-probs of samples with those of the training forward pass, bit by bit."""
        if reason := exactness.reason_against(self.policy):
            return Exactness(reason=reason)
        twin = copy.copy(self)  # with a state of its own
        twin.prefill_tokens, twin.state, twin.step, twin.step_key = exactness.PREFILL_TOKENS, None, None, None
        # A graph has the bits of the step that it repeats. These few tokens do not count as rollout.kv_cache_gib.
        twin.config = replace(self.config, cuda_graphs=False, kv_cache_gib=None)
        return exactness.measure(twin, self.config.temperature)


@torch.no_grad()
def verified_cache(model: RolloutModel, page_size: int = 64) -> PagedCache:
    """The cache that the model's layers need, after a check that decoding with it computes the model.

    Prompts are prefilled in two pieces and some tokens are decoded, in one batch. See `rto_fast.models.agreement`.

    Raises:
        ModelError: the model cannot be decoded, or its decoded logits differ by more than rounding explains.
    """
    name = type(model.causal_lm).__name__
    sequences = check_sequences(model.vocab_size, [length + DECODED for length in PROMPT_LENGTHS])
    batch = pack_whole(sequences, model.device)
    ends = [length - 1 for length in PROMPT_LENGTHS]
    rows = [first + end + i for first, end in zip(batch.cu_seqlens.tolist(), ends) for i in range(DECODED)]
    try:
        with model.decoding(max(map(len, sequences))):
            layers, dtype = _probe(model, sequences[-1], name)
            cache = PagedCache(layers, page_size, dtype, model.device)
            decoded = _decoded_logits(model, cache, sequences)
        own = model.packed_logits(batch)[rows]
        precision = model.kind[1]
        truth = model.packed_logits(batch, higher_precision(precision))[rows]
    except (ModelError, RolloutError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # from code that we do not know: whatever it is, it is no model for this engine
        raise ModelError(f"{name} cannot be decoded natively: {error_text(error)}") from error
    found = compare_logits(decoded, own, truth, precision)
    if not found.is_rounding:
        raise ModelError(
            f"{name}: decoded log-probs differ from those of its forward pass by {found.error:.2g} nats, where rounding "
            f"explains {found.limit:.2g}"
        )
    return cache


def _probe(model: RolloutModel, ids: list[int], name: str) -> tuple[list[tuple[int, int]], torch.dtype]:
    """((kv heads, head_dim) of each layer, dtype of the hidden states), from a forward pass."""
    batch = pack_whole([ids], model.device)
    probe = Probe(batch.cu_seqlens, batch.max_seqlen)
    for module in model.causal_lm.modules():
        kinds = getattr(module, "rope_type", None)
        if {"longrope", "dynamic"} & set(kinds.values() if isinstance(kinds, dict) else [kinds]):
            raise ModelError(
                f"{name}: its RoPE ({kinds}) changes with the longest sequence of a batch, so a sample would depend on its "
                "neighbours"
            )
    hidden = model.backbone(batch.input_ids, batch.position_ids, probe)
    if sorted(probe.layers) != list(range(model.config.get_text_config().num_hidden_layers)):
        raise ModelError(f"{name}: not every layer is an attention that a KV cache serves")
    return [probe.layers[i] for i in sorted(probe.layers)], hidden.dtype


def _decoded_logits(model: RolloutModel, cache: PagedCache, sequences: list[list[int]]) -> Tensor:
    """Logits [len(sequences) · DECODED, V], sequence after sequence."""
    pages = cache.pages_for(max(map(len, sequences)))
    count = pages * len(sequences)
    cache.allocate(
        count, count, (count + 1) * cache.page_bytes
    )  # these few tokens do not count as rollout.kv_cache_gib
    try:
        return model.head.logits(model.logits(_decode(model, cache, sequences, pages)))
    finally:
        cache.release()


def _decode(model: RolloutModel, cache: PagedCache, sequences: list[list[int]], pages: int) -> Tensor:
    """Last hidden states [len(sequences) · DECODED, D]: of prompts in two pieces, then of all sequences token by token."""
    count, device = len(sequences), model.device
    table = torch.arange(count * pages, dtype=torch.int32, device=device).view(count, pages)
    prompts = [Request(ids[:length], [row]) for row, (ids, length) in enumerate(zip(sequences, PROMPT_LENGTHS))]
    middles = [2 * length // 3 for length in PROMPT_LENGTHS]
    own = table.tolist()
    prefill_chunk(model, cache, [(p, own[row], 0, middles[row]) for row, p in enumerate(prompts)])
    prefill_chunk(model, cache, [(p, own[row], middles[row], len(p.ids)) for row, p in enumerate(prompts)])
    hidden = [torch.stack([prompt.hidden for prompt in prompts])]
    places = torch.tensor(PROMPT_LENGTHS, device=device)
    for step in range(DECODED - 1):
        positions = places + step
        ids = torch.tensor([ids[length + step] for ids, length in zip(sequences, PROMPT_LENGTHS)], device=device)
        if runs_triton(positions):
            page = table.gather(1, (positions // cache.page_size)[:, None])[:, 0].long()
            slot_mapping = page * cache.page_size + positions % cache.page_size
            decode = PagedDecode(cache, table, slot_mapping, (positions + 1).int())
        else:
            longest = max(PROMPT_LENGTHS) + step + 1
            decode = DenseDecode(cache, table, positions, positions >= 0, longest, (0, count) if pages == 1 else None)
        hidden.append(model.hidden(ids, positions, decode))
    return torch.stack(hidden, 1).flatten(0, 1)
