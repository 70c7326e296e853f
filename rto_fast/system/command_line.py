"""Runs a command: a mistake of the user ends it with one line instead of a traceback."""

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Iterator

from rto_fast.errors import Interrupted, UserError, error_text
from rto_fast.system import deepspeed_import, terminal
from rto_fast.system.progress import shown


def error_line(error: BaseException, with_type: bool | None = None) -> str:
    """The message of an error with its notes, printable on one line; see `error_text`."""
    return terminal.one_line(error_text(error, with_type, with_notes=True))


def exit_code(stop: Interrupted) -> int:
    return 0 if stop.signal == signal.SIGTERM else 128 + stop.signal  # to a scheduler a job that obeyed has not failed


def _tell(text: str) -> None:
    if terminal.speaks():
        terminal.say(f"rto_fast: {text}", err=True)


def _end_at_next_signal() -> None:
    """Lets a second signal end the process, because threads and libraries may hang while they are closed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def as_command(*, interrupted: str | None = None, only_prints: bool = False) -> Iterator[None]:
    """Runs the body as a command: a mistake ends the process with one line and exit code 2, Ctrl-C with exit code 130.

    `--debug` is taken out of `sys.argv`; with it a mistake shows its traceback.

    Args:
        interrupted: the message after Ctrl-C.
        only_prints: the command does nothing but print, so it ends when its output is no longer read (`| head`).
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
                )  # for users' functions: `python -m` adds it, the script `rto-fast` does not
            yield
    except (UserError, OSError) as error:  # OSError: of a disk, a folder or a network
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
