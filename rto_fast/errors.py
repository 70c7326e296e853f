"""The errors whose messages are meant for the user: the command line prints them as one line and exits with 2."""

import shlex
from pathlib import Path

LONGEST_QUOTE = 500  # characters of another library's error that a message of ours quotes


def command_line(command: str, path: str | Path, *options: str) -> str:
    """`python -m rto_fast.COMMAND` with a path and options behind it, quoted for a shell."""
    text = str(path)
    return shlex.join(["python", "-m", *command.split(), f"./{text}" if text.startswith("-") else text, *options])


def how_to_go_on(folder: str | Path) -> str:
    return f"go on with: {command_line('rto_fast.train --resume', folder)}"


def error_text(error: BaseException, with_type: bool | None = None, with_notes: bool = False) -> str:
    """The message of an error on one line. A `UserError` gives all of it, another error at most `LONGEST_QUOTE` characters.

    Args:
        with_type: begin with the name of the error's type. None does so where the message alone does not say what happened:
            where it is empty, and for all types but OSError, ValueError and RuntimeError.
        with_notes: append the notes that were added to the error.
    """
    try:
        text = str(error)
    except BaseException:  # `__str__` may be anybody's code
        text = ""
    if len(text) > LONGEST_QUOTE and not isinstance(error, UserError):
        text = f"{text[:LONGEST_QUOTE]}… ({len(text):,} characters)"
    if with_type is None:
        with_type = not (text and isinstance(error, OSError | ValueError | RuntimeError))
    text = ": ".join(filter(None, [type(error).__name__ * with_type, text]))
    lines = "; ".join(filter(None, [text, *(getattr(error, "__notes__", []) * with_notes)])).splitlines()
    return " ".join(filter(None, map(str.strip, lines)))  # spaces within a line stay, they may belong to a path


class UserError(ValueError):
    """Base of every error whose message is meant for the user."""


class ConfigError(UserError):
    """A mistake in the configuration. The message names the key and what was expected."""


class FieldError(ConfigError):
    """A field of the configuration with a value that it cannot have.

    Args:
        key: the field, such as rto.kl_coef.
        expected: what the field takes, in words.
        got: the value, as it is shown to the user.
    """

    def __init__(self, key: str, expected: str, got: str):
        self.key, self.reason = key, f"expected {expected}, got {got}"
        super().__init__(f"{key}: {self.reason}")


class DataError(UserError):
    """Bad input data. The message names the place and the remedy."""


class ModelError(UserError):
    """A model that cannot be used. The message names it and the remedy."""


class RewardError(UserError):
    """A reward source that did not return one finite score for each response."""


class TrainingError(UserError):
    """Training cannot continue."""


class RolloutError(UserError):
    """Responses cannot be generated."""


class CheckpointError(UserError):
    """A checkpoint, or another file of the run, cannot be written or read."""


class HubError(UserError):
    """A model cannot be pushed to the Hugging Face Hub."""


class Interrupted(BaseException):
    """A signal stopped the run, and nothing that was trained is lost. It is no `Exception`, because it can be raised
    anywhere: code that handles the faults of a report or of a disk must not catch it.

    Args:
        message: what is printed.
        signal: the signal's number.
        together: whether all ranks stop at the same step; else this rank alone stops, wherever it is.
    """

    def __init__(self, message: str, signal: int, together: bool):
        super().__init__(message)
        self.signal, self.together = signal, together
