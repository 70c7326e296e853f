"""Forward passes over packed sequences: hidden states, log-probs and scores."""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from rto_fast.batch import PackedBatch
from rto_fast.kernels import reference
from rto_fast.models.decoder import Packed, decoder_of
from rto_fast.models.head import Head, output_head, score_head
from rto_fast.models.precision import higher_precision, is_precise, linear_in, precise
from rto_fast.ops import linear_token_logps


def packed_inputs(batch: PackedBatch) -> dict[str, Any]:
    """The arguments by which a transformers model takes a packed batch: one row, and where its sequences begin."""
    return {
        "input_ids": batch.input_ids[None],
        "position_ids": batch.position_ids[None],
        "cu_seq_lens_q": batch.cu_seqlens,
        "cu_seq_lens_k": batch.cu_seqlens,
        "max_length_q": batch.max_seqlen,
        "max_length_k": batch.max_seqlen,
        "use_cache": False,
    }


def forward_hidden(model: PreTrainedModel, batch: PackedBatch) -> torch.Tensor:
    """Returns the last hidden states [T, D] of the backbone, without logits.

    Our decoder computes them if it knows the model. In a higher precision (`precise`), the model's own layers do, because
    that is what our decoder is compared with; and under autocast, which knows nothing of our ops.
    """
    is_own = is_precise() or torch.is_autocast_enabled(batch.input_ids.device.type)
    decoder = None if is_own else decoder_of(model)
    if decoder is None:
        return model.base_model(**packed_inputs(batch)).last_hidden_state[0]
    view = Packed(batch.cu_seqlens, batch.max_seqlen)
    return decoder(batch.input_ids, batch.position_ids, view, longest=batch.max_seqlen)


def causal_logps(model: PreTrainedModel, batch: PackedBatch, *, temperature: float = 1.0) -> torch.Tensor:
    """Returns the log-prob of each label, [T] float32, 0 where the label is ignored; never holds logits [T, V]."""
    hidden = forward_hidden(model, batch)
    return output_head(model).run(linear_token_logps, hidden, batch.labels, rows=batch.rows, temperature=temperature)


@torch.no_grad()
def precise_logps(model: PreTrainedModel, batch: PackedBatch, *, temperature: float = 1.0) -> torch.Tensor:
    """`causal_logps` in a higher precision than the model's, [T]. With ZeRO-3 the weights must be whole."""
    with precise(model, higher_precision(next(model.parameters()).dtype)):
        hidden = forward_hidden(model, batch)
        op = reference.linear_token_logps
        return output_head(model).run(op, hidden, batch.labels, rows=batch.rows, temperature=temperature)


def packed_logits(model: PreTrainedModel, batch: PackedBatch) -> torch.Tensor:
    """Returns the logits [T, V] that training computes log-probs from, for checks on a few tokens.

    They are float32 or float64: large 16-bit logits are rounded to an eighth.
    """
    head, hidden = output_head(model), forward_hidden(model, batch)
    return head.logits(linear_in(torch.promote_types(hidden.dtype, torch.float32), hidden, head.weight, head.bias))


def token_scores(model: PreTrainedModel, batch: PackedBatch) -> torch.Tensor:
    """Returns a scorer's score of every position, [T] float32."""
    return scores_of(model, forward_hidden(model, batch))


def scores_of(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Returns the scores [T] float32 of hidden states [T, D]. In bfloat16 a score of 20 would be rounded to an eighth."""
    return Head.of(score_head(model)).run(_float_linear, hidden).squeeze(-1)


def _float_linear(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return F.linear(hidden.float(), weight.float(), None if bias is None else bias.float())
