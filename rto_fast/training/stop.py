"""A stop that loses nothing: Ctrl-C, or a scheduler's SIGTERM."""

import signal
import threading
import time
from pathlib import Path

from rto_fast.errors import Interrupted


class StopRequest:
    """Ends the run at once where nothing would be lost, and in a stage (`waits`) after the present step; a second Ctrl-C
    everywhere at once. As a context it takes the signals; without, none ever comes.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.since, self.waits = 0.0, False
        self.folder: str | Path | None = None  # of a run that can be resumed

    def __enter__(self):
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # others cannot take signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number, frame):
        if self.signal is None:
            self.signal, self.since = number, time.monotonic()
            if not self.waits:
                raise self.interrupted("stopped", together=False)
        elif number == signal.SIGINT and time.monotonic() - self.since > 2.0:
            raise KeyboardInterrupt  # sooner it was the launcher's echo of the first

    def interrupted(self, what: str, together: bool = True) -> Interrupted:
        """The error that ends the run. what: is said, followed by how to go on."""
        how = f"go on with: python -m rto_fast.train --resume {self.folder}"
        message = f"{what}; {how}" if self.folder else f"{what} before the first step; start it again"
        return Interrupted(message, self.signal or signal.SIGTERM, together)
