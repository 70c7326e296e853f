"""One thing that users' code may change of the process: how it is read, and how it is put back."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Setting(NamedTuple):
    name: str
    read: Callable[[], Any]
    write: Callable[[Any], Any]
    of_thread: bool = False  # each thread has its own, or takes part of it with it
    is_kept: bool = True  # set again for users' next call
