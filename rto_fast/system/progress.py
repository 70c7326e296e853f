"""Shows on stderr how far anything is that lasts longer than `PATIENCE` seconds, and how long it will still take.

    with progress("dpo: reference log-probs", total=len(pairs), unit="pairs") as phase:
        for pair in pairs:
            ...
            phase.advance()

A terminal shows one line that is redrawn. A file gets a line after 5, 10, 20, 40 … seconds in which the command printed
nothing else, counted from the start of the outermost phase. Of nested phases the innermost one that lasts long is shown.
Nothing is shown before a command asks for it (`shown`), and only one of several processes shows anything.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from rto_fast.system.terminal import is_live, last_said, one_line, redraw, say, speaks

PATIENCE = 5.0  # seconds without output
INTERVAL = 0.5  # seconds between two checks
LONGEST_SILENCE = 600.0  # seconds between two lines in a file, at most
_LOCK = threading.Lock()


class Progress:
    """One phase.

    Args:
        what: its name.
        total: the number of items, None where it is not known.
        unit: what an item is called.
        done: items that were done before.
        has_line: another live line shows this phase while it advances.
    Attributes:
        note: appended to the line.
        part: how much of the next item is done, 0 to 1.
    """

    def __init__(self, what: str, total: int | None, unit: str, done: int = 0, has_line: bool = False):
        self.what, self.total, self.unit = what, total, unit
        self.count = self.done = done
        self.has_line, self.note, self.part = has_line, "", 0.0
        self.start = self.advanced = time.monotonic()

    def advance(self, count: int = 1) -> None:
        self.count += count
        self.part = 0.0
        self.advanced = time.monotonic()

    def line(self) -> str:
        elapsed = time.monotonic() - self.start
        parts = []
        reached = self.count + self.part
        if self.total is not None or self.count:
            count = f"{reached:,.1f}" if self.part else f"{self.count:,}"
            parts.append(count + (f" of {self.total:,}" if self.total is not None else "") + f" {self.unit}")
        parts.append(duration(elapsed))
        fresh = reached - self.done
        if self.total is not None and fresh > 0:
            parts[-1] += f", about {duration(elapsed / fresh * max(0, self.total - reached))} left"
        return one_line(f"{self.what}: {', '.join(parts)}{f' ({self.note})' if self.note else ''}")


class _Display:
    """The phases in progress, and the thread that shows them."""

    def __init__(self) -> None:
        self.is_on = self.has_drawn = False
        self.phases: list[Progress] = []
        self.thread: threading.Thread | None = None
        self.ended = threading.Event()

    def begin(self, phase: Progress) -> None:
        with _LOCK:
            self.phases.append(phase)
            if self.thread is None and self.is_on and speaks():
                self.ended = threading.Event()
                self.thread = threading.Thread(target=self._watch, args=(self.ended,), name="progress", daemon=True)
                self.thread.start()

    def end(self, phase: Progress) -> None:
        with _LOCK:
            self.phases.remove(phase)
            thread = self.thread if not self.phases else None
            if self.has_drawn:
                self.has_drawn = False
                redraw("")
            if thread:
                self.thread = None
                self.ended.set()
        if thread:
            thread.join(1.0)

    def _watch(self, ended: threading.Event) -> None:
        while not ended.wait(INTERVAL):
            with _LOCK:
                if not ended.is_set():
                    self._show()

    def _show(self) -> None:
        now = time.monotonic()
        phase = next((phase for phase in reversed(self.phases) if now - phase.start >= PATIENCE), None)
        if phase is None or (phase.has_line and is_live(err=True) and now - phase.advanced < PATIENCE):
            return
        if is_live(err=True):
            redraw(phase.line())
            self.has_drawn = True
            return
        start = self.phases[0].start
        word = max(last_said(), start)
        if now - word >= min(max(word - start, PATIENCE), LONGEST_SILENCE):
            say(phase.line(), err=True)


_DISPLAY = _Display()
_OBSERVERS: list[Callable[[Progress], AbstractContextManager[object]]] = []


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """Lets phases in a `with` block be shown."""
    before, _DISPLAY.is_on = _DISPLAY.is_on, True
    try:
        yield
    finally:
        _DISPLAY.is_on = before


@contextlib.contextmanager
def progress(
    what: str = "", total: int | None = None, unit: str = "items", *, done: int = 0, has_line: bool = False
) -> Iterator[Progress]:
    """Shows a `with` block as a phase once it lasts long. An empty `what` takes the name of the phase around it. See
    `Progress` for the other arguments."""
    around = _DISPLAY.phases[-1].what if _DISPLAY.phases else "working"
    phase = Progress(what or around, total, unit, done, has_line)
    _DISPLAY.begin(phase)
    try:
        with contextlib.ExitStack() as observers:
            for observer in _OBSERVERS:
                observers.enter_context(observer(phase))
            yield phase
    finally:
        _DISPLAY.end(phase)


@contextlib.contextmanager
def observed(observer: Callable[[Progress], AbstractContextManager[object]]) -> Iterator[None]:
    """Enters `observer(phase)` around each phase that begins in a `with` block, as a measurement of phases does."""
    _OBSERVERS.append(observer)
    try:
        yield
    finally:
        _OBSERVERS.remove(observer)


def advance(count: int = 1) -> None:
    """Advances the innermost phase, for code that does not know the phase."""
    phases = _DISPLAY.phases
    if phases:
        phases[-1].advance(count)


def advance_part(part: float) -> None:
    """Sets how much of the next item of the innermost phase is done (0 to 1), for items that take long."""
    phases = _DISPLAY.phases
    if phases:
        phases[-1].part = part


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
