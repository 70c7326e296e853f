"""A stop that loses nothing, after Ctrl-C, a scheduler's SIGTERM or a terminal's SIGHUP. A second Ctrl-C or SIGTERM ends the
process at once."""

import ctypes
import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any, Self

from rto_fast.errors import Interrupted, how_to_go_on
from rto_fast.system.terminal import say, speaks

INSISTENT = signal.SIGINT, signal.SIGTERM
SIGNALS = *INSISTENT, signal.SIGHUP  # SIGHUP: the terminal was closed
# Seconds in which a further signal is an echo of the first: `timeout` sends its signal twice, and a launcher passes on the
# signal that the terminal has sent to all its processes.
ECHO = 0.5


class StopRequest:
    """Ends the run at once where nothing would be lost, and in a stage (`waits`) after the present step.

    As a context it handles SIGINT, SIGTERM, and SIGHUP unless that is ignored (`nohup`). Outside of a context it never asks
    for an end.

    After the first signal and its echo, SIGINT and SIGTERM have the system's default action again: the next one ends the
    process, whatever it is doing. SIGHUP does not: a user who closes the terminal after Ctrl-C does not insist. A thread
    restores the actions, for Python calls handlers in the main thread only, which may be in foreign code that does not
    return. (Code that has held Python's lock since before the first signal can only be ended by SIGKILL.)
    """

    active: "StopRequest | None" = None  # the one that handles signals in this process

    def __init__(self) -> None:
        self.signal: int | None = None
        self.waits = False
        self.folder: str | Path | None = None  # of a run that can be resumed
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # others cannot handle signals
            for number in SIGNALS:
                if number in INSISTENT or signal.getsignal(number) is not signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self._receive)
            self.left, self.lock = threading.Event(), threading.Lock()
            reading, self.writing = os.pipe()
            os.set_blocking(self.writing, False)
            self.wakeup_before = signal.set_wakeup_fd(self.writing)  # receives the number of each signal
            threading.Thread(target=self._give_back, args=(reading,), daemon=True).start()
            StopRequest.active = self
        return self

    def __exit__(self, *_: object) -> None:
        if self.before:
            with self.lock:
                self.left.set()
            self._take_off()
            os.close(self.writing)

    def _take_off(self) -> None:
        StopRequest.active = None
        signal.set_wakeup_fd(self.wakeup_before)
        for number, handler in self.before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not set by Python

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = number
            if not self.waits:
                raise self.interrupted("stopped", together=False)

    def _give_back(self, reading: int) -> None:
        """Waits in a thread for the first signal, then restores the system's actions of Ctrl-C and SIGTERM.

        Args:
            reading: the descriptor of a pipe with the numbers of the signals.
        """
        with open(reading, "rb", buffering=0) as numbers:
            while (number := numbers.read(1)) and number[0] not in self.before:
                pass  # another signal, with a handler of its own
            ours = number and signal.getsignal(number[0]) == self._receive  # a library may have taken it over
            if ours and self.waits and speaks():
                say(
                    "rto_fast: stopping: the present step ends first and is saved; a second signal ends the run at once",
                    err=True,
                )
            if number and not self.left.wait(ECHO):
                with self.lock:
                    if not self.left.is_set():
                        for signal_number in INSISTENT:  # `signal.signal` works in the main thread only
                            ctypes.CDLL(None).signal(int(signal_number), ctypes.c_void_p(signal.SIG_DFL))

    def interrupted(self, what: str, together: bool = True) -> Interrupted:
        """Makes the error that ends the run.

        Args:
            what: the message, which is followed by how to go on.
            together: all ranks end at the same point.
        """
        message = (
            f"{what}; {how_to_go_on(self.folder)}" if self.folder else f"{what} before the first step; start it again"
        )
        return Interrupted(message, self.signal or signal.SIGTERM, together)


def _in_a_fork() -> None:
    """Restores the signals' actions in a worker process, which a signal must end at once."""
    if StopRequest.active:
        StopRequest.active._take_off()


os.register_at_fork(after_in_child=_in_a_fork)
