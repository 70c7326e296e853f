"""The state of the process that users' functions may change, kept apart from the run's.

A reward that seeds torch, changes the folder or sets a default dtype must not change training; but its own next call is to
find what it has set. So there are two sides. Whatever a function or the import of its module changes is noted and put back
when it ends, and set again around the next call: its random numbers go on where they were, and so do the run's.

Gradients are off in every call. Signal handlers and timers are put back and never set again, since signals are to reach the
run at all times. Not covered: replaced functions, loaded modules, logging, resource limits, open files other than the three
standard ones, and what a thread does that goes on after the call.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from rto_fast.system.process_state.python_settings import PYTHON, Setting
from rto_fast.system.process_state.torch_settings import TORCH

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
