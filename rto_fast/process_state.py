"""The state of the process that users' functions may change, kept apart from the run's.

A reward that seeds torch, changes the folder or sets a default dtype must not change training; but its own next call is to
find what it has set. So there are two sides. Whatever a function or the import of its module changes is noted and put back
when it ends, and set again around the next call: its random numbers go on where they were, and so do the run's.

Gradients are off in every call. Signal handlers and timers are put back and never set again, since signals are to reach the
run at all times. Not covered: replaced functions, loaded modules, logging, resource limits, open files other than the three
standard ones, and what a thread does that goes on after the call.
"""

import contextlib
import gc
import locale
import multiprocessing
import os
import random
import re
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy
import torch
from torch.nn.modules import module as nn_module
from torch.overrides import _get_current_function_mode_stack, _pop_mode
from torch.utils import _python_dispatch


class Setting(NamedTuple):
    name: str
    read: Callable[[], Any]
    write: Callable[[Any], Any]
    of_thread: bool = False  # each thread has its own, or takes part of it with it
    is_kept: bool = True  # set again for users' next call


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


# torch


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


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


_SMALLEST = sys.float_info.min


def _sdp() -> tuple[bool, ...]:
    backends = torch.backends.cuda
    return (
        backends.flash_sdp_enabled(), backends.mem_efficient_sdp_enabled(), backends.math_sdp_enabled(),
        backends.cudnn_sdp_enabled(),
    )  # fmt: skip


def _set_sdp(enabled: tuple[bool, ...]) -> None:
    backends = torch.backends.cuda
    setters = backends.enable_flash_sdp, backends.enable_mem_efficient_sdp, backends.enable_math_sdp
    for write, value in zip((*setters, backends.enable_cudnn_sdp), enabled, strict=True):
        write(value)


