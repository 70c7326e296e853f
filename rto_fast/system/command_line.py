"""What the commands share: a mistake of the user ends in one line, not in a traceback."""

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Iterator

from rto_fast.errors import Interrupted, UserError
from rto_fast.system import deepspeed_import, terminal
from rto_fast.system.progress import shown


def error_line(error: BaseException, kind: bool = False) -> str:
    """What is said of an error, its notes included. Messages quote data, files and other people's errors: no line breaks,
    nothing that a terminal would obey. kind: its type's name goes first."""
    parts = [type(error).__name__] if kind or not str(error) else []
    text = ": ".join([*parts, *filter(None, [str(error)])])
    lines = "; ".join([text, *getattr(error, "__notes__", [])]).splitlines()
    return terminal.one_line(" ".join(filter(None, map(str.strip, lines))))  # spaces inside a line may be a path's


def exit_code(stop: Interrupted) -> int:
    return 0 if stop.signal == signal.SIGTERM else 128 + stop.signal  # a scheduler that asks for an end gets one


def _tell(text):
    if terminal.speaks():
        terminal.say(f"rto_fast: {text}", err=True)


def _end_at_next_signal() -> None:
    """What is still to be ended, threads and libraries, may hang."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def as_command(*, interrupted: str | None = None, only_prints: bool = False) -> Iterator[None]:
    """Runs the body as a command: a mistake ends the process with one line and exit code 2, Ctrl-C with exit code 130.

    `--debug` is taken out of `sys.argv`; with it a mistake shows its traceback.

    Args:
        interrupted: What is said after Ctrl-C.
        only_prints: The command does nothing but print, so it may end when nobody reads any more (`| head`).
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    debug = "--debug" in sys.argv[1:]
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        with warnings.catch_warnings(), deepspeed_import.hidden(), shown():
            terminal.protect(only_prints)
            if not sys.flags.safe_path and os.getcwd() not in sys.path:
                sys.path.append(
                    os.getcwd()
                )  # for users' functions; `python -m` has it there, the script `rto-fast` not
            yield
    except (UserError, OSError) as error:  # OSError: a disk, a folder or a network that refuses what is asked of it
        if debug:
            raise
        _tell(error_line(error))
        sys.exit(2)
    except Interrupted as stop:
        _end_at_next_signal()
        _tell(str(stop))
        sys.exit(exit_code(stop))
    except KeyboardInterrupt:
        _end_at_next_signal()
        if interrupted:
            _tell(interrupted)
        sys.exit(130)
