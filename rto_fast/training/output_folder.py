"""The folder of a run: one run uses it at a time, and a new run must find it empty."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from rto_fast.config import Config
from rto_fast.errors import ConfigError
from rto_fast.system.run_lock import RunLock, is_lock, refuse_if_in_use
from rto_fast.training import ranks
from rto_fast.training.checkpoint_checks import UNSTARTED

# The files of a run that ended before its first step, by a mistake or a kill.
UNSTARTED_FILES = re.compile(rf"config\.yaml|base|warnings\.jsonl|{re.escape(UNSTARTED)}|\..*\.(part|old)")


@contextlib.contextmanager
def claimed_output(config: Config) -> Iterator[RunLock | None]:
    """Locks the run's folder for this run. The lock is None on all ranks but the main one.

    Raises:
        ConfigError: another run uses the folder, it cannot be used, or it is not empty for a new run. Nothing is changed.
    """
    if not ranks.is_main():
        yield None
        return
    folder = Path(config.resume or config.output_dir)
    made = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    with _usable(folder):
        refuse_if_in_use(folder)
        if not config.resume:
            refuse_what_is_there(folder)
            folder.mkdir(parents=True, exist_ok=True)
    lock = RunLock(folder)
    try:
        with _usable(folder):
            lock.take()
        yield lock
    finally:
        lock.release()
        with contextlib.suppress(OSError):  # empty folders of a run that was refused before it wrote anything
            for each in made:
                each.rmdir()


@contextlib.contextmanager
def _usable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"output_dir: {folder} cannot be used: {error.strerror or error}; give another one") from None


def refuse_what_is_there(folder: Path) -> None:
    """Refuses a folder that holds results or files of the user.

    Raises:
        ConfigError: it is not empty.
    """
    if not folder.exists():
        return
    names = {path.name for path in folder.iterdir() if not is_lock(path)} if folder.is_dir() else {folder.name}
    if names and (UNSTARTED not in names or not all(map(UNSTARTED_FILES.fullmatch, names))):
        raise ConfigError(f"output_dir: {folder} exists and is not empty; give another one with --output_dir")


def prepare_output(folder: Path) -> None:
    """Creates the run's folder and marks it as that of a run which cannot be resumed yet."""
    with _usable(folder):
        refuse_what_is_there(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / UNSTARTED).touch()
        (folder / "warnings.jsonl").unlink(missing_ok=True)
