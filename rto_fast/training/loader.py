"""Loads a run's models: whole, or as adapters of one base (LoRA)."""

from typing import Any

from rto_fast.models.loading import load_causal_lm, load_scorer
from rto_fast.models.lora import Adapter, has_adapter, load_adapter, new_adapter
from rto_fast.training.zero import place_frozen

LOADERS = {"causal_lm": load_causal_lm, "scorer": load_scorer}


class Loader:
    """
    Args:
        config: `Config`. placement: device, dtype and trust_remote_code.
    """

    def __init__(self, config, placement):
        self.config, self.placement = config, placement
        self.base, self.base_path = None, ""

    def share(self, path):
        """The model at `path`, and all adapters of it, are one copy from now on, where there are adapters."""
        if self.config.lora.rank and path != self.base_path:
            self.base, self.base_path = self._frozen_base("causal_lm", path), path

    def frozen(self, kind, path):
        """A `causal_lm` or `scorer` that is only evaluated, placed as `deepspeed.frozen` says."""
        if self.base is not None and path == self.base_path and kind == "causal_lm":
            return Adapter(self.base)
        if self.base is not None and has_adapter(path, self.base_path):
            return load_adapter(self.base, self._name(kind), path, scorer=kind == "scorer")
        placement = self.placement if self.config.deepspeed.frozen == "resident" else self.placement | {"device": "cpu"}
        model = LOADERS[kind](path, trainable=False, **placement)
        return place_frozen(model, self.config.deepspeed, self.placement["device"])

    def trained(self, kind, path, new_head=False):
        """A `causal_lm` or `scorer` to train: all of it, or an adapter.

        new_head: the model at `path` is a `causal_lm` that becomes a scorer.
        """
        head: dict[str, Any] = {"new_head": True} if new_head else {}
        if not self.config.lora.rank:
            return LOADERS[kind](path, trainable=True, **self._training, **head)
        if self.base is not None and has_adapter(path, self.base_path):
            return load_adapter(self.base, self._name(kind), path, scorer=kind == "scorer")
        is_shared = path == self.base_path
        base = self.base if is_shared else self._frozen_base(kind, path, **head)
        name = self._name(kind) if is_shared else "default"
        return new_adapter(base, name, self.config.lora, self.config.seed, scorer=kind == "scorer")

    @property
    def _training(self):
        return self.placement | {"gradient_checkpointing": self.config.model.gradient_checkpointing}

    def _frozen_base(self, kind, path, **head):
        """In training mode: activations are checkpointed in no other."""
        return LOADERS[kind](path, trainable=True, **self._training, **head).requires_grad_(False)

    def _name(self, kind):
        return f"{kind}_{sum(name.startswith(kind) for name in getattr(self.base, 'peft_config', ()))}"
