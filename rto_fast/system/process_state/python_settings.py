"""What users' code may change of Python, NumPy and what the operating system keeps of the process."""

import contextlib
import gc
import locale
import multiprocessing
import os
import random
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy


class Setting(NamedTuple):
    """One thing that users' code may change of the process: how it is read, and how it is put back."""

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], Any]
    of_thread: bool = False  # each thread has its own, or takes part of it with it
    is_kept: bool = True  # set again for users' next call


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
    (gc.enable if is_enabled else gc.disable)()


def _streams() -> tuple[Any, ...]:
    return sys.stdin, sys.stdout, sys.stderr, sys.excepthook, threading.excepthook, warnings.showwarning


def _import_path() -> dict[tuple[str, int], int]:
    """{(folder, how often it came before): place}, of which users' code changes some."""
    return {(folder, sys.path[:place].count(folder)): place for place, folder in enumerate(sys.path)}


def _set_import_path(places: dict[tuple[str, int], int]) -> None:
    sys.path[:] = [folder for folder, _ in sorted(places, key=lambda key: places[key])]


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
    Setting(
        "signal.signal", lambda: {n: signal.getsignal(n) for n in signal.valid_signals()}, _set_signals, False, False
    ),
    Setting("signal.set_wakeup_fd", _wakeup, lambda x: None if x is None else signal.set_wakeup_fd(x), False, False),
    Setting("signal.setitimer", lambda: [signal.getitimer(t)[0] > 0 for t in _TIMERS], _set_timers, False, False),
    Setting(
        "signal.pthread_sigmask",
        lambda: signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        lambda mask: signal.pthread_sigmask(signal.SIG_SETMASK, mask),
        True,
        False,
    ),
    Setting("gc", lambda: (gc.isenabled(), gc.get_threshold()), _set_collector),
    Setting("sys.path", _import_path, _set_import_path),
    Setting("sys.argv", lambda: list(sys.argv), lambda arguments: setattr(sys, "argv", arguments)),
    Setting("sys.settrace", sys.gettrace, sys.settrace, True, False),
    Setting("sys.setprofile", sys.getprofile, sys.setprofile, True, False),
    Setting("sys.set_int_max_str_digits", sys.get_int_max_str_digits, sys.set_int_max_str_digits),
    Setting("sys.setrecursionlimit", sys.getrecursionlimit, sys.setrecursionlimit),
    Setting("socket.setdefaulttimeout", socket.getdefaulttimeout, socket.setdefaulttimeout),
    Setting(
        "multiprocessing.set_start_method",
        lambda: multiprocessing.get_start_method(allow_none=True),
        lambda name: multiprocessing.set_start_method(name, force=True),
    ),
]
