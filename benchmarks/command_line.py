"""The command line of the benchmarks."""

import argparse
import sys
from typing import Any, NoReturn

from rto_fast.system.terminal import one_line, say


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, whose output goes through `say`; a mistake is one line."""

    def _print_message(self, message: str, file: Any = None) -> None:
        if message:
            say(message.rstrip("\n"), err=file is not None and file is not sys.stdout)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"rto_fast: {one_line(message.removeprefix('argument '))}; see {self.prog} --help")
