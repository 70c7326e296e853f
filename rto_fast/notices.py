"""Warnings of this package: in a run they go through its log, once; elsewhere they are Python's own warnings."""

import sys
import warnings


class Notice(UserWarning):
    """Something to know that ends nothing.

    Args:
        stage: the stage, or the part of the package, that it is about. name: of the rule, for a program. what: is so.
        remedy: what can be done about it, if anything.
    """

    def __init__(self, stage: str, name: str, what: str, remedy: str = ""):
        super().__init__(f"{what}; {remedy}" if remedy else what)
        self.stage, self.name, self.what, self.remedy = stage, name, what, remedy


def notify(stage: str, name: str, what: str, remedy: str = "") -> None:
    """Warns with a `Notice`, in the name of the code that called this package."""
    frame, level, caller = sys._getframe(1), 3, 3
    while frame:
        if frame.f_globals.get("__name__", "").partition(".")[0] == "rto_fast":
            caller = level  # of the outermost frame of ours: libraries that we call may call us back
        frame, level = frame.f_back, level + 1
    warnings.warn(Notice(stage, name, what, remedy), stacklevel=caller)
