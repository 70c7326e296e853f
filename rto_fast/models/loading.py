"""Loads models from a directory or the hub, and makes them ready for packed sequences."""

from collections.abc import Callable

import torch
import transformers
from transformers import PreTrainedModel

from rto_fast.batch import pack_whole
from rto_fast.errors import ModelError
from rto_fast.models.attention import PACKED
from rto_fast.models.checks import check_causal_lm, check_scorer, check_sequences
from rto_fast.models.decoder import decoder_of, layers_of
from rto_fast.models.decoder_check import check_decoder
from rto_fast.models.directory import KINDS, Kind, check_fit, check_weights, from_pretrained, quiet, refuse_misfit
from rto_fast.models.dropout import disable_dropout
from rto_fast.models.embedding import use_op_embeddings
from rto_fast.models.forward import forward_hidden
from rto_fast.models.head import score_head
from rto_fast.models.liger import use_liger
from rto_fast.models.placement import lay_side_by_side, projection_groups
from rto_fast.models.precision import higher_precision, precise
from rto_fast.models.trace import naming_layer, title
from rto_fast.system.progress import progress


def resolve_dtype(name: str, device: torch.device | str) -> torch.dtype:
    """Returns the dtype that `model.dtype` names; "auto" is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    return getattr(torch, name)


def load_model(
    kind: Kind,
    path: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    trainable: bool,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
    new_head: bool = False,
    say: Callable[[str], object] = lambda line: None,
) -> PreTrainedModel:
    """Loads a model and checks its packed forward passes (`rto_fast.models.checks`).

    Args:
        kind: "causal_lm", or "scorer" for a sequence classifier with one label. A reward model uses the score of a
            sequence's last token, a critic those of all tokens.
        path: directory or hub id.
        dtype: of the weights.
        trainable: whether the model is in training mode and its parameters require gradients.
        new_head: builds the scorer from the backbone of a causal language model at `path` and a head of zeros.
        say: is called with a line that says which layers the model runs.

    Raises:
        ModelError: `path` holds no usable model of this kind, or its sequences cannot be packed.
    """
    with progress(f"loading and checking {path}"):
        model = _read(kind, path, new_head, dtype, trust_remote_code)
        _prepare(model, path, device, trainable)
        if trainable and gradient_checkpointing:
            # transformers renamed it between 5.17 and 5.23
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        check_decoder(model, path, gradients=trainable)
        (check_scorer if kind == "scorer" else check_causal_lm)(model, path)
        if decoder_of(model) is None:
            use_liger(model)
    say(f"models: {path} runs {layers_of(model)}")
    if new_head:  # after the check, in which no leak would show if all scores were 0
        for parameter in score_head(model).parameters():
            torch.nn.init.zeros_(parameter)
    return model


def _read(kind: Kind, path: str, new_head: bool, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """Reads a model whose weights and the checkpoint's are the same, the output layers apart if it gets a new head."""
    check_weights(path)
    if new_head:
        check_fit(path, "causal_lm", trust_remote_code=trust_remote_code)
    what, auto_class, settings = KINDS[kind]
    with quiet():  # transformers only warns of weights that do not fit; `refuse_misfit` refuses them
        model, info = from_pretrained(
            getattr(transformers, auto_class),
            what,
            path,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=trust_remote_code,
            dtype=dtype,
            **settings,
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise ModelError(
            f"{path}: its weights are quantised (quantization_config) and are not trained here; give the "
            "model as it was before"
        )
    if new_head:
        own = {name for name, p in model.named_parameters() if any(p is q for q in score_head(model).parameters())}
        # The checkpoint's output layer is not used; `check_fit` has seen that every other weight is.
        info |= {"missing_keys": info["missing_keys"] - own, "unexpected_keys": set()}
    refuse_misfit(path, kind, info)
    return model


def _prepare(model: PreTrainedModel, path: str, device: torch.device | str, trainable: bool) -> None:
    """Moves the model to its device, gives it packed attention and turns dropout off; refuses what cannot be packed."""
    with quiet():  # the ModelError below says the same as transformers' warning
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
    lay_side_by_side(projection_groups(model))  # before an optimizer or DeepSpeed holds their addresses
    for key, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ModelError(
                f"{path}: {key} holds NaN or infinity; the run that wrote it failed, or the file is damaged"
            )
    use_op_embeddings(model)
    # Many tokenizers pad with the token that ends a response, whose embedding must learn.
    model.get_input_embeddings().padding_idx = None
    with torch.no_grad(), naming_layer(model, path), precise(model, higher_precision(next(model.parameters()).dtype)):
        ids = check_sequences(model.get_input_embeddings().weight.shape[0], [12, 16])
        disable_dropout(model, lambda: forward_hidden(model, pack_whole(ids, device)))
    model.train(trainable)
