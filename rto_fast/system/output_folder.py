"""What may be in the folder that a new run is given."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from rto_fast.errors import ConfigError, how_to_go_on
from rto_fast.system.run_lock import is_lock

UNSTARTED = ".unstarted"  # a file that marks a run which cannot be resumed yet; the files beside it are that run's
# The files of a run that ended before its first step, by a mistake or a kill.
UNSTARTED_FILES = re.compile(rf"config\.yaml|base|warnings\.jsonl|{re.escape(UNSTARTED)}|\..*\.(part|old)")


@contextlib.contextmanager
def usable(folder: Path) -> Iterator[None]:
    """Turns the system's errors about a run's folder into a ConfigError."""
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
        resume = f", or {how_to_go_on(folder)}" if {"config.yaml", "progress.json"} <= names else ""
        raise ConfigError(f"output_dir: {folder} exists and is not empty; give another one with --output_dir{resume}")
