"""Models and tokenizers from disk or hub, and the two forward passes every stage is made of."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rto_fast.agreement import compare_logits
from rto_fast.batch import PackedBatch, pack_whole
from rto_fast.errors import ModelError
from rto_fast.kernels import reference
from rto_fast.models.attention import PACKED
from rto_fast.models.head import OpLinear
from rto_fast.models.placement import activate, device_of, whole_forward
from rto_fast.models.precision import higher_precision, precise
from rto_fast.ops import linear_token_logps


@dataclass(frozen=True)
class Head:
    """How hidden states become logits: z = (h @ weight.T + bias) / divisor, or softcap·tanh(z / softcap)."""

    weight: torch.Tensor  # [V, D]
    bias: torch.Tensor | None
    divisor: float  # Granite divides its logits, Cohere multiplies them
    softcap: float | None  # Gemma-2
    linear: torch.nn.Module  # the layer they belong to

    def run(self, op, hidden, labels, *args, temperature=1.0, **options):
        """A linear op of `rto_fast.ops` on this head."""
        options |= {"temperature": temperature * self.divisor, "softcap": self.softcap}
        return run_linear(self.linear, op, hidden, labels, *args, **options)


def run_linear(linear, op, hidden, *args, **options):
    """`op(hidden, weight, ...)` of a linear layer, as its own forward pass where hooks gather its weight."""
    if isinstance(linear, OpLinear):
        return linear(hidden, op=op, args=args, **options)
    if linear.bias is not None:
        options["bias"] = linear.bias
    return op(hidden, linear.weight, *args, **options)


def resolve_dtype(name: str, device: torch.device | str) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    return getattr(torch, name)


def _from_pretrained(auto_class, what, path, **options):
    try:
        return auto_class.from_pretrained(path, **options)
    except (OSError, ValueError, RuntimeError) as error:
        is_local, reason = os.path.isdir(path), str(error).strip().splitlines()[0]
        place = "this directory" if is_local else "this name (no such directory; tried as a hub id)"
        remedy = "" if is_local else "; check the name and the network, or give a local directory"
        raise ModelError(f"{path}: cannot load {what} from {place}: {reason}{remedy}") from error


def vocabulary_size(path: str, *, trust_remote_code: bool = False) -> int:
    """Embeddings of the model at `path`."""
    from transformers import AutoConfig

    config = _from_pretrained(AutoConfig, "a model", path, trust_remote_code=trust_remote_code)
    return config.get_text_config().vocab_size


def check_vocabulary(
    path: str, tokenizer: PreTrainedTokenizerBase, key: str, *, trust_remote_code: bool = False
) -> None:
    """Raises ModelError unless the model at `path` (a configuration's `key`) reads `tokenizer`'s ids as they are meant;
    of a model without a tokenizer of its own only the number of embeddings is known."""
    size = vocabulary_size(path, trust_remote_code=trust_remote_code)
    try:
        same = load_tokenizer(path, trust_remote_code=trust_remote_code).get_vocab() == tokenizer.get_vocab()
    except ModelError:
        same = True
    if not same or size < len(tokenizer):
        raise ModelError(
            f"{key}: {path} has a vocabulary of {size} tokens that is not the policy's ({len(tokenizer)} tokens); "
            "its log-probs of the policy's tokens would mean nothing; give models that share one tokenizer"
        )


def check_weights(path: str) -> None:
    """Raises ModelError unless a directory holds whole safetensors; of a name on the hub nothing is known yet."""
    if not os.path.isdir(path):
        return
    files = sorted(Path(path).glob("*.safetensors"))
    if not files:
        pickles = [file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in Path(path).glob(pattern)]
        reason = f"{pickles[0]} is a pickle, which can run code, and is not read" if pickles else "there are none"
        raise ModelError(f"{path}: no weights in safetensors: {reason}; write them with model.save_pretrained")
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file}: damaged weights: {error}; copy the file again") from error


def _load_weights(auto_class, what, path, **options):
    """(model, names of the parameters that the checkpoint does not hold)."""
    check_weights(path)
    with _quiet():  # transformers only warns of missing weights; here they are wanted or refused
        model, info = _from_pretrained(
            auto_class, what, path, use_safetensors=True, output_loading_info=True, **options
        )
    return model, set(info["missing_keys"])


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return _from_pretrained(AutoTokenizer, "a tokenizer", path, trust_remote_code=trust_remote_code)


def _prepare(model, path, device, trainable, gradient_checkpointing):
    model.set_attn_implementation(PACKED)
    if model.config._attn_implementation != PACKED:
        raise ModelError(f"{path}: {type(model).__name__} does not use transformers' attention interface, "
                         "so its sequences cannot be packed")  # fmt: skip
    # Dropout would make log-probs random: the probability ratio of an unchanged policy must be exactly 1.
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    model.to(device).requires_grad_(trainable).train(trainable)
    if trainable and gradient_checkpointing:
        # transformers renamed it between 5.17 and 5.23
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model


def load_causal_lm(
    path: str, *, device: torch.device | str, dtype: torch.dtype, trainable: bool, gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:  # fmt: skip
    """A causal language model ready for packed sequences, its logits checked against `causal_logps`.

    Args:
        path: directory or hub id. dtype: of the weights. trainable: train mode and gradients, or neither.
    Raises:
        ModelError: nothing usable at `path`, or an architecture that cannot be packed.
    """
    from transformers import AutoModelForCausalLM

    model, missing = _load_weights(
        AutoModelForCausalLM, "a causal language model", path, dtype=dtype, trust_remote_code=trust_remote_code
    )
    _refuse_missing(missing, path)
    model = _prepare(model, path, device, trainable, gradient_checkpointing)
    check_causal_lm(model, path)
    return model


def load_scorer(
    path: str, *, device: torch.device | str, dtype: torch.dtype, trainable: bool, gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:  # fmt: skip
    """A sequence classification model with one label: a reward model (its score of the last token) or a critic (its
    score of every token). From a causal language model directory the backbone is taken and the head starts at 0."""
    from transformers import AutoModelForSequenceClassification

    model, missing = _load_weights(
        AutoModelForSequenceClassification,
        "a sequence classifier with one label",
        path,
        dtype=dtype,
        num_labels=1,
        trust_remote_code=trust_remote_code,
    )
    head = score_head(model)
    head_keys = {name for name, p in model.named_parameters() if any(p is q for q in head.parameters())}
    _refuse_missing(missing - head_keys, path)
    if missing:
        with torch.no_grad():
            for p in head.parameters():
                p.zero_()
    return _prepare(model, path, device, trainable, gradient_checkpointing)


def _refuse_missing(names, path):
    if names:
        raise ModelError(f"{path}: the checkpoint lacks weights: {', '.join(sorted(names))}")


@contextlib.contextmanager
def _quiet():
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def score_head(model: PreTrainedModel) -> nn.Linear:
    head = getattr(model, "score", None)
    if head is None:
        raise ModelError(f"{type(model).__name__}: no `score` head; reward models and critics need a decoder with "
                         "Hugging Face's ...ForSequenceClassification head")  # fmt: skip
    return head


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


@whole_forward
def causal_logps(model: PreTrainedModel, batch: PackedBatch, *, temperature: float = 1.0) -> torch.Tensor:
    """Log-prob of each label, [T] float32 (0 where the label is ignored), never holding [T, V] logits."""
    hidden = forward_hidden(model, batch)
    return output_head(model).run(linear_token_logps, hidden, batch.labels, temperature=temperature)


def _float_linear(hidden, weight, bias=None):
    return F.linear(hidden.float(), weight.float(), None if bias is None else bias.float())


@whole_forward
def token_scores(model: PreTrainedModel, batch: PackedBatch) -> torch.Tensor:
    """The score head at every position, [T], in float32: at 20 a bfloat16 score has steps of an eighth."""
    return run_linear(score_head(model), _float_linear, forward_hidden(model, batch)).squeeze(-1)


def packed_logits(model: PreTrainedModel, batch: PackedBatch) -> torch.Tensor:
    """[T, V] logits of a packed batch, by the path that training takes: for checks on a few tokens."""
    return output_head(model).run(_logits, forward_hidden(model, batch), None)


def _logits(
    hidden: torch.Tensor, weight: torch.Tensor, labels: None, *, bias: torch.Tensor | None = None, temperature: float,
    softcap: float | None,
) -> torch.Tensor:  # fmt: skip
    """In float32 at least: 16-bit logits are rounded to an eighth where they are large."""
    logits = _float_linear(hidden, weight, bias)
    return softcap * torch.tanh(logits / softcap) if softcap else logits / temperature


@torch.no_grad()
def precise_logps(model: nn.Module, batch: PackedBatch, *, temperature: float = 1.0) -> torch.Tensor:
    """`causal_logps` in a higher precision than the model's, [T]; of ZeRO-3 the weights must be whole."""
    activate(model)
    with precise(model, higher_precision(next(model.parameters()).dtype)):
        hidden = forward_hidden(model, batch)
        return output_head(model).run(reference.linear_token_logps, hidden, batch.labels, temperature=temperature)


@torch.no_grad()
def check_causal_lm(model: PreTrainedModel, name: str) -> None:
    """Compares packed sequences with the model's own logits of each alone (see `rto_fast.agreement`).

    Catches what would otherwise train silently on wrong numbers: an unknown logit transformation, sequences that leak. It
    looks twice: in a high precision, where the smallest leak shows, and in the model's dtype, whose kernels are others.

    Raises:
        ModelError: they are further apart than rounding explains.
    """
    device, dtype = device_of(model), next(model.parameters()).dtype
    vocab_size = model.get_output_embeddings().weight.shape[0]
    ids = [[(7 * i + 3 * j * i + j) % vocab_size for i in range(8 + 4 * j)] for j in range(1, 4)]
    training = model.training
    model.eval()
    try:
        for precision in dict.fromkeys((torch.promote_types(dtype, torch.float32), dtype)):
            with precise(model, higher_precision(precision)):
                truth = _own_logits(model, ids)
            with precise(model, precision):
                found = compare_logits(packed_logits(model, pack_whole(ids, device)), _own_logits(model, ids), truth)
            if not found.is_rounding:
                raise ModelError(
                    f"{name}: packed log-probs differ from the model's own by {found.error:.2g} nats in {precision}, where "
                    f"rounding explains {found.limit:.2g}: {type(model).__name__} does something between hidden states and "
                    "logits that is not known here, or does not respect packing"
                )
    finally:
        model.train(training)


def _own_logits(model: PreTrainedModel, ids: list[list[int]]) -> torch.Tensor:
    """[T, V]: the model's own, of each sequence alone."""
    with attention_implementation(model, "eager"):
        rows = (torch.tensor([sequence], device=device_of(model)) for sequence in ids)
        return torch.cat([model(input_ids=row, use_cache=False).logits[0] for row in rows])


@contextlib.contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[PreTrainedModel]:
    """The model with another attention implementation, restored whatever happens."""
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(name)
        yield model
    finally:
        model.set_attn_implementation(before)
