"""Liger's kernels for models that run transformers' layers on a GPU: norms, rotary embedding and the gate of the MLP.

Liger patches a model, and with it the module of transformers that the model's class is in, and so every model of its family.
Here the model alone is changed: what Liger replaces in modules is put back, and the attention layers of the model get a
forward method that sees Liger's rotary embedding. `precision.plain_layers` takes all of it off for a while.
"""

import contextlib
import sys
from collections.abc import Iterator
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rto_fast.batch import pack_whole
from rto_fast.errors import error_text
from rto_fast.models.agreement import compare_values
from rto_fast.models.checks import check_sequences
from rto_fast.models.forward import packed_inputs
from rto_fast.models.precision import from_liger, higher_precision, plain_layers, precise


def use_liger(model: PreTrainedModel) -> str:
    """Makes the layers of a model run Liger's kernels, if that changes nothing but rounding.

    Args:
        model: from `load_model`, before an optimizer or DeepSpeed has it.
    Returns:
        Which layers it runs, for the log: "Liger's kernels", or why it does not run them.
    """
    if not _can_run(model):
        return "Liger's kernels need a GPU"
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as known
    except ImportError as error:
        return f"Liger cannot be imported: {error_text(error)}"
    kind = model.config.model_type
    if kind not in known or not type(model.base_model).__module__.startswith("transformers."):
        return f"Liger does not know {kind}"
    try:
        patch(model)
        if not _changes_results(model):
            return "Liger's kernels"
        reason = f"Liger's kernels for {kind} compute something else"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # an architecture that it does not patch, or a kernel that does not compile
        reason = f"Liger's kernels for {kind} failed: {error_text(error)}"
    unpatch(model)
    return reason


def _can_run(model: PreTrainedModel) -> bool:
    return model.device.type == "cuda"


def patch(model: PreTrainedModel) -> None:
    """Gives the layers of one model Liger's methods. Its losses are left off: the output layers here have their own.

    So are its experts: timings choose their tiles, and their backward pass adds by atomics, so that a run would not repeat.
    """
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    own = vars(sys.modules[type(model.base_model).__module__])
    with _modules_of_transformers_kept():
        before = dict(own)
        # The backbone, because a scorer has no other part that Liger knows.
        options = {"fused_linear_cross_entropy": False, "cross_entropy": False}
        if any("experts" in name for name, _ in model.base_model.named_modules()):
            options["swiglu"] = False
        _apply_liger_kernel_to_instance(model.base_model, **options)
        replaced = {name: value for name, value in own.items() if before.get(name) is not value}
        functions = {name: value for name, value in replaced.items() if isinstance(value, FunctionType)}
    for module in model.base_model.modules():
        forward = None if "forward" in vars(module) else _seeing(type(module).forward, functions, own)
        if forward is not None:
            module.__dict__["forward"] = MethodType(forward, module)


def _seeing(function: Any, functions: dict[str, Any], own: dict[str, Any]) -> FunctionType | None:
    """Returns a copy of a function that reads `functions` in the place of its module's; None if it reads none of them.

    Args:
        own: the variables of the module. Functions of other modules are looked at only if they decorate one of its own.
    """
    if not isinstance(function, FunctionType):
        return None
    wrapped = getattr(function, "__wrapped__", None)
    inner = _seeing(wrapped, functions, own)
    reads = function.__globals__ is own and not functions.keys().isdisjoint(function.__code__.co_names)
    if inner is None and not reads:
        return None
    cells = function.__closure__ or ()
    closure = tuple(CellType(inner) if inner and cell.cell_contents is wrapped else cell for cell in cells)
    seen = own | functions if reads else function.__globals__
    changed = FunctionType(function.__code__, seen, function.__name__, function.__defaults__, closure)
    changed.__kwdefaults__ = function.__kwdefaults__
    changed.__module__ = "liger_kernel"  # by which `from_liger` knows it
    return changed


def unpatch(model: PreTrainedModel) -> None:
    """Gives the layers the methods of their classes again."""
    for module in model.modules():
        for name in [name for name, value in vars(module).items() if from_liger(value)]:
            del module.__dict__[name]


@contextlib.contextmanager
def _modules_of_transformers_kept() -> Iterator[None]:
    """Puts back what is replaced in the modules of transformers' architectures."""
    names = [name for name in list(sys.modules) if name.startswith("transformers.models.")]
    kept = [
        (vars(module), dict(vars(module))) for module in map(sys.modules.get, names) if isinstance(module, ModuleType)
    ]
    try:
        yield
    finally:
        for now, before in kept:
            for name in [name for name, value in now.items() if before.get(name) is not value]:
                if name in before:
                    now[name] = before[name]
                elif from_liger(now[name]):
                    del now[name]


@torch.no_grad()
def _changes_results(model: PreTrainedModel) -> bool:
    """Whether hidden states of a small packed batch are further from exact ones than rounding explains."""
    batch = pack_whole(check_sequences(model.get_input_embeddings().weight.shape[0], [12, 16, 20]), model.device)

    def hidden() -> Tensor:
        return model.base_model(**packed_inputs(batch)).last_hidden_state.flatten()

    found = hidden()
    with plain_layers(model):
        own = hidden()
    with precise(model, higher_precision(own.dtype)):
        exact = hidden()
    return not compare_values(found, own, exact, own.dtype).is_rounding
