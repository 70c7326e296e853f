"""Warnings of this package. In a run they go through its log, each once; elsewhere they are ordinary Python warnings."""

import sys
import warnings

WRAPPERS = "functools", "contextlib", "torch"  # packages that call our functions on behalf of the user's code


class Notice(UserWarning):
    """A warning of this package.

    Args:
        stage: the stage, or the part of the package, that it is about.
        name: a word by which programs know it.
        what: the message, with what can be done about it.
    """

    def __init__(self, stage: str, name: str, what: str):
        super().__init__(what)
        self.stage, self.name, self.what = stage, name, what


def notify(stage: str, name: str, what: str) -> None:
    """Warns with a `Notice` whose place is the line that called this package."""
    frames, frame = [], sys._getframe(1)
    while frame:
        frames.append(frame.f_globals.get("__name__", "").partition(".")[0])
        frame = frame.f_back
    caller = max((i for i, package in enumerate(frames) if package == "rto_fast"), default=0) + 1
    while caller < len(frames) and frames[caller] in WRAPPERS:
        caller += 1
    warnings.warn(Notice(stage, name, what), stacklevel=caller + 2)
