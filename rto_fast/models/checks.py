"""Checks of a loaded model: its packed forward passes must compute what its own forward pass of each sequence computes.

They find what would otherwise train on wrong numbers without an error: an unknown transformation of the logits, sequences
that leak into each other, a training mode that computes something else. `rto_fast.models.agreement` says what counts as
rounding.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from rto_fast.batch import PackedBatch, pack_whole
from rto_fast.errors import ModelError
from rto_fast.models.agreement import Agreement, compare_logits, compare_values
from rto_fast.models.attention import attention_implementation
from rto_fast.models.forward import packed_logits, scores_of, token_scores
from rto_fast.models.precision import higher_precision, precise
from rto_fast.models.trace import Pass, first_difference, naming_layer


@torch.no_grad()
def check_causal_lm(model: PreTrainedModel, name: str) -> None:
    """Compares the logits of packed sequences with the model's own of each sequence.

    Args:
        name: of the model in messages.

    Raises:
        ModelError: They differ by more than rounding, or the model cannot run packed sequences.
    """
    ids = check_sequences(model.get_output_embeddings().weight.shape[0], [12, 16, 20])
    with _precisions(model, name) as precisions:
        for precision in precisions:
            _Check(model, name, "log-probs", " nats", precision, compare_logits, packed_logits, _own_logits).packing(
                ids
            )


@torch.no_grad()
def check_scorer(model: PreTrainedModel, name: str) -> None:
    """Compares the scores of packed sequences with the model's own of each sequence.

    The model's own forward pass returns one score for a sequence. In the higher precision that score must be the head's
    score of the token at `read_position`.

    Args:
        name: of the model in messages.

    Raises:
        ModelError: They differ by more than rounding, or the model cannot run packed sequences.
    """
    ids = check_sequences(model.get_input_embeddings().weight.shape[0], [12, 15, 18, 21])
    batch = pack_whole(ids, model.device)
    read = [first + read_position(s, model.config) for first, s in zip(batch.cu_seqlens.tolist(), ids)]
    with _precisions(model, name) as precisions:
        for precision in precisions:
            check = _Check(model, name, "scores", "", precision, compare_values, token_scores, _own_token_scores)
            found, truth = check.packing(ids)
            with precise(model, higher_precision(precision)):
                returned = _own_logits(model, ids)[:, 0]
            apart = (returned - truth[read]).abs().max().item()
            if not apart <= found.limit:
                raise ModelError(
                    f"{name}: packed scores differ from the model's own by {apart:.2g} in {precision}, where rounding "
                    f"explains {found.limit:.2g}: {type(model).__name__} does something to its scores that is not known here"
                )


def read_position(ids: Sequence[int], config: PreTrainedConfig) -> int:
    """Returns the position whose score is that of a sequence, as in transformers' ...ForSequenceClassification.

    It is the last token that is not `pad_token_id` of the configuration, or the first token if all are.
    """
    pad = config.get_text_config().pad_token_id
    return next((i for i in reversed(range(len(ids))) if ids[i] != pad), 0)


def check_sequences(vocab_size: int, lengths: Sequence[int]) -> list[list[int]]:
    """Returns token ids of sequences of these lengths, all different: between equal ones a leak would not show."""
    return [[((5 + 2 * row) * i + row + 1) % vocab_size for i in range(length)] for row, length in enumerate(lengths)]


@dataclass(frozen=True)
class _Check:
    """The comparison of a model's packed forward passes with its own, in one precision."""

    model: PreTrainedModel
    name: str  # of the model in messages
    what: str  # what is compared, in messages
    unit: str
    precision: torch.dtype
    compare: Callable[..., Agreement]  # `compare_logits` or `compare_values`
    packed: Callable[[PreTrainedModel, PackedBatch], torch.Tensor]  # computes a row for each token of a packed batch
    own: Callable[[PreTrainedModel, list[list[int]]], torch.Tensor]  # the same from the model's own forward passes

    def packing(self, ids: list[list[int]]) -> tuple[Agreement, torch.Tensor]:
        """Compares packed sequences with each of them alone, in evaluation mode and in training mode.

        Returns:
            The agreement in evaluation mode, and what the model's own forward pass computes in a higher precision.
        Raises:
            ModelError: They differ by more than rounding.
        """
        with precise(self.model, higher_precision(self.precision)):
            truth = self.own(self.model, ids)
        if truth.isnan().any():
            raise ModelError(
                f"{self.name}: its {self.what} are NaN: a number in config.json or its weights are damaged"
            )
        batch = pack_whole(ids, self.model.device)
        with precise(self.model, self.precision):
            own, evaluated = self.own(self.model, ids), self.packed(self.model, batch)
            self._refuse_leak(batch, evaluated, own)
            found = self.compare(evaluated, own, truth, self.precision)
            if not found.is_rounding:
                self._refuse_packing(ids, batch, found)
            self.model.train()
            trained = self.packed(self.model, batch)
            if not self.compare(trained, own, evaluated, self.precision).is_rounding:
                self._refuse_training(batch)
            self._refuse_leak(batch, trained, own)
            self.model.eval()
        return found, truth

    def _refuse_leak(self, batch: PackedBatch, packed: torch.Tensor, own: torch.Tensor) -> None:
        """Refuses a model whose second sequence, which has neighbours on both sides, changes with them.

        The neighbours become other tokens with embeddings of NaN, which a leak passes on however small its weight is. In 16
        bits their embeddings stay, because attention kernels may load a neighbour's rows and multiply them by 0.
        """
        middle = slice(*batch.cu_seqlens[1:3].tolist())
        inside = torch.zeros(batch.num_tokens, dtype=torch.bool, device=batch.input_ids.device)
        inside[middle] = True
        vocab_size = self.model.get_input_embeddings().weight.shape[0]
        other = replace(batch, input_ids=torch.where(inside, batch.input_ids, (batch.input_ids + 7) % vocab_size))

        def spoil(module: torch.nn.Module, inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
            return embedded.masked_fill(~inside[:, None], torch.nan) if self.precision.itemsize > 2 else embedded

        def spoiled() -> torch.Tensor:
            with self.model.get_input_embeddings().register_forward_hook(spoil):
                return self.packed(self.model, other)

        if self.compare(spoiled()[middle], own[middle], packed[middle], self.precision).is_rounding:
            return
        undisturbed = Pass(lambda: self.packed(self.model, batch), batch.num_tokens, middle)
        layer = self._layer(undisturbed, Pass(spoiled, batch.num_tokens, middle))
        raise ModelError(
            f"{self.name}: {layer} lets a packed sequence see its neighbours: it mixes positions by something else than "
            "transformers' attention interface (a convolution, a recurrent state, a mask of its own), so this model "
            "cannot be trained here; give one whose every layer is attention"
        )

    def _refuse_training(self, batch: PackedBatch) -> None:
        one = Pass(lambda: self.packed(self.model, batch), batch.num_tokens, slice(0, batch.num_tokens))
        is_random = not torch.equal(one.run(), one.run())
        evaluating = replace(one, run=lambda: (self.model.eval(), one.run(), self.model.train()))
        layer = self._layer(one, one if is_random else evaluating)
        reason = (
            "draws random numbers in training mode (dropout that no rate in config.json turns off, noise, sampled experts)"
            if is_random
            else "computes something else in training mode than in evaluation mode"
        )
        raise ModelError(
            f"{self.name}: {layer} {reason}; the probability ratio of an unchanged policy would not be 1, so this model "
            "cannot be trained here"
        )

    def _refuse_packing(self, ids: list[list[int]], batch: PackedBatch, found: Agreement) -> None:
        layer = self._layer(
            Pass(lambda: _own_logits(self.model, ids[1:2]), len(ids[1]), slice(0, len(ids[1]))),
            Pass(lambda: self.packed(self.model, batch), batch.num_tokens, slice(*batch.cu_seqlens[1:3].tolist())),
            f"something between hidden states and {self.what} that is not known here",
        )
        raise ModelError(
            f"{self.name}: packed {self.what} differ from the model's own by {found.error:.2g}{self.unit} in "
            f"{self.precision}, where rounding explains {found.limit:.2g}; the cause is {layer}"
        )

    def _layer(self, one: Pass, other: Pass, unknown: str | None = None) -> str:
        """Returns the layer in which two passes begin to differ, as messages name it."""
        tolerance = 0.05 if self.precision.itemsize < 4 else 1e-4
        return first_difference(self.model, one, other, tolerance) or unknown or type(self.model).__name__


@contextlib.contextmanager
def _precisions(model: PreTrainedModel, name: str) -> Iterator[list[torch.dtype]]:
    """Puts the model in evaluation mode for a check, and yields the precisions that the check computes in.

    The smallest leak shows in the first, float32 or float64. The last is the model's own, which has other kernels.

    Raises:
        ModelError: The model cannot run what the check runs.
    """
    dtype, training = next(model.parameters()).dtype, model.training
    try:
        model.eval()
        with naming_layer(model, name):
            yield list(dict.fromkeys((torch.promote_types(dtype, torch.float32), dtype)))
    finally:
        model.train(training)


def _own_rows(model: PreTrainedModel, run: Callable[..., torch.Tensor], ids: list[list[int]]) -> torch.Tensor:
    """Concatenates `run(input_ids=…, use_cache=False)` of each sequence alone, [1, n, C] or [1, C], to [N, C]."""
    with attention_implementation(model, "eager"):
        rows = (torch.tensor([sequence], device=model.device) for sequence in ids)
        return torch.cat([run(input_ids=row, use_cache=False).flatten(0, -2) for row in rows])


def _own_logits(model: PreTrainedModel, ids: list[list[int]]) -> torch.Tensor:
    """Returns the logits [T, V] of the model's own forward pass of each sequence, or a scorer's scores [N, 1]."""
    return _own_rows(model, lambda **inputs: model(**inputs).logits, ids)


def _own_token_scores(model: PreTrainedModel, ids: list[list[int]]) -> torch.Tensor:
    """Returns the score [T] of every position of the model's own forward pass of each sequence."""
    return scores_of(model, _own_rows(model, lambda **inputs: model.base_model(**inputs).last_hidden_state, ids))
