"""What users' code may change of torch."""

import re
import sys
from typing import Any

import torch
from torch.nn.modules import module as nn_module
from torch.overrides import _get_current_function_mode_stack, _pop_mode
from torch.utils import _python_dispatch

from rto_fast.system.process_state.python_settings import Setting


def _attribute(owner: Any, name: str) -> Setting:
    def read() -> Any:
        try:
            return getattr(owner, name)
        except RuntimeError:  # one that is set by another name now: `fp32_precision`
            return None

    def write(value: Any) -> None:
        if value is not None:
            setattr(owner, name, value)

    return Setting(f"{owner.__name__}.{name}", read, write)


def _torch_random() -> tuple[bytes, ...]:
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return tuple(state.numpy().tobytes() for state in (torch.get_rng_state(), *gpus))


def _set_torch_random(states: tuple[bytes, ...]) -> None:
    own, *gpus = (torch.frombuffer(bytearray(state), dtype=torch.uint8) for state in states)
    torch.set_rng_state(own)
    if gpus:
        torch.cuda.set_rng_state_all(gpus)
    elif torch.cuda.is_initialized():  # since then; until then the seed was waiting
        torch.cuda.manual_seed_all(torch.initial_seed())


_inference_modes = []  # entered here; they must outlive the call


def _set_inference_mode(value: bool) -> None:
    _inference_modes.append(torch.inference_mode(value))
    _inference_modes[-1].__enter__()


def _default_device_context() -> Any:
    return getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)


def _default_device() -> torch.device | None:
    context = _default_device_context()
    return None if context is None else context.device


def _function_modes() -> list[Any]:
    """Contexts such as `torch.device("cuda")` that were entered and not left."""
    return [mode for mode in _get_current_function_mode_stack() if mode is not _default_device_context()]


def _leave_function_modes(kept: list[Any]) -> None:
    while (modes := _function_modes()) and modes[-1] not in kept:
        mode = _pop_mode()
        if hasattr(mode, "old_device"):
            torch.utils._device.CURRENT_DEVICE = mode.old_device


def _leave_dispatch_modes(kept: list[Any]) -> None:
    while len(_python_dispatch._get_current_dispatch_mode_stack()) > len(kept):
        _python_dispatch._pop_mode()


def _saved_tensors_hooks() -> list[Any]:
    """Hooks around what the backward pass keeps, outermost first."""
    hooks = []
    while pair := torch._C._autograd._top_saved_tensors_default_hooks(True):
        hooks.append(pair)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    _push_saved_tensors_hooks(hooks[::-1])
    return hooks[::-1]


def _push_saved_tensors_hooks(hooks: list[Any]) -> None:
    for pair in hooks:
        torch._C._autograd._push_saved_tensors_default_hooks(*pair)


def _set_saved_tensors_hooks(hooks: list[Any]) -> None:
    for _ in _saved_tensors_hooks():
        torch._C._autograd._pop_saved_tensors_default_hooks()
    _push_saved_tensors_hooks(hooks)


_MODULE_HOOKS = [getattr(nn_module, name) for name in vars(nn_module) if re.fullmatch("_global_.*_hooks.*", name)]


def _module_hooks() -> list[dict[int, Any]]:
    """Hooks of every module there is."""
    return [dict(hooks) for hooks in _MODULE_HOOKS]


def _set_module_hooks(wanted: list[dict[int, Any]]) -> None:
    for hooks, kept in zip(_MODULE_HOOKS, wanted, strict=True):
        hooks.clear()
        hooks.update(kept)


_AUTOCAST = "cpu", "cuda"


def _autocast() -> tuple[Any, ...]:
    nesting = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    devices = [(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in _AUTOCAST]
    return nesting, torch.is_autocast_cache_enabled(), *devices


def _set_autocast(state: tuple[Any, ...]) -> None:
    nesting, caches, *devices = state
    for device, (is_enabled, dtype) in zip(_AUTOCAST, devices, strict=True):
        torch.set_autocast_enabled(device, is_enabled)
        torch.set_autocast_dtype(device, dtype)
    torch.set_autocast_cache_enabled(caches)
    while _autocast()[0] > nesting:
        torch.autocast_decrement_nesting()
    while _autocast()[0] < nesting:
        torch.autocast_increment_nesting()
    torch.clear_autocast_cache()


_PRECISIONS = [("generic", "all"), *((b, op) for b in ("cuda", "mkldnn") for op in ("all", "matmul", "conv", "rnn"))]


def _precision() -> tuple[Any, ...]:
    try:
        matmul = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by the names below, as torch allows since 2.9
        matmul = None
    return matmul, *(torch._C._get_fp32_precision_getter(*name) for name in _PRECISIONS)


def _set_precision(state: tuple[Any, ...]) -> None:
    matmul, *precisions = state
    if matmul is not None:
        torch.set_float32_matmul_precision(matmul)
    for name, precision in zip(_PRECISIONS, precisions, strict=True):
        torch._C._set_fp32_precision_setter(*name, precision)


_SMALLEST = sys.float_info.min


_ATTENTION = "flash", "mem_efficient", "math", "cudnn"


def _set_attention(enabled: list[bool]) -> None:
    for name, value in zip(_ATTENTION, enabled, strict=True):
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(value)


TORCH = [
    # First those that the others depend on.
    Setting("torch.inference_mode", torch.is_inference_mode_enabled, _set_inference_mode, True, False),
    Setting("torch.set_grad_enabled", torch.is_grad_enabled, torch._C._set_grad_enabled, True, False),
    Setting("torch.device", _function_modes, _leave_function_modes, True, False),
    Setting(
        "torch dispatch modes", _python_dispatch._get_current_dispatch_mode_stack, _leave_dispatch_modes, True, False
    ),
    Setting("torch.autograd.graph.saved_tensors_hooks", _saved_tensors_hooks, _set_saved_tensors_hooks, True, False),
    Setting("torch.nn.modules.module.register_module_forward_hook", _module_hooks, _set_module_hooks, False, False),
    Setting("torch.set_default_device", _default_device, torch.set_default_device, True),
    Setting("torch.set_default_dtype", torch.get_default_dtype, torch.set_default_dtype),
    Setting("torch.autocast", _autocast, _set_autocast, True, False),
    Setting("torch random numbers", _torch_random, _set_torch_random),
    Setting("torch.set_num_threads", torch.get_num_threads, torch.set_num_threads, True),
    Setting("torch.set_flush_denormal", lambda: _SMALLEST / 2 == 0, torch.set_flush_denormal, True),
    Setting(
        "torch.use_deterministic_algorithms",
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda state: torch.use_deterministic_algorithms(state[0], warn_only=state[1]),
    ),
    Setting(
        "torch.set_anomaly_enabled",
        lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        lambda state: torch.set_anomaly_enabled(*state),
    ),
    Setting("torch.set_float32_matmul_precision", _precision, _set_precision),
    Setting(
        "torch.backends.cuda.enable_flash_sdp",
        lambda: [getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in _ATTENTION],
        _set_attention,
    ),
    Setting(
        "torch.cuda.set_device",
        lambda: torch.cuda.current_device() if torch.cuda.is_initialized() else None,
        lambda device: None if device is None else torch.cuda.set_device(device),
        True,
    ),
    *(_attribute(torch.backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic", "allow_tf32")),
    _attribute(torch.backends.mkldnn, "enabled"),
    _attribute(torch.utils.deterministic, "fill_uninitialized_memory"),
]
