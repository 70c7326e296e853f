"""Hides DeepSpeed from other libraries, so that it is imported only by runs that train with it and by users' own code.

transformers and accelerate import it wherever it is installed, for example in `save_pretrained`, to ask whether a model is
one of its engines. That takes seconds, and without a GPU it writes a warning to stdout.
"""

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """DeepSpeed cannot be imported in the context, unless it was imported before or `reveal` is called."""
    sys.modules.setdefault("deepspeed", None)  # type: ignore[arg-type]  # by which Python knows that there is no such module
    try:
        yield
    finally:
        reveal()


def reveal() -> bool:
    """Lets DeepSpeed be imported, if it is installed; returns whether it was hidden."""
    was_hidden = sys.modules.get("deepspeed", "") is None
    if was_hidden:
        del sys.modules["deepspeed"]
    return was_hidden


@contextlib.contextmanager
def revealed() -> Iterator[None]:
    """DeepSpeed can be imported in the context."""
    was_hidden = reveal()
    try:
        yield
    finally:
        if was_hidden:
            sys.modules.setdefault("deepspeed", None)  # type: ignore[arg-type]
