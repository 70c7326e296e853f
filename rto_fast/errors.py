"""Mistakes of the user: one line that names the thing and the remedy; the command line prints it and exits with 2."""

import shlex
from pathlib import Path


def command_line(command: str, path: str | Path, *options: str) -> str:
    """`python -m rto_fast.COMMAND…` with a path after it, as a shell takes it."""
    text = str(path)
    return shlex.join(["python", "-m", *command.split(), f"./{text}" if text.startswith("-") else text, *options])


def how_to_go_on(folder: str | Path) -> str:
    return f"go on with: {command_line('rto_fast.train --resume', folder)}"


LONGEST_SAID = 500  # characters of a foreign error's text that a message holds


def said(error: BaseException) -> str:
    """What a foreign error says, on one line, cut where it is long; "" where it says nothing, or fails to."""
    try:
        text = str(error)
    except BaseException:  # `__str__` is somebody else's code too
        return ""
    line = " ".join(text[: 2 * LONGEST_SAID].split())
    return line if len(text) <= LONGEST_SAID else f"{line[:LONGEST_SAID]}… ({len(text):,} characters)"


class UserError(ValueError):
    """Base of every error whose message is meant for the user."""


class ConfigError(UserError):
    """A mistake in the configuration; the message names the key and what was expected."""


class FieldError(ConfigError):
    """A field that cannot have its value.

    Args:
        key: such as rto.kl_coef. expected: in words. got: the value, as it is shown.
    """

    def __init__(self, key: str, expected: str, got: str):
        self.key, self.reason = key, f"expected {expected}, got {got}"
        super().__init__(f"{key}: {self.reason}")


class DataError(UserError):
    """Bad input data; the message names the place and the remedy."""


class ModelError(UserError):
    """A model that cannot be used; the message names it and the remedy."""


class RewardError(UserError):
    """A reward source that did not return one finite score for each response."""


class TrainingError(UserError):
    """Training that cannot go on."""


class RolloutError(UserError):
    """Responses that cannot be generated."""


class CheckpointError(UserError):
    """A checkpoint, or another file of the run, that cannot be written or read."""


class HubError(UserError):
    """A model that cannot be pushed to the Hub."""


class Interrupted(BaseException):
    """The run was stopped by a signal; nothing that was trained is lost. No `Exception`: it can arrive anywhere, and what
    handles the faults of a report or of a disk is not to take it for one.

    Args:
        together: all ranks stop, at the same place; else this one, wherever it is.
    """

    def __init__(self, message: str, signal: int, together: bool):
        super().__init__(message)
        self.signal, self.together = signal, together
