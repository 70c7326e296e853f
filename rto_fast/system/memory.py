"""How much memory the machine has and has left, and what the garbage collector need not look at."""

import contextlib
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path


def free_memory() -> int:
    """Bytes of the machine's memory that are not in use."""
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def memory_in_container() -> int:
    """Bytes of the machine's memory, or of the container's control group where that has less."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        return machine if limit == "max" else min(machine, int(limit))
    except (OSError, ValueError):
        return machine


def free_memory_in_container() -> int:
    """Bytes that are not in use, within the limit of the container's control group.

    The group counts the file cache as used, which it can give back: this is the least that a process can take.
    """
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return free_memory() if limit == "max" else min(free_memory(), int(limit) - int(used))
    except (OSError, ValueError):
        return free_memory()


@contextlib.contextmanager
def kept_imports() -> Iterator[None]:
    """Imports in the context are no work for the garbage collector, at the time and later: nothing among them is garbage.

    To look at all objects of the libraries takes 0.2 s each time. Where they were imported before, nothing changes.
    """
    first, enabled = "transformers" not in sys.modules, gc.isenabled()
    if first:
        gc.disable()
    try:
        yield
    finally:
        if first:
            gc.freeze()
            if enabled:
                gc.enable()
