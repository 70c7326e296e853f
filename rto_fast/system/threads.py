"""The number of CPU threads, checked before OpenMP starts them."""

import threading

import torch

from rto_fast.errors import ConfigError


def use_threads(count: int | None) -> None:
    """Has torch compute with `count` threads, or with its own choice where that is None.

    Raises:
        ConfigError: the system does not give this process as many threads. OpenMP, which starts them later, would end it.
    """
    if count is None:
        return
    threads, enough = [], threading.Event()
    try:
        for _ in range(count - 1):
            thread = threading.Thread(target=enough.wait, daemon=True)
            thread.start()
            threads.append(thread)
    except (RuntimeError, MemoryError):
        raise ConfigError(
            f"threads: expected at most {len(threads) + 1}, which is what this system gives a process, got {count}"
        ) from None
    finally:
        enough.set()
        for thread in threads:
            thread.join()
    torch.set_num_threads(count)
