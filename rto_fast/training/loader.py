"""Loads a run's models: whole, or as adapters of one base (LoRA)."""

from typing import Any

import torch
from transformers import PreTrainedModel

from rto_fast.config import Config
from rto_fast.models.directory import Kind
from rto_fast.models.graphs import PassGraphs, takes_graphs
from rto_fast.models.loading import load_model
from rto_fast.models.lora import Adapter, has_adapter, load_adapter, new_adapter
from rto_fast.models.model import Model
from rto_fast.training import ranks
from rto_fast.training.zero import place_frozen


class Loader:
    """Loads models as the configuration says.

    Args:
        config: of the run.
        placement: the arguments `device`, `dtype`, `trust_remote_code` and, in a training run, `say` of `load_model`.
    """

    def __init__(self, config: Config, placement: dict[str, Any]):
        self.config, self.placement = config, placement
        self.base: PreTrainedModel | None = None
        self.base_path = ""

    def share(self, path: str) -> None:
        """With LoRA the model at `path`, and all adapters of it, are one copy from now on."""
        if self.config.lora.rank and path != self.base_path:
            self.base, self.base_path = self._frozen_base("causal_lm", path), path

    def frozen(self, kind: Kind, path: str) -> Model:
        """A model that is only evaluated, placed as `deepspeed.frozen` says."""
        if self.base is not None and path == self.base_path and kind == "causal_lm":
            return Model(Adapter(self.base))
        if self.base is not None and has_adapter(path, self.base_path):
            return Model(load_adapter(self.base, self._name(kind), path, scorer=kind == "scorer"))
        device = torch.device(self.placement["device"] if self.config.deepspeed.frozen == "resident" else "cpu")
        zero3 = self.config.deepspeed.frozen == "sharded" and ranks.world_size() > 1
        placement = self._placement(path, zero3) | {"device": device}
        model = Model(load_model(kind, path, trainable=False, **placement))
        place_frozen(model, self.config.deepspeed, self.placement["device"])
        return self._with_graphs(model)

    def trained(self, kind: Kind, path: str, new_head: bool = False) -> Model:
        """A model to train: all of it, or an adapter.

        Args:
            new_head: the model at `path` is a causal language model that becomes a scorer.
        """
        is_scorer = kind == "scorer"
        if not self.config.lora.rank:
            return self._with_graphs(Model(self._trainable(kind, path, new_head)))
        if self.base is not None and has_adapter(path, self.base_path):
            return Model(load_adapter(self.base, self._name(kind), path, scorer=is_scorer))
        if self.base is not None and path == self.base_path:
            base, name = self.base, self._name(kind)
        else:
            base, name = self._frozen_base(kind, path, new_head), "default"
        return Model(new_adapter(base, name, self.config.lora, self.config.seed, scorer=is_scorer))

    def _with_graphs(self, model: Model) -> Model:
        if self.config.rollout.cuda_graphs and takes_graphs(model.module):
            model.graphs = PassGraphs(model.module)
        return model

    def _trainable(self, kind: Kind, path: str, new_head: bool = False) -> PreTrainedModel:
        is_zero3 = self.config.deepspeed.zero_stage == 3 and not self.config.lora.rank
        checkpointing, placement = self.config.model.gradient_checkpointing, self._placement(path, is_zero3)
        return load_model(
            kind, path, trainable=True, gradient_checkpointing=checkpointing, new_head=new_head, **placement
        )

    def _frozen_base(self, kind: Kind, path: str, new_head: bool = False) -> PreTrainedModel:
        """A base for adapters. It stays in training mode: activations are checkpointed in no other."""
        return self._trainable(kind, path, new_head).requires_grad_(False)

    def _placement(self, path: str, is_zero3: bool) -> dict[str, Any]:
        """The placement of a model. With ZeRO 3 the line that `load_model` says of its layers would not stay true."""
        say = self.placement.get("say")
        if say is None or not is_zero3:
            return self.placement
        line = f"models: {path} runs transformers' layers: ZeRO 3 gathers the weights of each"
        return self.placement | {"say": lambda _: say(line)}

    def _name(self, kind: Kind) -> str:
        """A name for a new adapter of the base."""
        return f"{kind}_{sum(name.startswith(kind) for name in getattr(self.base, 'peft_config', ()))}"
