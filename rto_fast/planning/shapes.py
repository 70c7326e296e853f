"""The sizes of a model that decide how much memory it takes.

Parameters are counted on the model itself, built from its configuration on torch's meta device, which holds no data.
"""

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from rto_fast.data.world import model_config
from rto_fast.errors import ConfigError, error_text
from rto_fast.models.decoder import decoder_of
from rto_fast.models.placement import projection_groups

# Public models that can be planned without their files, with the sizes of their config.json.
KNOWN: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("known_models.json").read_text())


@dataclass(frozen=True)
class Shape:
    """The sizes of a causal language model, in elements."""

    name: str
    parameters: int  # a tied one counts once
    layer_weights: int  # elements of the matrices of all layers
    largest: int  # elements of the largest parameter
    tied: bool  # the output layer is the embedding
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    gated: bool  # the MLP has a gate, as Llama's
    head_norms: bool  # queries and keys are normalised, as in Qwen3
    sandwich: bool  # attention and MLP have a norm after them too, as in Gemma
    unit_offset: bool  # norms store their weight minus 1, as in Gemma
    has_our_layers: bool  # our decoder knows the family
    beside: int  # elements of the projections that are laid side by side when the model is loaded
    linears: tuple[tuple[str, int], ...]  # linear layers of the backbone: name, inputs plus outputs

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def head_weights(self) -> int:
        return self.hidden_size * self.vocab_size

    @property
    def scorer_parameters(self) -> int:
        """Parameters with a score head of one label in place of the output layer."""
        return self.parameters - (0 if self.tied else self.head_weights) + self.hidden_size

    def adapter_parameters(self, rank: int, targets: str) -> int:
        """Parameters of LoRA adapters: A is [rank, inputs], B is [outputs, rank]."""
        return rank * sum(size for _, size in self._adapted(targets))

    def adapters(self, targets: str) -> int:
        """The number of linear layers that have one."""
        return len(self._adapted(targets))

    def _adapted(self, targets: str) -> list[tuple[str, int]]:
        ends = tuple(targets.replace(" ", "").split(","))
        return [(name, size) for name, size in self.linears if targets == "all-linear" or name.endswith(ends)]

    @property
    def kv_elements(self) -> int:
        """Elements of one token's keys and values, in all layers."""
        return 2 * self.layers * self.key_width


def shape_of(config: PreTrainedConfig, name: str) -> Shape:
    """The shape of the model that a transformers configuration describes.

    Raises:
        ConfigError: the model is not a decoder of attention layers; no other can be trained.
    """
    text = config.get_text_config()
    if not _size(text, "num_attention_heads"):
        raise ConfigError(
            f"{name}: {config.model_type} has layers without attention heads (a recurrent state): no run trains it, so "
            "there is nothing to plan; give a decoder whose every layer is attention"
        )
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # the model's own code may raise anything
        raise ConfigError(
            f"{name}: {config.model_type} cannot be a causal language model: {error_text(error)}"
        ) from error
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    matrices = [
        p for p in model.base_model.parameters() if p.dim() >= 2 and p.shape != embeddings.shape and p is not head
    ]
    linears = [
        (name, module.in_features + module.out_features)
        for name, module in model.base_model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    heads, decoder = _size(text, "num_attention_heads"), decoder_of(model)
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return Shape(
        name=name,
        parameters=sum(p.numel() for p in model.parameters()),
        layer_weights=sum(p.numel() for p in matrices),
        largest=max(p.numel() for p in model.parameters()),
        tied=head is embeddings,
        layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        intermediate_size=_size(text, "intermediate_size") or 4 * text.hidden_size,
        heads=heads,
        kv_heads=_size(text, "num_key_value_heads") or heads,
        head_dim=_size(text, "head_dim") or text.hidden_size // heads,
        vocab_size=head.shape[0],
        gated="gate_proj" in names,
        head_norms="q_norm" in names,
        sandwich="post_feedforward_layernorm" in names,
        unit_offset=decoder is not None and decoder.spec.family.unit_offset,
        has_our_layers=decoder is not None,
        beside=sum(linear.weight.numel() for group in projection_groups(model) for linear in group),
        linears=tuple(linears),
    )


def _size(text: Any, key: str) -> int:
    """A size of the configuration: 0 where it is left out, the largest where each layer has its own."""
    try:
        value = getattr(text, key, None)
    except Exception:  # transformers refuses to give one value for layers that differ
        value = [getattr(text.per_layer_config[i], key, None) for i in range(text.num_hidden_layers)]
    return max([size or 0 for size in value], default=0) if isinstance(value, list | tuple) else value or 0


@cache
def find_shape(path: str, substitute: str | None = None) -> Shape:
    """The shape of the model at `path`. Nothing is downloaded.

    Args:
        path: `embedded`, a local directory, a hub id that is known or in the hub's cache.
        substitute: directory or hub id whose shape is taken where the shape of `path` is not known.
    Raises:
        ConfigError: neither is known.
    """
    name = path.rstrip("/").rpartition("/")[2]
    if path == "embedded":
        return shape_of(model_config(), path)
    if path in KNOWN and not os.path.isdir(path):
        values = dict(KNOWN[path])
        return shape_of(AutoConfig.for_model(values.pop("model_type"), **values), name)
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        if substitute and substitute != path:
            return find_shape(substitute)
        raise ConfigError(
            f"{path}: no config.json of this model here, and its shape is not known; give a local directory, or one of "
            f"the same shape as --model_shape (or {', '.join(KNOWN)})"
        ) from error
    return shape_of(config, name)
