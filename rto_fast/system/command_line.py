"""What all commands share: the user's mistakes end them with one line instead of a traceback."""

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
    """An error and its notes as one line of text, without characters that a terminal would obey.

    Args:
        error: The error; its message may quote data, files and other libraries' errors.
        kind: Whether the line begins with the name of the error's type.
    """
    parts = [type(error).__name__] if kind or not str(error) else []
    text = ": ".join([*parts, *filter(None, [str(error)])])
    lines = "; ".join([text, *getattr(error, "__notes__", [])]).splitlines()
    return terminal.one_line(" ".join(filter(None, map(str.strip, lines))))  # spaces inside a line may belong to a path


def exit_code(stop: Interrupted) -> int:
    """0 after SIGTERM, by which a scheduler asks for the end; else the shell's code for the signal."""
    return 0 if stop.signal == signal.SIGTERM else 128 + stop.signal


def _tell(text: str) -> None:
    if terminal.speaks():
        terminal.say(f"rto_fast: {text}", err=True)


def _end_at_next_signal() -> None:
    """Threads and libraries that are still to be ended may hang: the next signal ends the process at once."""
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
