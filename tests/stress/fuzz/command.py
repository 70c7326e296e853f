"""One command in a fork of this process, and the rules that it has to keep."""

import hashlib
import importlib
import io
import os
import random
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from rto_fast.system.command_line import error_line

SECONDS = 40.0  # in which a command ends, or is asked to; a tiny run takes three
GRACE = 20.0  # seconds from SIGTERM to the end of the present step
SECOND = 5.0  # seconds from a second SIGTERM to the end
MEMORY = 16 << 30  # bytes of addresses that a command may have
LONGEST = 2000  # characters that are read as one line


class Broken(Exception):
    """A command broke one of the rules."""


def one_line(error: BaseException) -> None:
    """Raises Broken unless this is how a mistake should be reported."""
    text = error_line(error)
    if not text.strip() or "\n" in text or len(text) > LONGEST:
        raise Broken(f"a mistake of {len(text)} characters in {len(text.splitlines())} lines: {text[:300]!r}")


def digest(folder: Path) -> dict[str, str]:
    """{path below the folder: hash of the file}."""
    found = {}
    for path in sorted(folder.rglob("*")):
        what = os.readlink(path).encode() if path.is_symlink() else path.read_bytes() if path.is_file() else b"folder"
        found[str(path.relative_to(folder))] = hashlib.sha256(what).hexdigest()
    return found


def streams(dice: random.Random, output: Path) -> tuple[str, Callable[[], None]]:
    """(name, what a fork calls to get its standard output and error)."""

    def open_at(path: str | Path, *descriptors: int) -> None:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor in descriptors:
            os.dup2(file, descriptor)

    def broken_pipe() -> None:
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        os.close(reader)
        os.close(writer)

    def wrapped(encoding: str) -> None:
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding=encoding, line_buffering=True)
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), encoding=encoding, line_buffering=True)

    def closed() -> None:
        os.close(1)
        sys.stdout = None  # as Python itself starts with `>&-`

    encoding = dice.choice(["utf-8", "utf-8", "ascii", "latin-1"])
    special = {"broken pipe": broken_pipe, "full": lambda: open_at("/dev/full", 1), "closed": closed}
    name = dice.choice([encoding] * 4 + list(special))

    def connect() -> None:
        open_at(output, 1, 2)
        wrapped(encoding)
        special.get(name, lambda: None)()

    return name, connect


def entry(module: str) -> Callable[[], None]:
    """What `python -m MODULE` calls."""
    imported = importlib.import_module(module)
    return importlib.import_module(f"{module}.__main__" if hasattr(imported, "__path__") else module).command


def check_command(
    folder: Path, module: str, arguments: list[str], variables: dict[str, str], stream: str, connect: Callable[[], None]
) -> None:
    """Runs `python -m MODULE ARGUMENTS` in `folder` with these environment variables, its streams as `streams` made them.

    Raises:
        Broken: it did not keep the rules.
    """
    output, precious = folder.parent / "output.txt", folder.parent / "precious"
    output.unlink(missing_ok=True)
    before = digest(precious)
    code = _fork(folder, module, arguments, variables, connect)
    _check(code, stream, output.read_text(errors="replace") if output.exists() else "")
    if not before.items() <= digest(precious).items():
        raise Broken("files of others have changed")


def _fork(
    folder: Path, module: str, arguments: list[str], variables: dict[str, str], connect: Callable[[], None]
) -> int:
    """The exit code."""
    sys.stdout.flush()
    process = os.fork()
    if not process:
        code = 1
        try:
            os.setsid()
            os.chdir(folder)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            connect()
            os.environ.update(variables)
            sys.argv = [module, *arguments]
            entry(module)()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in filter(None, (sys.stdout, sys.stderr)):
                try:
                    stream.flush()
                except (OSError, ValueError):
                    code = 120  # as Python ends then
            os._exit(code)
    insisted = False
    if not _wait(process, SECONDS):
        os.kill(process, signal.SIGTERM)
        if insisted := not _wait(process, GRACE):
            os.kill(process, signal.SIGTERM)
            if not _wait(process, SECOND):
                os.killpg(process, signal.SIGKILL)
                os.waitpid(process, 0)
                raise Broken(f"did not end within {SECONDS:.0f} s, nor at two SIGTERM")
    _, status = os.waitpid(process, 0)
    _nobody_left(process)
    code = os.waitstatus_to_exitcode(status)
    return 0 if insisted and code == -signal.SIGTERM else code


def _wait(process: int, seconds: float) -> bool:
    """Whether the process ends within that time. Its exit status is not collected."""
    end = time.monotonic() + seconds
    while os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def _nobody_left(group: int) -> None:
    end = time.monotonic() + 2.0
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    os.killpg(group, signal.SIGKILL)
    raise Broken("a process of it is left")


def _check(code: int, stream: str, said: str) -> None:
    if "Traceback" in said or "Exception ignored" in said:
        raise Broken("a traceback: " + said[-1500:])
    if code not in (0, 2) and not (stream in ("broken pipe", "full") and code in (120, 141)):
        raise Broken(f"exit code {code}: {said[-500:]}")
    if found := re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f\u202a-\u202e]|\x1b(?!\[[0-9;]*[mK])", said):
        raise Broken(f"the control character {found[0]!r} was printed: {said[max(0, found.start() - 100) :][:300]!r}")
    if code == 2 and not any(0 < len(line) < LONGEST for line in said.splitlines()[-1:]):
        raise Broken(f"exit code 2 without one line that says why: {said[-LONGEST:]!r}")
