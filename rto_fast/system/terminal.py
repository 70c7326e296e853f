"""The terminal: the one function that prints, and streams that cannot end a run.

Text from files, data, models and libraries is printed as it looks, never as the terminal would obey it. A stream that
nobody reads any more, that was closed or that cannot encode a character costs the printing, not the run.
"""

import argparse
import codecs
import contextlib
import errno
import io
import logging
import math
import os
import select
import shutil
import sys
import threading
import time
import traceback
import types
import unicodedata
import warnings
from collections.abc import Iterable
from itertools import accumulate
from typing import Any, NoReturn, TextIO

from rto_fast.system.notices import Notice

# Characters that reorder or hide the text around them, or break a line where a terminal or an editor knows more line
# breaks than Python's; joiners, which scripts and emoji need, stay.
ACTING = {
    0x061C,
    0x180E,
    0x200B,
    0x200E,
    0x200F,
    *range(0x2028, 0x202F),
    *range(0x2060, 0x2070),
    0xFEFF,
    *range(0xFFF9, 0xFFFC),
    *range(0xE0000, 0xE0080),
    *range(0xD800, 0xE000),  # lone surrogates, which UTF-8 cannot hold
    *range(0x20),
    *range(0x7F, 0xA0),
}
SPELLED = {
    code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}" for code in ACTING
}
LAYOUT = {code: spelling for code, spelling in SPELLED.items() if chr(code) not in "\n\t"}
BREAKS = SPELLED | {ord("\n"): "\\n", ord("\t"): "\\t", ord("\r"): "\\r"}
# What this package's own text looks like where the encoding has no such characters.
PLAIN = {
    "±": "+/-",
    "−": "-",
    "–": "-",
    "—": "-",
    "…": "...",
    "←": "<-",
    "→": "->",
    "×": "x",
    "·": "*",
    "█": "#",
    "│": "|",
    "─": "-",
    "⟦": "[[",
    "⟧": "]]",
    "’": "'",
    "‖": "||",
    "π": "pi",
}


def visible(text: object) -> str:
    """Text in which nothing is invisible or acts on its neighbours or on a terminal: control characters and their like are
    spelled as Python spells them, `\\x1b`. Line breaks and tabs stay."""
    return str(text).translate(LAYOUT)


def one_line(text: object) -> str:
    """`visible` text without line breaks and tabs: of somebody else's name, which is to be no line of its own."""
    return str(text).translate(BREAKS)


class Styled(str):
    """Text that `say` prints as it is: our own ANSI styles around text that is `visible` already. What is added to it is
    made visible first; in an f-string it is ordinary text again, its styles spelled out."""

    def __add__(self, other: str) -> "Styled":
        return Styled(str(self) + _printable(other))

    def __radd__(self, other: str) -> "Styled":
        return Styled(_printable(other) + str(self))

    def join(self, parts: Iterable[str]) -> "Styled":
        return Styled(str(self).join(str(_printable(part)) for part in parts))


def styled(text: object, code: str) -> Styled:
    """`text` in an ANSI style, such as "1" for bold."""
    # Every line by itself: pagers forget the style at the end of a line.
    lines = visible(text).split("\n")
    return Styled("\n".join(f"\x1b[{code}m{line}\x1b[0m" if line else line for line in lines))


def _printable(text: object) -> str:
    return str(text) if isinstance(text, Styled) else visible(text)


def wants_styles() -> bool:
    """Whether stdout is a terminal that shows styles, see https://no-color.org."""
    return is_live() and not os.environ.get("NO_COLOR")


def is_live(err: bool = False) -> bool:
    """Whether stdout (err: stderr) is a terminal on which a line can be redrawn."""
    try:
        return (sys.stderr if err else sys.stdout).isatty() and os.environ.get("TERM") != "dumb"
    except (AttributeError, ValueError):  # None, or closed by somebody's code
        return False


_last_said = -math.inf


def last_said() -> float:
    """When `say` last printed, by `time.monotonic`."""
    return _last_said


def speaks() -> bool:
    """Whether this process is to be heard: of several that a launcher started, the first. A RANK that is left in the
    environment of a single process, or is none, silences nobody."""
    rank, size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    is_number = rank.isdecimal() and size.isdecimal() and len(rank + size) < 20
    return not (is_number and 0 < int(rank) < int(size))


def say(*parts: object, err: bool = False) -> None:
    """Prints a line (or several): `parts` one after another, made `visible` unless they are `Styled`; nothing where that
    cannot be done.

    Args:
        err: to stderr.
    """
    global _last_said
    _last_said = time.monotonic()
    text = "".join(map(_printable, parts)) + "\n"
    if not _live.lock.acquire(timeout=1.0):  # another thread waits for somebody who does not read
        return _write(text, err)
    try:
        drawn = _live.text, _live.err
        redraw("", _live.err)
        _write(text, err)
        redraw(*drawn)
    finally:
        _live.lock.release()


class _LiveLine:
    """What is drawn in the terminal's last line, below all that `say` prints."""

    def __init__(self) -> None:
        self.text, self.err, self.lock = "", False, threading.RLock()


