"""What the commands share: a mistake of the user ends in one line, not in a traceback."""

import os
import signal
import sys
from collections.abc import Callable

from rto_fast.data.inspection import visible
from rto_fast.errors import Interrupted, UserError
from rto_fast.reporting.progress import shown
from rto_fast.training import deepspeed_import


def one_line(error: BaseException, kind: bool = False) -> str:
    """What is said of an error, its notes included. Messages quote data, files and other people's errors: no line breaks,
    nothing that a terminal would obey. kind: its type's name goes first."""
    parts = [type(error).__name__] if kind or not str(error) else []
    text = ": ".join([*parts, *filter(None, [str(error)])])
    return visible(" ".join("; ".join([text, *getattr(error, "__notes__", [])]).split()))


def exit_code(stop: Interrupted) -> int:
    return 130 if stop.signal == signal.SIGINT else 0  # a scheduler that asks for an end gets one


def _tell(text):
    if os.environ.get("RANK", "0") == "0":  # of several processes, one speaks
        print(f"rto_fast: {text}", file=sys.stderr)


def _end_at_next_signal():
    """What is still to be ended, threads and libraries, may hang."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def run_command(main: Callable[[list[str]], object], *, interrupted: str | None = None) -> None:
    """Calls `main` with the command line's arguments; exit code 2 after a mistake, 130 after Ctrl-C.

    Args:
        interrupted: what is said after Ctrl-C. `--debug`, taken from the arguments, shows the traceback of a mistake instead
            of one line.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with deepspeed_import.hidden(), shown():
            main([argument for argument in sys.argv[1:] if argument != "--debug"])
    except BrokenPipeError:  # `| head`
        raise
    except (UserError, OSError) as error:  # OSError: a disk, a folder or a network that refuses what is asked of it
        if "--debug" in sys.argv:
            raise
        _tell(one_line(error))
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
