"""Joins the ranks that torchrun, deepspeed or srun started, and ends the run when one of them is gone.

A rank that dies leaves the others in a collective that never ends. So each rank writes a heartbeat into the store by which
the ranks found each other. The main rank watches all heartbeats; the others watch the main rank's, and for a failure that a
rank has reported.
"""

import contextlib
import datetime
import json
import os
import threading
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from rto_fast.config.fields import CountOr0
from rto_fast.config.options import value_of_text
from rto_fast.errors import ConfigError, Interrupted, UserError, error_text
from rto_fast.system.command_line import error_line, exit_code
from rto_fast.system.run_lock import release_all
from rto_fast.system.terminal import say

INTERVAL = 1.0  # seconds between heartbeats
PATIENCE = 30.0  # seconds without one after which a rank is gone
# A collective's own limit: ranks wait for slow reward functions, `Watch` for dead ranks.
WAIT = datetime.timedelta(days=7)
LEFT = "left"


def from_environment(name: str, default: int) -> int:
    """Reads a count or a rank that a launcher sets.

    Raises:
        ConfigError: it is not a number of at least 0.
    """
    text = os.environ.get(name)
    try:
        return default if text is None else value_of_text(CountOr0, text)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}; unset it, or start with torchrun, deepspeed or srun") from None


def started_by_launcher() -> bool:
    return from_environment("WORLD_SIZE", 1) > 1


def local_rank() -> int:
    return from_environment("LOCAL_RANK", 0)


@contextlib.contextmanager
def joined(use_deepspeed: bool = False) -> Iterator[None]:
    """Makes this process one of the ranks in the context.

    Args:
        use_deepspeed: make a group even if this is the only process.
    Raises:
        ConfigError: the launcher's environment is incomplete, or no other rank answers.
    """
    if not started_by_launcher():
        if use_deepspeed:
            os.environ["LOCAL_RANK"] = "0"  # DeepSpeed reads it
            dist.init_process_group(_backend(), store=dist.HashStore(), rank=0, world_size=1)
        try:
            yield
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        return
    rank, size = from_environment("RANK", 0), from_environment("WORLD_SIZE", 1)
    if rank >= size:  # torch would wait for ten minutes, in code that no signal interrupts
        raise ConfigError(
            f"RANK: expected a number below WORLD_SIZE ({size}), got {rank}; start with torchrun, deepspeed or srun"
        )
    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=datetime.timedelta(minutes=10))))
    except (ValueError, RuntimeError, dist.DistError) as error:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the processes do not find each other; start "
            f"them with torchrun, deepspeed or srun ({error_text(error, with_type=False)})"
        ) from error
    store.set_timeout(WAIT)
    if local_rank() < torch.cuda.device_count():  # else the run refuses it later, or uses the CPU
        torch.cuda.set_device(local_rank())
    # The watch has a connection of its own: the creation of a group blocks the other one.
    watch = Watch(dist.PrefixStore("watch", store.clone()), rank, size)
    try:
        dist.init_process_group(
            _backend(), store=dist.PrefixStore("group", store), rank=rank, world_size=size, timeout=WAIT
        )
        yield
        watch.leave()
    except BaseException as error:
        if isinstance(error, Interrupted) and error.together:
            watch.leave()
            dist.destroy_process_group()
        else:
            if _lost_connection(error):
                watch.wait()
            watch.fail(error)
        raise
    dist.destroy_process_group()


def _backend() -> str:
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def _lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


GOES_ON = "; the run stopped, --resume goes on from its last checkpoint"  # for a rank that ends without an error


class Watch:
    """A thread that ends this process when another rank failed or is gone.

    Args:
        store: of c10d, with keys that only this class uses.
    """

    def __init__(self, store: dist.Store, rank: int, size: int):
        self.store, self.rank = store, rank
        self.others = [other for other in range(size) if other != rank] if rank == 0 else [0]
        self.stopped, self.patience = threading.Event(), PATIENCE
        self.seen = {other: ("", time.monotonic()) for other in self.others}
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        beats = 0
        while not self.stopped.wait(INTERVAL):
            beats += 1
            try:
                self.store.set(f"beat{self.rank}", str(beats))
                if self.store.check(["failure"]):
                    self._end(*json.loads(self.store.get("failure")))
                for other in self.others:
                    self._look_at(other)
            except (RuntimeError, dist.DistError):
                self._end(f"rank 0 is gone{GOES_ON}", 1, speaker=1)

    def _look_at(self, other: int) -> None:
        key, now = f"beat{other}", time.monotonic()
        beat = self.store.get(key).decode() if self.store.check([key]) else ""
        if beat == LEFT or beat != self.seen[other][0]:
            self.seen[other] = beat, now
        elif now - self.seen[other][1] > self.patience:
            failure = f"rank {other} is gone: no sign of life for {self.patience:.0f} s{GOES_ON}", 1
            self.store.set("failure", json.dumps(failure))
            self._end(*failure)

    def _end(self, why: str, code: int, speaker: int = 0) -> None:
        """Ends the process without cleaning up: it is likely to hang in a collective with the rank that is gone.

        Args:
            why: is printed by the rank `speaker`.
            code: the exit code.
        """
        if self.stopped.is_set():
            return
        if self.rank == speaker:
            say(f"rto_fast: {why}", err=True)
        elif speaker == 0:  # the main rank prints and tells its launcher, so it ends first
            time.sleep(5 * INTERVAL)
        release_all()
        os._exit(code)

    def wait(self) -> None:
        """Waits until the thread knows which rank is gone or why; the thread then ends this process.

        The connection was lost, so a rank that misses a few heartbeats now is gone.
        """
        self.patience = 5 * INTERVAL
        self.thread.join(PATIENCE + 10 * INTERVAL)

    def fail(self, error: BaseException) -> None:
        """Tells the other ranks why this one ends, and with which exit code."""
        self.stopped.set()
        failure = f"rank {self.rank}: {error_line(error, with_type=not isinstance(error, UserError))}", 1
        if isinstance(error, Interrupted):
            failure = str(error), exit_code(error)
        with contextlib.suppress(RuntimeError, dist.DistError):
            if not self.store.check(["failure"]):  # the first one is the cause
                self.store.set("failure", json.dumps(failure))
        if self.rank == 0:  # the store ends with this process, and the others must read it first
            time.sleep(2 * INTERVAL)

    def leave(self) -> None:
        """Ends the watch when all ranks are done: a missing heartbeat then means nothing."""
        dist.barrier()
        self.stopped.set()
        self.thread.join()
        with contextlib.suppress(RuntimeError, dist.DistError):
            self.store.set(f"beat{self.rank}", LEFT)
        dist.barrier()
