"""Models from disk or hub, and the two forward passes every stage is made of."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from rto_fast.batch import PackedBatch, pack_whole
from rto_fast.errors import ModelError, UserError, error_text
from rto_fast.kernels import reference
from rto_fast.models.agreement import Agreement, compare_logits, compare_values
from rto_fast.models.attention import PACKED
from rto_fast.models.directory import KINDS, check_fit, check_weights, from_pretrained, quiet, refuse_misfit
from rto_fast.models.dropout import disable_dropout
from rto_fast.models.head import OpLinear, score_head
from rto_fast.models.precision import higher_precision, linear_in, precise
from rto_fast.models.trace import Pass, failing_layer, first_difference, misses_mask, title
from rto_fast.ops import linear_token_logps
from rto_fast.system.progress import progress


@dataclass(frozen=True)
class Head:
    """How hidden states become logits: z = (h @ weight.T + bias) / divisor, or softcap·tanh(z / softcap)."""

    weight: torch.Tensor  # [V, D]
    bias: torch.Tensor | None
    divisor: float  # Granite divides its logits, Cohere multiplies them
    softcap: float | None  # Gemma-2
    linear: torch.nn.Module  # the layer they belong to

    def logits(self, linear_output: torch.Tensor) -> torch.Tensor:
        """The logits, from what the linear layer makes of hidden states."""
        if self.softcap:
            return self.softcap * torch.tanh(linear_output / self.softcap)
        return linear_output / self.divisor

    def options(self, temperature: float) -> dict[str, Any]:
        """The arguments by which a linear op of `rto_fast.ops` computes this head's logits, divided by `temperature`."""
        return {"temperature": temperature * self.divisor, "softcap": self.softcap}


def run_linear(linear: torch.nn.Module, op: Callable, hidden: torch.Tensor, *args: Any, **options: Any) -> Any:
    """Computes `op(hidden, weight, ...)` of a linear layer, as its own forward pass where hooks gather its weight."""
    if isinstance(linear, OpLinear):
        return linear(hidden, op=op, args=args, **options)
    if linear.bias is not None:
        options["bias"] = linear.bias
    return op(hidden, linear.weight, *args, **options)


def resolve_dtype(name: str, device: torch.device | str) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    return getattr(torch, name)


