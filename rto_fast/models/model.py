"""A model of a run: a transformers model with its DeepSpeed engine, adapter, home device and score statistics."""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from rto_fast.batch import PackedBatch
from rto_fast.models.decoder import decoder_of
from rto_fast.models.graphs import PassGraphs, TrainingInputs
from rto_fast.models.lora import Adapter
from rto_fast.models.placement import moved


class ScoreStatistics(NamedTuple):
    """Mean and standard deviation of a reward model's scores of preference data, saved in its config.json."""

    mean: float = 0.0
    std: float = 1.0

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "ScoreStatistics | None":
        """Returns the statistics in a model's configuration, or None."""
        std = getattr(config, "score_std", None)
        return cls(getattr(config, "score_mean", 0.0), std) if std else None


class Model:
    """A model as the stages of a run use it.

    `causal_logps`, `token_scores` and `policy_loss` are functions of a transformers model. `forward` runs one of them as a
    forward pass of this model: with its adapter active, and through its DeepSpeed engine, whose hooks gather the weights
    that ZeRO-3 partitions.

    Args:
        module: a transformers model, or an `Adapter` of a base that other models share.

    Attributes:
        adapter: the module if it is an adapter, else None.
        engine: the DeepSpeed engine around the module, or None.
        home: the device where the module computes if its weights wait in CPU memory (`offload`), else None.
        graphs: runs the passes of a small model as CUDA graphs; None where all passes run eagerly.
    """

    def __init__(self, module: nn.Module | Adapter):
        # An adapter stands in for a transformers model: it has the attributes of its base.
        self.module = cast(PreTrainedModel, module)
        self.adapter = module if isinstance(module, Adapter) else None
        self.engine: Any = None
        self.home: torch.device | None = None
        self.graphs: PassGraphs | None = None

    @property
    def config(self) -> PreTrainedConfig:
        return self.module.config

    @property
    def device(self) -> torch.device:
        """The device where the model computes."""
        return self.home or (self.module.device if self.engine is None else self.engine.device)

    @property
    def is_zero3(self) -> bool:
        """Whether the weights are partitioned over the ranks."""
        return self.engine is not None and self.engine.zero_optimization_stage() == 3

    @property
    def scores(self) -> ScoreStatistics | None:
        """The statistics that normalise a scorer's scores, or None."""
        return ScoreStatistics.of(self.config)

    @scores.setter
    def scores(self, statistics: ScoreStatistics) -> None:
        self.config.score_mean, self.config.score_std = statistics

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Returns [(name, parameter)] of what is trained; a tied parameter appears once."""
        named = self.module.named_parameters()
        return self.adapter.trainable() if self.adapter else [(name, p) for name, p in named if p.requires_grad]

    def activate(self) -> None:
        """Makes the following passes of a shared base those of this model's adapter."""
        if self.adapter:
            self.adapter.activate()

    def forward(self, function: Callable, *args: Any, **options: Any) -> Any:
        """Returns `function(module, *args, **options)`, in which every use of the weights must happen.

        Without gradients it is a function of a packed batch that returns a number for each token.
        """
        self.activate()
        run = self._through_engine(function)
        if torch.is_grad_enabled():
            return run(*args, **options)
        batch: PackedBatch = args[0]
        if self.graphs and self.engine is None and self.graphs.takes(batch, backward=False):
            return self.graphs.score(function, batch, **options)
        if not self._pads():
            return run(batch, **options)
        return run(batch.padded(coarse=False), **options)[: batch.num_tokens]

    def learn(
        self,
        function: Callable[..., tuple[Tensor, Mapping[str, Tensor]]],
        inputs: TrainingInputs,
        *args: Any,
        backward: Callable[[Tensor], None],
        factor: float = 1.0,
    ) -> Mapping[str, Tensor]:
        """Runs `function(module, inputs, *args)`, which returns a loss and metrics, and the backward pass of the loss.

        Args:
            backward: of the optimizer, which collects the gradients.
            factor: of the loss.
        Returns:
            The metrics, 0-d tensors.
        """
        self.activate()
        if self.graphs and self.engine is None and self.graphs.takes(inputs.batch, backward=True):
            return self.graphs.learn(function, inputs, *args, backward=backward, factor=factor)
        run = self._through_engine(function)
        loss, metrics = run(inputs.padded(coarse=False) if self._pads() else inputs, *args)
        backward(factor * loss)
        return metrics

    def _through_engine(self, function: Callable) -> Callable:
        """`function` of the module, as a forward pass of the engine if there is one."""
        return partial(function, self.module) if self.engine is None else partial(self.engine, function)

    def _pads(self) -> bool:
        """Whether an eager pass is padded to one of few sizes: our layers look at each new shape of a GEMM on a GPU before
        they use it (`kernels/gemm.py`)."""
        return next(self.module.parameters()).is_cuda and decoder_of(self.module) is not None

    def whole(self) -> contextlib.AbstractContextManager[None]:
        """A context in which every rank holds all weights, and ranks may run different numbers of passes."""
        return whole_weights(self.module) if self.is_zero3 else contextlib.nullcontext()

    def offload(self, device: torch.device | str) -> None:
        """Moves the weights of a frozen model to CPU memory; `resident` brings them to `device` while they are needed."""

        def to_host(storage: Tensor) -> Tensor:
            return storage.cpu().pin_memory() if torch.cuda.is_available() else storage.cpu()

        parameters = list(self.module.parameters())
        for parameter, data in zip(parameters, moved(parameters, to_host)):
            parameter.data = data
        for module in self.module.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)  # small
        self.home = torch.device(device)

    @contextlib.contextmanager
    def resident(self) -> Iterator[None]:
        """Copies the weights of an offloaded model to the device where it computes, for the time of the context."""
        kept = [(parameter, parameter.data) for parameter in self.module.parameters()] if self.home else []
        try:
            there = moved([data for _, data in kept], lambda storage: storage.to(self.home, non_blocking=True))
            for (parameter, _), data in zip(kept, there):
                parameter.data = data
            yield
        finally:
            for parameter, data in kept:
                parameter.data = data


class EngineModule(nn.Module):
    """The module that DeepSpeed wraps. Its forward pass is any function of the model's module.

    For an adapter DeepSpeed is given only the trained weights, not those of the base, which other models share.
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
    """Returns the number of rows of the output layer."""
    weight: Any = cast(nn.Linear, module.get_output_embeddings()).weight
    return getattr(weight, "ds_shape", weight.shape)[0]  # ZeRO-3 leaves its tensors empty between passes


@contextlib.contextmanager
def whole_weights(module: PreTrainedModel | Adapter) -> Iterator[None]:
    """Gathers all weights of a ZeRO-3 model on every rank, and turns off its hooks, which would gather and release them."""
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
