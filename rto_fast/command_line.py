"""What the commands share: a mistake of the user ends in one line, not in a traceback."""

import os
import signal
import sys

from rto_fast.errors import Interrupted, UserError


def run_command(main, *, interrupted=None, tell=str):
    """Calls `main` with the command line's arguments; exit code 2 after a mistake, 130 after Ctrl-C.

    Args:
        interrupted: what is said after Ctrl-C. tell: a mistake → its line. `--debug`, taken from the arguments, shows the
            traceback instead.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        main([argument for argument in sys.argv[1:] if argument != "--debug"])
    except UserError as error:
        if "--debug" in sys.argv:
            raise
        print(f"rto_fast: {tell(error)}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stop:
        print(f"rto_fast: {stop}", file=sys.stderr)
        sys.exit(130 if stop.signal == signal.SIGINT else 0)  # a scheduler that asks for an end gets one
    except KeyboardInterrupt:
        if interrupted:
            print(f"rto_fast: {interrupted}", file=sys.stderr)
        sys.exit(130)
