"""Checks whether a model can be decoded, by comparing decoded logits with those of its own forward pass."""

import torch
from torch import Tensor

from rto_fast.batch import pack_whole
from rto_fast.errors import ModelError, RolloutError, error_text
from rto_fast.models.agreement import compare_logits
from rto_fast.models.checks import check_sequences
from rto_fast.models.precision import higher_precision
from rto_fast.rollout.attention import DenseDecode, PagedDecode, Probe, runs_triton
from rto_fast.rollout.cache import PagedCache
from rto_fast.rollout.model import RolloutModel
from rto_fast.rollout.scheduler import Request, prefill_chunk

PROMPT_LENGTHS = (7, 10, 13, 16)  # of the sequences that are decoded together and compared
DECODED = 6  # positions compared of each: the prompt's last token and the tokens decoded after it


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
