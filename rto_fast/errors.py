"""Mistakes of the user: one line that names the thing and the remedy; the command line prints it and exits with 2."""


class UserError(ValueError):
    """Base of every error whose message is meant for the user."""


class ConfigError(UserError):
    """A mistake in the configuration; the message names the key and what was expected."""


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


class Interrupted(Exception):
    """The run was stopped by a signal, its state saved."""

    def __init__(self, stage, step, folder, signal):
        super().__init__(
            f"stopped in {stage} after step {step}; go on with: python -m rto_fast.train --resume {folder}"
        )  # fmt: skip
        self.signal = signal