def _load_weights(
    path: str,
    kind: str,
    *,
    device: torch.device | str,
    trainable: bool,
    gradient_checkpointing: bool,
    trust_remote_code: bool,
    new_head: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """A model of one of `KINDS`, ready for packed sequences; every weight of it and of its checkpoint is in use."""
    check_weights(path)
    if new_head:
        check_fit(path, "causal_lm", trust_remote_code=trust_remote_code)
    what, auto_class, settings = KINDS[kind]
    with quiet():  # transformers only warns of weights that do not fit; here they are refused
        model, info = from_pretrained(
            getattr(transformers, auto_class),
            what,
            path,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=trust_remote_code,
            **options,
            **settings,
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise ModelError(
            f"{path}: its weights are quantised (quantization_config) and are not trained here; give the "
            "model as it was before"
        )
    if new_head:
        own = {name for name, p in model.named_parameters() if any(p is q for q in score_head(model).parameters())}
        # The language model's output layer is not used. That nothing else is left out was seen by its own loading.
        info |= {"missing_keys": info["missing_keys"] - own, "unexpected_keys": set()}
    refuse_misfit(path, kind, info)
    return _prepare(model, path, device, trainable, gradient_checkpointing)


def _prepare(
    model: PreTrainedModel, path: str, device: torch.device | str, trainable: bool, gradient_checkpointing: bool
) -> PreTrainedModel:
    with quiet():  # one line is enough
        model.set_attn_implementation(PACKED)
    if model.config._attn_implementation != PACKED:
        layer = next((title(*m) for m in model.named_modules() if "attention" in type(m[1]).__name__.lower()), "it")
        raise ModelError(
            f"{path}: {type(model).__name__}: {layer} does not use transformers' attention interface, "
            "so its sequences cannot be packed"
        )
    if model.base_model is model:
        raise ModelError(
            f"{path}: {type(model).__name__} names no backbone (base_model_prefix) whose hidden states could be read"
        )
    model.to(device).requires_grad_(trainable).eval()
    for key, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ModelError(
                f"{path}: {key} holds NaN or infinity; the run that wrote it failed, or the file is damaged"
            )
    # Many tokenizers pad with the token that ends a response, whose embedding must learn.
    model.get_input_embeddings().padding_idx = None
    with torch.no_grad(), _refusing(model, path), precise(model, higher_precision(next(model.parameters()).dtype)):
        ids = check_sequences(model.get_input_embeddings().weight.shape[0], [12, 16])
        disable_dropout(model, lambda: forward_hidden(model, pack_whole(ids, device)))
    model.train(trainable)
    if trainable and gradient_checkpointing:
        # transformers renamed it between 5.17 and 5.23
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model


def load_causal_lm(
    path: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    trainable: bool,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A causal language model ready for packed sequences, its logits checked against `causal_logps`.

    Args:
        path: directory or hub id. dtype: of the weights. trainable: train mode and gradients, or neither.
    Raises:
        ModelError: nothing usable at `path`, or an architecture that cannot be packed.
    """
    with progress(f"loading and checking {path}"):
        model = _load_weights(
            path,
            "causal_lm",
            device=device,
            trainable=trainable,
            gradient_checkpointing=gradient_checkpointing,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
        check_causal_lm(model, path)
    return model


def load_scorer(
    path: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    trainable: bool,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
    new_head: bool = False,
) -> PreTrainedModel:
    """A sequence classification model with one label: a reward model (its score of the last token) or a critic (its
    score of every token).

    Args:
        path: directory or hub id. dtype: of the weights. trainable: train mode and gradients, or neither.
        new_head: `path` is a causal language model's, to be trained: the backbone is taken, and the head starts at 0.
    Raises:
        ModelError: nothing usable at `path`, or scores that are not those of the model's own forward pass.
    """
    with progress(f"loading and checking {path}"):
        model = _load_weights(
            path,
            "scorer",
            device=device,
            trainable=trainable,
            gradient_checkpointing=gradient_checkpointing,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            new_head=new_head,
        )
        check_scorer(model, path)
    if new_head:  # not before the check: all scores would be 0, whatever leaks
        with torch.no_grad():
            for p in score_head(model).parameters():
                p.zero_()
    return model


def output_head(model: PreTrainedModel) -> Head:
    """The language model's `Head`, from its modules and configuration."""
    linear = model.get_output_embeddings()
    config = model.config.get_text_config()
    divisor = getattr(config, "logits_scaling", None) or 1.0 / (getattr(config, "logit_scale", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    if softcap and divisor != 1.0:  # the divisor joins the temperature, which comes after the softcap
        raise ModelError(f"{type(model).__name__}: both a logit scale and a softcap; not supported")
    return Head(linear.weight, getattr(linear, "bias", None), divisor, softcap, linear)


def forward_hidden(model: PreTrainedModel, batch: PackedBatch) -> torch.Tensor:
    """Last hidden states of a packed batch, [T, D]: the backbone only, no logits."""
    return model.base_model(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        cu_seq_lens_q=batch.cu_seqlens,
        cu_seq_lens_k=batch.cu_seqlens,
        max_length_q=batch.max_seqlen,
        max_length_k=batch.max_seqlen,
        use_cache=False,
    ).last_hidden_state[0]


def causal_logps(model: PreTrainedModel, batch: PackedBatch, *, temperature: float = 1.0) -> torch.Tensor:
    """Log-prob of each label, [T] float32 (0 where the label is ignored), never holding [T, V] logits."""
    hidden, head = forward_hidden(model, batch), output_head(model)
    return run_linear(head.linear, linear_token_logps, hidden, batch.labels, **head.options(temperature))


def _float_linear(hidden, weight, bias=None):
    return F.linear(hidden.float(), weight.float(), None if bias is None else bias.float())


def token_scores(model: PreTrainedModel, batch: PackedBatch) -> torch.Tensor:
    """The score head at every position, [T], in float32: at 20 a bfloat16 score has steps of an eighth."""
    return run_linear(score_head(model), _float_linear, forward_hidden(model, batch)).squeeze(-1)


def packed_logits(model: PreTrainedModel, batch: PackedBatch) -> torch.Tensor:
    """[T, V] logits of a packed batch, by the path that training takes: for checks on a few tokens.

    In float32 at least: 16-bit logits are rounded to an eighth where they are large.
    """
    head, hidden = output_head(model), forward_hidden(model, batch)
    return head.logits(linear_in(torch.promote_types(hidden.dtype, torch.float32), hidden, head.weight, head.bias))


@torch.no_grad()
def precise_logps(model: torch.nn.Module, batch: PackedBatch, *, temperature: float = 1.0) -> torch.Tensor:
    """`causal_logps` in a higher precision than the model's, [T]. With ZeRO-3 the weights must be whole."""
    with precise(model, higher_precision(next(model.parameters()).dtype)):
        hidden, head = forward_hidden(model, batch), output_head(model)
        return run_linear(head.linear, reference.linear_token_logps, hidden, batch.labels, **head.options(temperature))


def read_position(ids: Sequence[int], config: PreTrainedConfig) -> int:
    """The position whose score is that of a sequence: transformers' ...ForSequenceClassification reads the last token that
    is no padding token (`pad_token_id` of its config), were it all over the sequence the first."""
    pad = config.get_text_config().pad_token_id
    return next((i for i in reversed(range(len(ids))) if ids[i] != pad), 0)


@torch.no_grad()
def check_scorer(model: PreTrainedModel, name: str) -> None:
    """Compares `token_scores` of packed sequences with those of the model's own forward pass of each alone.

    Of a sequence that pass returns one score: in the higher precision it must be the head's score of the token read.

    Raises:
        ModelError: they differ: the class does something to the score, or reads another token; or see `check_causal_lm`.
    """
    ids = check_sequences(model.get_input_embeddings().weight.shape[0], [12, 15, 18, 21])
    batch = pack_whole(ids, model.device)
    read = [first + read_position(s, model.config) for first, s in zip(batch.cu_seqlens.tolist(), ids)]
    with _precisions(model, name) as precisions:
        for precision in precisions:
            with precise(model, higher_precision(precision)):
                truth, returned = _own_token_scores(model, ids), _own_logits(model, ids)[:, 0]
            with precise(model, precision):
                own = _own_token_scores(model, ids)
                check = _Check(model, name, "scores", "", precision, compare_values, token_scores)
                found = check.packing(ids, own, truth)
            apart = (returned - truth[read]).abs().max().item()
            if not apart <= found.limit:
                raise ModelError(
                    f"{name}: packed scores differ from the model's own by {apart:.2g} in {precision}, where rounding "
                    f"explains {found.limit:.2g}: {type(model).__name__} does something to its scores that is not known here"
                )


@torch.no_grad()
def check_causal_lm(model: PreTrainedModel, name: str) -> None:
    """Compares packed sequences with the model's own logits of each alone (see `rto_fast.models.agreement`).

    Catches what would otherwise train silently on wrong numbers: an unknown logit transformation, sequences that leak, a
    training mode that computes something else.

    Raises:
        ModelError: they are further apart than rounding explains.
    """
    ids = check_sequences(model.get_output_embeddings().weight.shape[0], [12, 16, 20])
    with _precisions(model, name) as precisions:
        for precision in precisions:
            with precise(model, higher_precision(precision)):
                truth = _own_logits(model, ids)
            with precise(model, precision):
                own = _own_logits(model, ids)
                _Check(model, name, "log-probs", " nats", precision, compare_logits, packed_logits).packing(
                    ids, own, truth
                )


def check_sequences(vocab_size: int, lengths: Sequence[int]) -> list[list[int]]:
    """Sequences of these lengths that do not look alike, or a leak between them would not show."""
    return [[((5 + 2 * row) * i + row + 1) % vocab_size for i in range(length)] for row, length in enumerate(lengths)]


@dataclass(frozen=True)
class _Check:
    """What is compared of a model in one precision, and what a message calls it.

    compare: `compare_logits` or `compare_values`. packed: a packed batch → what is compared, a row for each token.
    """

    model: PreTrainedModel
    name: str
    what: str
    unit: str
    precision: torch.dtype
    compare: Callable[..., Agreement]
    packed: Callable[[PreTrainedModel, PackedBatch], torch.Tensor]

    def packing(self, ids: list[list[int]], own: torch.Tensor, truth: torch.Tensor) -> Agreement:
        """Compares packed sequences with each alone, in both modes; returns the `Agreement` of evaluation mode.

        Args:
            own, truth: of the model's own forward pass of each sequence, in this precision and in a higher one.
        Raises:
            ModelError: they are further apart than rounding explains.
        """
        if truth.isnan().any():
            raise ModelError(
                f"{self.name}: its {self.what} are NaN: a number in config.json or its weights are damaged"
            )
        batch = pack_whole(ids, self.model.device)
        self.model.eval()
        evaluated = self.packed(self.model, batch)
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
        return found

    def _refuse_leak(self, batch: PackedBatch, packed: torch.Tensor, own: torch.Tensor) -> None:
        """The second sequence, with a neighbour on either side, must not change when they do. They become other tokens
        whose embeddings are NaN: what a layer makes of them is NaN, however weak its weights are. (Not in 16 bits, whose
        attention kernels may load a neighbour's rows and give them the weight 0.)"""
        start, end = batch.cu_seqlens[1:3].tolist()
        middle = slice(start, end)
        inside = torch.zeros(batch.num_tokens, dtype=torch.bool, device=batch.input_ids.device)
        inside[middle] = True
        vocab_size = self.model.get_input_embeddings().weight.shape[0]
        other = replace(batch, input_ids=torch.where(inside, batch.input_ids, (batch.input_ids + 7) % vocab_size))

        def spoil(module: torch.nn.Module, inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
            return embedded.masked_fill(~inside[:, None], torch.nan) if self.precision.itemsize > 2 else embedded

        def spoiled() -> torch.Tensor:
            hook = self.model.get_input_embeddings().register_forward_hook(spoil)
            try:
                return self.packed(self.model, other)
            finally:
                hook.remove()

        found = self.compare(spoiled()[middle], own[middle], packed[middle], self.precision)
        if found.is_rounding:
            return
        tokens = batch.num_tokens
        layer = self._layer(Pass(lambda: self.packed(self.model, batch), tokens, middle), Pass(spoiled, tokens, middle))
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
        start, end = batch.cu_seqlens[1:3].tolist()
        layer = self._layer(
            Pass(lambda: _own_logits(self.model, ids[1:2]), end - start, slice(0, end - start)),
            Pass(lambda: self.packed(self.model, batch), batch.num_tokens, slice(start, end)),
            f"something between hidden states and {self.what} that is not known here",
        )
        raise ModelError(
            f"{self.name}: packed {self.what} differ from the model's own by {found.error:.2g}{self.unit} in "
            f"{self.precision}, where rounding explains {found.limit:.2g}; the cause is {layer}"
        )

    def _layer(self, one: Pass, other: Pass, unknown: str | None = None) -> str:
        tolerance = 0.05 if self.precision.itemsize < 4 else 1e-4
        return first_difference(self.model, one, other, tolerance) or unknown or type(self.model).__name__


@contextlib.contextmanager
def _precisions(model: PreTrainedModel, name: str) -> Iterator[list[torch.dtype]]:
    """The precisions that a check runs in, the model in evaluation mode meanwhile: first a high one, where the smallest
    leak shows, then the model's own, whose kernels are others.

    Raises:
        ModelError: the model cannot be run as the check does.
    """
    dtype, training = next(model.parameters()).dtype, model.training
    try:
        model.eval()
        with _refusing(model, name):
            yield list(dict.fromkeys((torch.promote_types(dtype, torch.float32), dtype)))
    finally:
        model.train(training)


@contextlib.contextmanager
def _refusing(model: PreTrainedModel, name: str) -> Iterator[None]:
    """What fails inside becomes a ModelError that names the layer."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # from code that we do not know: whatever it is, the model cannot be trained
        layer = failing_layer(model, error) or type(model).__name__
        reason = "it needs an attention mask, and they have none" if misses_mask(error) else error_text(error)
        raise ModelError(f"{name}: {layer} cannot run packed sequences: {reason}") from error


def _own_rows(model: PreTrainedModel, run: Callable[..., torch.Tensor], ids: list[list[int]]) -> torch.Tensor:
    """`run(input_ids=…, use_cache=False)` of each sequence alone, [1, n, C] or [1, C]; concatenated to [N, C]."""
    with attention_implementation(model, "eager"):
        rows = (torch.tensor([sequence], device=model.device) for sequence in ids)
        return torch.cat([run(input_ids=row, use_cache=False).flatten(0, -2) for row in rows])


def _own_logits(model: PreTrainedModel, ids: list[list[int]]) -> torch.Tensor:
    """What the model's own forward pass returns of each sequence alone: [T, V], or [N, 1] scores."""
    return _own_rows(model, lambda **inputs: model(**inputs).logits, ids)


def _own_token_scores(model: PreTrainedModel, ids: list[list[int]]) -> torch.Tensor:
    """The score head at every position of the model's own forward pass of each sequence alone, [T]."""
    hidden = _own_rows(model, lambda **inputs: model.base_model(**inputs).last_hidden_state, ids)
    return run_linear(score_head(model), _float_linear, hidden).squeeze(-1)


@contextlib.contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[PreTrainedModel]:
    """The model with another attention implementation, restored whatever happens."""
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(name)
        yield model
    finally:
        model.set_attn_implementation(before)