TORCH = [
    # First those that the others depend on.
    Setting("torch.inference_mode", torch.is_inference_mode_enabled, _set_inference_mode, True, False),
    Setting("torch.set_grad_enabled", torch.is_grad_enabled, torch._C._set_grad_enabled, True, False),
    Setting("torch.device", _function_modes, _leave_function_modes, True, False),
    Setting("torch dispatch modes", _python_dispatch._get_current_dispatch_mode_stack, _leave_dispatch_modes, True, False),
    Setting("torch.autograd.graph.saved_tensors_hooks", _saved_tensors_hooks, _set_saved_tensors_hooks, True, False),
    Setting("torch.nn.modules.module.register_module_forward_hook", _module_hooks, _set_module_hooks, False, False),
    Setting("torch.set_default_device", _default_device, torch.set_default_device, True),
    Setting("torch.set_default_dtype", torch.get_default_dtype, torch.set_default_dtype),
    Setting("torch.autocast", _autocast, _set_autocast, True, False),
    Setting("torch random numbers", _torch_random, _set_torch_random),
    Setting("torch.set_num_threads", torch.get_num_threads, torch.set_num_threads, True),
    Setting("torch.set_flush_denormal", lambda: _SMALLEST / 2 == 0, torch.set_flush_denormal, True),
    Setting("torch.use_deterministic_algorithms", _deterministic,
            lambda state: torch.use_deterministic_algorithms(state[0], warn_only=state[1])),
    Setting("torch.set_anomaly_enabled", lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
            lambda state: torch.set_anomaly_enabled(*state)),
    Setting("torch.set_float32_matmul_precision", _precision, _set_precision),
    Setting("torch.backends.cuda.enable_flash_sdp", _sdp, _set_sdp),
    Setting("torch.cuda.set_device", lambda: torch.cuda.current_device() if torch.cuda.is_initialized() else None,
            lambda device: None if device is None else torch.cuda.set_device(device), True),
    *(_attribute(torch.backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic", "allow_tf32")),
    _attribute(torch.backends.mkldnn, "enabled"),
    _attribute(torch.utils.deterministic, "fill_uninitialized_memory"),
]  # fmt: skip


# Python and the operating system


def _numpy_random() -> tuple[Any, ...]:
    state: Any = numpy.random.get_state()
    name, keys, *rest = state
    return name, keys.tobytes(), *rest


def _set_numpy_random(state: tuple[Any, ...]) -> None:
    name, keys, *rest = state
    numpy.random.set_state((name, numpy.frombuffer(keys, numpy.uint32), *rest))


def _folder() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None


def _set_folder(path: str | None) -> None:
    if path is not None:
        with contextlib.suppress(OSError):  # it is gone since
            os.chdir(path)


def _set_environment(variables: dict[str, str]) -> None:
    for name in os.environ.keys() - variables.keys():
        del os.environ[name]
    os.environ.update({name: value for name, value in variables.items() if os.environ.get(name) != value})
    time.tzset()  # users' code may have told C of a TZ that is gone


def _umask() -> int:
    mask = os.umask(0o077)  # it can only be read by setting one
    os.umask(mask)
    return mask


def _set_warnings(filters: list[Any]) -> None:
    warnings.filters[:] = filters  # type: ignore[index]
    with warnings.catch_warnings():  # which tells the module that they have changed
        pass


def _signals() -> dict[int, Any]:
    return {number: signal.getsignal(number) for number in signal.valid_signals()}


def _set_signals(handlers: dict[int, Any]) -> None:
    if threading.current_thread() is not threading.main_thread():
        return  # where users' code could not set one
    for number, handler in handlers.items():
        if handler is not None and handler != signal.getsignal(number):
            signal.signal(number, handler)


def _wakeup() -> int | None:
    if threading.current_thread() is not threading.main_thread():
        return None
    descriptor = signal.set_wakeup_fd(-1)  # it can only be read by setting one
    try:
        signal.set_wakeup_fd(descriptor)
    except (ValueError, OSError):  # users' code has closed it
        return -1
    return descriptor


_TIMERS = signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF


def _set_timers(run: list[bool]) -> None:
    for timer, runs in zip(_TIMERS, run, strict=True):
        if not runs:
            signal.setitimer(timer, 0)


def _set_collector(state: tuple[bool, tuple[int, int, int]]) -> None:
    is_enabled, thresholds = state
    gc.set_threshold(*thresholds)
    if is_enabled:
        gc.enable()
    else:
        gc.disable()


def _streams() -> tuple[Any, ...]:
    return sys.stdin, sys.stdout, sys.stderr, sys.excepthook, threading.excepthook, warnings.showwarning


def _import_path() -> dict[tuple[str, int], int]:
    """{(folder, how often it came before): place}, of which users' code changes some."""
    return {(folder, sys.path[:place].count(folder)): place for place, folder in enumerate(sys.path)}


def _set_import_path(places: dict[tuple[str, int], int]) -> None:
    sys.path[:] = [folder for folder, _ in sorted(places, key=lambda key: places[key])]


def _set_trace(functions: tuple[Any, Any]) -> None:
    sys.settrace(functions[0])
    sys.setprofile(functions[1])


def _set_streams(streams: tuple[Any, ...]) -> None:
    sys.stdin, sys.stdout, sys.stderr, sys.excepthook, threading.excepthook = streams[:-1]
    warnings.showwarning = streams[-1]


PYTHON = [
    Setting("random numbers", random.getstate, random.setstate),
    Setting("numpy random numbers", _numpy_random, _set_numpy_random),
    Setting("numpy.seterr", numpy.geterr, lambda state: numpy.seterr(**state), True),
    Setting("os.chdir", _folder, _set_folder),
    Setting("os.environ", lambda: dict(os.environ), _set_environment),
    Setting("os.umask", _umask, os.umask),
    Setting("locale", lambda: locale.setlocale(locale.LC_ALL), lambda name: locale.setlocale(locale.LC_ALL, name)),
    Setting("sys.stdout", _streams, _set_streams),
    Setting("warnings", lambda: list(warnings.filters), _set_warnings),
    Setting("signal.signal", _signals, _set_signals, False, False),
    Setting("signal.set_wakeup_fd", _wakeup, lambda x: None if x is None else signal.set_wakeup_fd(x), False, False),
    Setting("signal.setitimer", lambda: [signal.getitimer(t)[0] > 0 for t in _TIMERS], _set_timers, False, False),
    Setting("signal.pthread_sigmask", lambda: signal.pthread_sigmask(signal.SIG_BLOCK, ()),
            lambda mask: signal.pthread_sigmask(signal.SIG_SETMASK, mask), True, False),
    Setting("gc", lambda: (gc.isenabled(), gc.get_threshold()), _set_collector),
    Setting("sys.path", _import_path, _set_import_path),
    Setting("sys.argv", lambda: list(sys.argv), lambda arguments: setattr(sys, "argv", arguments)),
    Setting("sys.settrace", lambda: (sys.gettrace(), sys.getprofile()), _set_trace, True, False),
    Setting("sys.set_int_max_str_digits", sys.get_int_max_str_digits, sys.set_int_max_str_digits),
    Setting("sys.setrecursionlimit", sys.getrecursionlimit, sys.setrecursionlimit),
    Setting("socket.setdefaulttimeout", socket.getdefaulttimeout, socket.setdefaulttimeout),
    Setting("multiprocessing.set_start_method", lambda: multiprocessing.get_start_method(allow_none=True),
            lambda name: multiprocessing.set_start_method(name, force=True)),
]  # fmt: skip
SETTINGS = [*TORCH, *PYTHON]

_theirs: dict[str, tuple[Any, Any]] = {}  # {name: (what users' code found, what it left)}


def _write(wanted: dict[str, Any]) -> None:
    with contextlib.ExitStack() as stack:  # runs all of them, in reverse, also where one fails
        for setting in reversed(SETTINGS):
            if setting.name in wanted:
                stack.callback(_write_one, setting, wanted[setting.name])


def _write_one(setting: Setting, value: Any) -> None:
    if setting.read() != value:
        setting.write(value)


def _their(name: str, ours: Any) -> Any:
    """What users' code is to find. Of a dict it has changed some items."""
    if name not in _theirs:
        return ours
    found, left = _theirs[name]
    if not isinstance(ours, dict):
        return left
    changed = {key: left.get(key) for key in {**found, **left} if found.get(key) != left.get(key)}
    return {key: value for key, value in {**ours, **changed}.items() if value is not None}


@contextlib.contextmanager
def _standard_files() -> Iterator[None]:
    """Puts the files of standard input, output and error back: a file that is opened later would take the number of one that
    was closed, and what is printed would go into it."""
    with contextlib.ExitStack() as stack:
        for number in range(3):
            with contextlib.suppress(OSError):  # closed already, as by `>&-`
                spare = os.dup(number)
                stack.callback(_put_back, spare, number)
        yield


def _put_back(spare: int, number: int) -> None:
    with contextlib.suppress(OSError):  # users' code has closed the spare one, too
        is_same = False
        with contextlib.suppress(OSError):
            is_same = os.path.sameopenfile(spare, number)
        if not is_same:
            os.dup2(spare, number)
        os.close(spare)


@contextlib.contextmanager
def users_settings(of_caller: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """Users' code runs in the context: without gradients, and with what it has set before; at its end this process is as it
    was.

    Args:
        of_caller: in a further thread, what the context gave in the thread that waits for this one. Then only the thread's
            own settings are set and put back.
    Yields:
        {name: value} of what is set.
    """
    settings = [s for s in SETTINGS if s.of_thread or of_caller is None]
    ours = {s.name: s.read() for s in settings}
    if of_caller is None:
        found = {name: _their(name, value) for name, value in ours.items()} | {"torch.set_grad_enabled": False}
    else:
        found = {name: of_caller[name] for name in ours}
        ours = found  # so that what is of the process too, such as the threads of BLAS, is the caller's again
    _write(found)
    try:
        with contextlib.nullcontext() if of_caller else _standard_files():
            yield found
    finally:
        # First what would change the reading of the others, such as modes of torch.
        _write({s.name: ours[s.name] for s in settings if not s.is_kept})
        kept = [s for s in settings if s.is_kept]
        left = {s.name: s.read() for s in kept}
        for name, value in left.items():
            if value != found[name]:
                _theirs[name] = found[name], value
                if value == ours[name]:
                    del _theirs[name]
        _write(ours)
