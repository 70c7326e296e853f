"""A model of a run: a transformers module with its DeepSpeed engine, adapter, home device and scores."""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from rto_fast.models.lora import Adapter


class ScoreStatistics(NamedTuple):
    """Mean and standard deviation of a reward model's scores over preference data; kept in config.json."""

    mean: float = 0.0
    std: float = 1.0

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "ScoreStatistics | None":
        """The statistics that a model's configuration holds, or None."""
        std = getattr(config, "score_std", None)
        return cls(getattr(config, "score_mean", 0.0), std) if std else None


class Model:
    """A model as the stages of a run use it.

    Functions of a transformers module (`causal_logps`, `token_scores`, `policy_loss`) are plain; `forward` runs one as a
    whole forward pass of this model: with its adapter active, and through its DeepSpeed engine, whose hooks gather the
    weights that ZeRO-3 keeps in pieces.

    Args:
        module: a transformers model, or an `Adapter` of a base that other models share.

    Attributes:
        engine: the DeepSpeed engine around the module, or None.
        home: the device where the module computes, if its weights wait in the CPU's memory (`offload`); else None.
    """

    def __init__(self, module: nn.Module | Adapter):
        # An adapter stands in for a transformers model: it has the attributes of its base.
        self.module = cast(PreTrainedModel, module)
        self.engine: Any = None
        self.home: torch.device | None = None

    def __repr__(self) -> str:
        return f"Model({self.module!r})"

    @property
    def adapter(self) -> Adapter | None:
        module: object = self.module
        return module if isinstance(module, Adapter) else None

    @property
    def config(self) -> PreTrainedConfig:
        return self.module.config

    @property
    def dtype(self) -> torch.dtype:
        return self.module.dtype

    @property
    def device(self) -> torch.device:
        """Where the model computes; offloaded weights lie elsewhere until they are needed."""
        return self.home or (self.module.device if self.engine is None else self.engine.device)

    @property
    def is_zero3(self) -> bool:
        """Whether every rank keeps only pieces of the weights."""
        return self.engine is not None and self.engine.zero_optimization_stage() == 3

    @property
    def scores(self) -> ScoreStatistics | None:
        """A scorer's statistics, by which its scores are normalised."""
        return ScoreStatistics.of(self.config)

    @scores.setter
    def scores(self, statistics: ScoreStatistics) -> None:
        self.config.score_mean, self.config.score_std = statistics

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """[(name, parameter)] of what is trained; a tied parameter once."""
        if self.adapter:
            return self.adapter.trainable()
        return [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]

    def activate(self) -> None:
        """Makes the next pass of a shared base that of this model's adapter."""
        if self.adapter:
            self.adapter.activate()

    def forward(self, function: Callable, *args: Any, **options: Any) -> Any:
        """`function(module, *args, **options)`, which must be all of a forward pass that needs the weights."""
        self.activate()
        if self.engine is None:
            return function(self.module, *args, **options)
        return self.engine(function, *args, **options)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """With ZeRO-3 every rank holds all weights in the context; ranks may then run different numbers of passes."""
        with whole_weights(self.module) if self.is_zero3 else contextlib.nullcontext():
            yield

    def offload(self, device: torch.device | str) -> None:
        """Keeps the weights of a frozen model in the CPU's memory. `resident` brings them to `device` while needed."""
        for parameter in self.module.parameters():
            parameter.data = parameter.data.cpu()
            if torch.cuda.is_available():
                parameter.data = parameter.data.pin_memory()
        for module in self.module.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)  # few; inputs are made of them
        self.home = torch.device(device)

    @contextlib.contextmanager
    def resident(self) -> Iterator[None]:
        """The weights of an offloaded model lie where it computes in the context, and are dropped afterwards."""
        if self.home is None:
            yield
            return
        kept = [(parameter, parameter.data) for parameter in self.module.parameters()]
        try:
            for parameter, data in kept:
                parameter.data = data.to(self.home, non_blocking=True)
            yield
        finally:
            for parameter, data in kept:
                parameter.data = data


class EngineModule(nn.Module):
    """The module that DeepSpeed is given: its forward pass is any function of a model's module.

    Of an adapter DeepSpeed sees only what is trained, not the base, which other models share.
    """

    def __init__(self, model: Model):
        super().__init__()
        self.function_of = lambda function, *args, **options: function(model.module, *args, **options)
        if model.adapter:
            self.trained = nn.ParameterList([parameter for _, parameter in model.trainable()])
        else:
            self.model = model.module

    def forward(self, function: Callable, *args: Any, **options: Any) -> Any:
        return self.function_of(function, *args, **options)


def vocabulary_of(module: PreTrainedModel | Adapter) -> int:
    """Rows of the output layer."""
    weight: Any = cast(nn.Linear, module.get_output_embeddings()).weight
    return getattr(weight, "ds_shape", weight.shape)[0]  # ZeRO-3 empties its tensors between uses


@contextlib.contextmanager
def whole_weights(module: PreTrainedModel | Adapter) -> Iterator[None]:
    """All weights of a ZeRO-3 model whole on every rank. Its hooks, which gather and release around every pass, are off."""
    import deepspeed

    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        hooks = [(part, kind, getattr(part, kind)) for part in module.modules() for kind in kinds]
        for part, kind, _ in hooks:
            setattr(part, kind, OrderedDict())
        try:
            yield
        finally:
            for part, kind, own in hooks:
                setattr(part, kind, own)
