"""The one function that prints (`say`), and output streams that cannot end a run.

Text from files, data, models and libraries is printed so that the terminal shows it and does not obey it. Where a stream is
no longer read, was closed or cannot encode a character, the run continues without the output.
"""

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
from typing import Any, TextIO

from rto_fast.system.notices import Notice

# Characters that reorder or hide the text around them, or that a terminal or an editor takes for a line break. Joiners,
# which scripts and emoji need, are not among them.
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
# How this package's own characters are printed where the encoding does not have them.
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
    """Text without characters that are invisible or act on a terminal or on the text around them: they are spelled as Python
    spells them, `\\x1b`. Line breaks and tabs stay."""
    return str(text).translate(LAYOUT)


def one_line(text: object) -> str:
    """`visible` text whose line breaks and tabs are spelled, too, for names that must not break a line."""
    return str(text).translate(BREAKS)


class Styled(str):
    """Text that `say` prints as it is: our own ANSI styles around text that is `visible` already. Text that is added to it
    is made visible. An f-string makes ordinary text of it, whose styles are spelled out."""

    def __add__(self, other: str) -> "Styled":
        return Styled(str(self) + _printable(other))

    def __radd__(self, other: str) -> "Styled":
        return Styled(_printable(other) + str(self))

    def join(self, parts: Iterable[str]) -> "Styled":
        return Styled(str(self).join(str(_printable(part)) for part in parts))


def styled(text: object, code: str) -> Styled:
    """`text` in an ANSI style, such as "1" for bold."""
    # Each line is styled by itself, because pagers forget the style at the end of a line.
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
    except (AttributeError, ValueError):  # the stream is None, or was closed
        return False


_last_said = -math.inf


def last_said() -> float:
    """The time at which `say` last printed, by `time.monotonic`."""
    return _last_said


def speaks() -> bool:
    """Whether this process prints: of several that a launcher started only the first one does. A RANK that was left in the
    environment of a single process, or is not a number, has no effect."""
    rank, size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    is_number = rank.isdecimal() and size.isdecimal() and len(rank + size) < 20
    return not (is_number and 0 < int(rank) < int(size))


def say(*parts: object, err: bool = False) -> None:
    """Prints a line, or several: the `parts` one after another, made `visible` unless they are `Styled`. Where the stream
    cannot be written, nothing happens.

    Args:
        parts: the text.
        err: print to stderr instead of stdout.
    """
    global _last_said
    _last_said = time.monotonic()
    text = "".join(map(_printable, parts)) + "\n"
    if not _live.lock.acquire(timeout=1.0):  # another thread hangs in a stream that nobody reads
        return _write(text, err)
    try:
        drawn = _live.text, _live.err
        redraw("", _live.err)
        _write(text, err)
        redraw(*drawn)
    finally:
        _live.lock.release()


class _LiveLine:
    """The text that is drawn in the terminal's last line, below all that `say` prints."""

    def __init__(self) -> None:
        self.text, self.err, self.lock = "", False, threading.RLock()


_live = _LiveLine()


def _in_a_fork() -> None:
    """Forgets the line, which belongs to the parent process, and its lock, which a thread of the parent may hold."""
    global _live
    _live = _LiveLine()


os.register_at_fork(after_in_child=_in_a_fork)


def redraw(text: str, err: bool = True) -> None:
    """Draws `text`, cut to the terminal's width, over the line that was drawn before. An empty text removes the line.

    Args:
        text: the line.
        err: draw on stderr, else on stdout.
    """
    with _live.lock:
        if text or _live.text:
            _write(f"\r{_cut(one_line(text), shutil.get_terminal_size().columns - 1)}\x1b[K", err)
        _live.text, _live.err = text, err


def _cut(text: str, columns: int) -> str:
    """As much of the text as fits in `columns`; a Chinese character takes two."""
    widths = accumulate(1 + (unicodedata.east_asian_width(character) in "WF") for character in text)
    return text[: sum(width <= columns for width in widths)]


