"""How much memory the machine has, and how much of it is left."""

import os
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
