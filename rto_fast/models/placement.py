"""Where a model's weights are: here, in pieces on all ranks (ZeRO-3), or in the CPU's memory until they are needed.

DeepSpeed knows a model by its forward pass: hooks gather what ZeRO-3 keeps in pieces. The model stays the Hugging Face model
it was, with its engine in `zero_engine`; functions of `model` that are a whole forward pass are declared as such and run as
the engine's.
"""

import contextlib
import functools
from collections import OrderedDict

import torch


class WholeForward(torch.nn.Module):
    """The module that DeepSpeed is given: its forward pass is any function of the model. Of an adapter DeepSpeed sees what
    is trained, not the base that it shares."""

    def __init__(self, model):
        super().__init__()
        self.__dict__["target"] = model
        if isinstance(model, torch.nn.Module):
            self.model = model
        else:
            self.trained = torch.nn.ParameterList([parameter for _, parameter in model.trainable()])

    def forward(self, function, *args, **options):
        return function(self.target, *args, **options)


def attach_engine(model, engine):
    model.__dict__["zero_engine"] = engine  # not as a submodule: the engine holds the model


def activate(model):
    """Makes a shared base's next forward pass that of `model`, where it is an adapter (`rto_fast.models.lora`)."""
    if not isinstance(model, torch.nn.Module):
        model.activate()


def whole_forward(function):
    """Declares `function(model, ...)` as a forward pass of `model` from its inputs to all that needs its weights."""

    @functools.wraps(function)
    def run(model, *args, **options):
        activate(model)
        engine = getattr(model, "zero_engine", None)
        return function(model, *args, **options) if engine is None else engine(function, *args, **options)

    return run


def is_zero3(model):
    """Whether the model, or the DeepSpeed engine around it, keeps only pieces of its weights."""
    engine = getattr(model, "zero_engine", None) or model
    return getattr(engine, "zero_optimization_stage", lambda: 0)() == 3


def device_of(model):
    """Where a model computes (ZeRO-3 with offloaded weights keeps them elsewhere)."""
    engine = getattr(model, "zero_engine", None)
    return next(model.parameters()).device if engine is None else engine.device


@contextlib.contextmanager
def whole_weights(model):
    """ZeRO-3: all weights whole on every rank, for a time. Its hooks, which gather and release around every forward, are out
    of the way: ranks need not run equally many passes."""
    import deepspeed

    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        hooks = [(module, kind, getattr(module, kind)) for module in model.modules() for kind in kinds]
        for module, kind, _ in hooks:
            setattr(module, kind, OrderedDict())
        try:
            yield
        finally:
            for module, kind, own in hooks:
                setattr(module, kind, own)


def offload(model, device):
    """Keeps the weights of a frozen model in the CPU's memory; `resident` brings them to `device`."""
    for parameter in model.parameters():
        parameter.data = parameter.data.cpu()
        if torch.cuda.is_available():
            parameter.data = parameter.data.pin_memory()
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)  # few, and needed to build inputs
    model.__dict__["offloaded_from"] = torch.device(device)


@contextlib.contextmanager
def resident(model):
    """A model with its weights where it computes; those of an offloaded one are brought there, and dropped afterwards."""
    device = getattr(model, "offloaded_from", None)
    if device is None:
        yield
        return
    kept = [(parameter, parameter.data) for parameter in model.parameters()]
    try:
        for parameter, data in kept:
            parameter.data = data.to(device, non_blocking=True)
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data