def leave_line() -> None:
    """Leaves the line that was drawn where it is, above what is printed from now on."""
    with _live.lock:
        if _live.text:
            _write("\n", _live.err)
        _live.text = ""


def _write(text: str, err: bool) -> None:
    stream = sys.stderr if err else sys.stdout
    # The process may not have called `protect`, or somebody's code may have closed or replaced the stream.
    with contextlib.suppress(AttributeError, OSError, ValueError):
        stream.write(text)
        stream.flush()


class _Unfailing(io.FileIO):
    """A file to which writing never fails: what cannot be written is dropped.

    Args:
        descriptor: the open file.
        ends: end the process, with exit code 0, when the other end of a pipe is closed.
    """

    def __init__(self, descriptor: int, ends: bool):
        super().__init__(descriptor, "w", closefd=False)
        self.ends = ends

    def write(self, data: Any) -> int:
        try:
            while (count := super().write(data)) is None:  # a full pipe, opened as non-blocking
                select.select([], [self], [])
            return count
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # a disk may have room again
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.fileno())  # so that libraries and child processes can write, too
                os.close(null)
            if self.ends and error.errno == errno.EPIPE:
                raise SystemExit(0) from None
            return memoryview(data).nbytes


def _spell(error: UnicodeError) -> tuple[str, int]:
    """An error handler of codecs, which transcribes or spells out the characters that an encoding does not have."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text), error.end


codecs.register_error("rto_fast.spell", _spell)


def _unfailing(stream: TextIO | None, descriptor: int, ends: bool) -> TextIO:
    """The stream to use in place of `stream`, whose usual number is `descriptor`; a stream of None was closed."""
    if stream is not None:
        buffer = getattr(stream, "buffer", None)
        raw = getattr(buffer, "raw", buffer)
        if isinstance(raw, _Unfailing):
            raw.ends = ends
        elif isinstance(stream, io.TextIOWrapper):  # else it is a notebook's
            stream.reconfigure(errors="rto_fast.spell")
        if type(stream) is not io.TextIOWrapper or type(raw) is not io.FileIO:  # a test's, or a program's own
            return stream
    buffer, encoding = io.BufferedWriter(_Unfailing(descriptor, ends)), stream.encoding if stream else "utf-8"
    return io.TextIOWrapper(buffer, encoding, "rto_fast.spell", line_buffering=True)


_shown_notices: set[str] = set()


class _Record(logging.LogRecord):
    """A library's log record, made visible, because it may quote names of files and of weights."""

    def getMessage(self) -> str:
        return visible(super().getMessage())


def _show_exception(kind: type[BaseException], error: BaseException | None, trace: types.TracebackType | None) -> None:
    """Prints an error with its traceback, made visible, because its message may quote anything."""
    say("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"), err=True)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    text, place = f"warning: {one_line(message)}", f" ({category.__name__}, {filename}:{lineno})"
    if isinstance(message, Notice):
        place = ""
        if text in _shown_notices:
            return
        _shown_notices.add(text)  # Python forgets what was shown whenever a library changes the filters
    if speaks():
        say(text, place, err=True)


def protect(ends: bool = False) -> None:
    """Makes stdout and stderr safe for the rest of the process, and makes visible what Python itself prints: tracebacks,
    warnings and log records. Streams that are not files, such as those of tests and notebooks, are not replaced.

    Args:
        ends: end the process, with exit code 0, when its stdout is no longer read.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file that is opened would get this number, and libraries would print into it
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout, sys.stderr = _unfailing(sys.stdout, 1, ends), _unfailing(sys.stderr, 2, False)
    logging.setLogRecordFactory(_Record)
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _show_exception
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = lambda fault: _show_exception(fault.exc_type, fault.exc_value, fault.exc_traceback)
    _shown_notices.clear()
    warnings.showwarning = _show_warning
