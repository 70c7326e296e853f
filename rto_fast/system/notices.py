"""Warnings of this package: in a run they go through its log, once; elsewhere they are Python's own warnings."""

import sys
import warnings

WRAPPERS = "functools", "contextlib", "torch"  # what calls a function of ours in the name of somebody else


class Notice(UserWarning):
    """Something to know that ends nothing.

    Args:
        stage: the stage, or the part of the package, that it is about. name: of the rule, for a program. what: is so, and
            what can be done about it.
    """

    def __init__(self, stage: str, name: str, what: str):
        super().__init__(what)
        self.stage, self.name, self.what = stage, name, what


def notify(stage: str, name: str, what: str) -> None:
    """Warns with a `Notice`, in the name of the code that called this package."""
    frames, frame = [], sys._getframe(1)
    while frame:
        frames.append(frame.f_globals.get("__name__", "").partition(".")[0])
        frame = frame.f_back
    caller = max((i for i, package in enumerate(frames) if package == "rto_fast"), default=0) + 1
    while caller < len(frames) and frames[caller] in WRAPPERS:
        caller += 1
    warnings.warn(Notice(stage, name, what), stacklevel=caller + 2)
