"""Becoming one of the ranks that torchrun, deepspeed or srun started, and not waiting for one that is gone.

A rank that dies leaves the others in a collective that never ends. So each writes a heartbeat into the store by which they
found each other; the main rank looks at all of them, the others at the main rank's and for a failure that somebody reported.
"""

import argparse
import contextlib
import datetime
import json
import os
import threading
import time

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from rto_fast.config.fields import CountOr0
from rto_fast.config.options import argument
from rto_fast.errors import ConfigError, Interrupted, UserError
from rto_fast.system.command_line import error_line, exit_code
from rto_fast.system.run_lock import release_all
from rto_fast.system.terminal import say

INTERVAL = 1.0  # seconds between heartbeats
PATIENCE = 30.0  # seconds without one after which a rank is gone
# A collective's own limit: ranks wait for slow reward functions, `Watch` for dead ranks.
WAIT = datetime.timedelta(days=7)
LEFT = "left"


def from_environment(name: str, default: int) -> int:
    """A count or a rank that a launcher sets.

    Raises:
        ConfigError: it is no number of at least 0.
    """
    text = os.environ.get(name)
    try:
        return default if text is None else argument(CountOr0)(text)
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"{name}: {error}; unset it, or start with torchrun, deepspeed or srun") from None


def started_by_launcher() -> bool:
    return from_environment("WORLD_SIZE", 1) > 1


def local_rank() -> int:
    return from_environment("LOCAL_RANK", 0)


@contextlib.contextmanager
def joined(use_deepspeed=False):
    """Joins the other ranks for the time of the context.

    Args:
        use_deepspeed: also where this is the only process.
    Raises:
        ConfigError: the launcher's environment is incomplete, or nobody answers.
    """
    if not started_by_launcher():
        if use_deepspeed:
            os.environ["LOCAL_RANK"] = "0"  # DeepSpeed wants to be told
            dist.init_process_group(_backend(), store=dist.HashStore(), rank=0, world_size=1)
        try:
            yield
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        return
    rank, size = from_environment("RANK", 0), from_environment("WORLD_SIZE", 1)
    if rank >= size:  # torch waits for ten minutes, in code that no signal interrupts
        raise ConfigError(
            f"RANK: expected a number below WORLD_SIZE ({size}), got {rank}; start with torchrun, deepspeed or srun"
        )
    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=datetime.timedelta(minutes=10))))
    except (ValueError, RuntimeError, dist.DistError) as error:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the processes do not find each other; start "
            f"them with torchrun, deepspeed or srun ({str(error).splitlines()[0]})"
        ) from error
    store.set_timeout(WAIT)
    if local_rank() < torch.cuda.device_count():  # else the run says so, or wants the CPU
        torch.cuda.set_device(local_rank())
    # A connection of its own: a group's creation waits on the other one for as long as it takes.
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


def _backend():
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def _lost_connection(error):
    """Whether a collective failed because another rank is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


GOES_ON = "; the run stopped, --resume goes on from its last checkpoint"  # an error says so itself


class Watch:
    """A thread that ends this process when another rank failed or is gone.

    Args:
        store: of c10d, this class's own keys.
    """

    def __init__(self, store, rank, size):
        self.store, self.rank = store, rank
        self.others = [other for other in range(size) if other != rank] if rank == 0 else [0]
        self.stopped, self.patience = threading.Event(), PATIENCE
        self.seen = {other: ("", time.monotonic()) for other in self.others}
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
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

    def _look_at(self, other):
        key, now = f"beat{other}", time.monotonic()
        beat = self.store.get(key).decode() if self.store.check([key]) else ""
        if beat == LEFT or beat != self.seen[other][0]:
            self.seen[other] = beat, now
        elif now - self.seen[other][1] > self.patience:
            failure = f"rank {other} is gone: no sign of life for {self.patience:.0f} s{GOES_ON}", 1
            self.store.set("failure", json.dumps(failure))
            self._end(*failure)

    def _end(self, why, code, speaker=0):
        """Without cleaning up: this process is likely to hang in a collective with the rank that is gone."""
        if self.stopped.is_set():
            return
        if self.rank == speaker:
            say(f"rto_fast: {why}", err=True)
        elif speaker == 0:  # the main rank speaks, also to its launcher: it goes first
            time.sleep(5 * INTERVAL)
        release_all()
        os._exit(code)

    def wait(self):
        """For the thread to find out which rank is gone, or why; it then ends this process. A connection was lost: the rank
        that misses a few beats now is the one."""
        self.patience = 5 * INTERVAL
        self.thread.join(PATIENCE + 10 * INTERVAL)

    def fail(self, error):
        """Tells the other ranks why this one ends, and with which exit code."""
        self.stopped.set()
        failure = f"rank {self.rank}: {error_line(error, kind=not isinstance(error, UserError))}", 1
        if isinstance(error, Interrupted):
            failure = str(error), exit_code(error)
        with contextlib.suppress(RuntimeError, dist.DistError):
            if not self.store.check(["failure"]):  # the first one is the cause
                self.store.set("failure", json.dumps(failure))
        if self.rank == 0:  # the store ends with this process: the others are to read it first
            time.sleep(2 * INTERVAL)

    def leave(self):
        """All ranks are done: after this no sign of life is no bad sign."""
        dist.barrier()
        self.stopped.set()
        self.thread.join()
        with contextlib.suppress(RuntimeError, dist.DistError):
            self.store.set(f"beat{self.rank}", LEFT)
        dist.barrier()