_live = _LiveLine()


def _in_a_fork() -> None:
    """The line is the parent's, whose threads may have been drawing it."""
    global _live
    _live = _LiveLine()


os.register_at_fork(after_in_child=_in_a_fork)


def redraw(text: str, err: bool = True) -> None:
    """Draws `text` over the line that was drawn before; an empty one removes it. Cut to the terminal's width.

    Args:
        err: to stderr, else to stdout.
    """
    with _live.lock:
        if text or _live.text:
            _write(f"\r{_cut(one_line(text), shutil.get_terminal_size().columns - 1)}\x1b[K", err)
        _live.text, _live.err = text, err


def _cut(text: str, columns: int) -> str:
    """As much of the text as so many columns show; a Chinese character takes two."""
    widths = accumulate(1 + (unicodedata.east_asian_width(character) in "WF") for character in text)
    return text[: sum(width <= columns for width in widths)]


def leave_line() -> None:
    """The line that was drawn stays where it is, above what is printed from now on."""
    with _live.lock:
        if _live.text:
            _write("\n", _live.err)
        _live.text = ""


def _write(text: str, err: bool) -> None:
    stream = sys.stderr if err else sys.stdout
    # Of a process that `protect` was not called in, or a stream that somebody's code has closed or put in place.
    with contextlib.suppress(AttributeError, OSError, ValueError):
        stream.write(text)
        stream.flush()


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, whose help and mistakes are printed as everything is: a mistake as one line."""

    def _print_message(self, message: str, file: Any = None) -> None:
        if message:
            say(message.rstrip("\n"), err=file is not None and file is not sys.stdout)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"rto_fast: {one_line(message.removeprefix('argument '))}; see {self.prog} --help")


class _Unfailing(io.FileIO):
    """A descriptor to which writing never fails: what cannot be written is dropped.

    Args:
        ends: the process ends, with 0, when nobody reads any more.
    """

    def __init__(self, descriptor: int, ends: bool):
        super().__init__(descriptor, "w", closefd=False)
        self.ends = ends

    def write(self, data: Any) -> int:
        try:
            while (count := super().write(data)) is None:  # a full pipe that does not wait by itself
                select.select([], [self], [])
            return count
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # a disk may have room again, a reader does not return
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.fileno())  # so that libraries' and child processes' output has a place to go, too
                os.close(null)
            if self.ends and error.errno == errno.EPIPE:
                raise SystemExit(0) from None
            return memoryview(data).nbytes


def _spell(error: UnicodeError) -> tuple[str, int]:
    """An error handler of codecs: what an encoding does not have is transcribed, or spelled out."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text), error.end


codecs.register_error("rto_fast.spell", _spell)


def _unfailing(stream: TextIO | None, descriptor: int, ends: bool) -> TextIO:
    """`stream`, of which `descriptor` is the usual number, or what takes its place. Closed: None."""
    if stream is not None:
        buffer = getattr(stream, "buffer", None)
        raw = getattr(buffer, "raw", buffer)
        if isinstance(raw, _Unfailing):
            raw.ends = ends
        elif isinstance(stream, io.TextIOWrapper):  # else of a notebook
            stream.reconfigure(errors="rto_fast.spell")
        if type(stream) is not io.TextIOWrapper or type(raw) is not io.FileIO:  # of a test, or a program's own
            return stream
    buffer, encoding = io.BufferedWriter(_Unfailing(descriptor, ends)), stream.encoding if stream else "utf-8"
    return io.TextIOWrapper(buffer, encoding, "rto_fast.spell", line_buffering=True)


_told: set[str] = set()


class _Record(logging.LogRecord):
    """A library's log line; it may quote names of files and of weights."""

    def getMessage(self) -> str:
        return visible(super().getMessage())


def _show_exception(kind: type[BaseException], error: BaseException | None, trace: types.TracebackType | None) -> None:
    """A fault of ours, with its traceback; its message may quote anything."""
    say("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"), err=True)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    text, place = f"warning: {one_line(message)}", f" ({category.__name__}, {filename}:{lineno})"
    if isinstance(message, Notice):
        place = ""
        if text in _told:
            return
        _told.add(text)  # Python's own record of what was shown is lost whenever a library changes the filters
    if speaks():
        say(text, place, err=True)


def protect(ends: bool = False) -> None:
    """Makes this process's streams safe, for good, and has what Python prints by itself escaped, too: tracebacks, warnings,
    log lines. Streams that are no file's, as those of tests and notebooks, keep their place.

    Args:
        ends: the process only prints: it ends, with 0, when nobody reads its stdout any more.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file that is opened would get this number, and what libraries print
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout, sys.stderr = _unfailing(sys.stdout, 1, ends), _unfailing(sys.stderr, 2, False)
    logging.setLogRecordFactory(_Record)
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _show_exception
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = lambda fault: _show_exception(fault.exc_type, fault.exc_value, fault.exc_traceback)
    _told.clear()
    warnings.showwarning = _show_warning
