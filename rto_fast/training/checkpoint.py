"""Checkpoints of a run: what is done, the state of the stage under way, and how long its logs were then.

Nothing is pickled: tensors are safetensors, the rest JSON. Everything is written aside and renamed, so that a kill at any
moment leaves the last good checkpoint.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rto_fast.errors import CheckpointError, UserError
from rto_fast.reporting.log import RunLog

LOGS = ("metrics.jsonl", "samples.jsonl", "tokens.jsonl")


def _flatten(value, tensors):
    """`value` as JSON can hold it; tensors go into `tensors`, numbered."""
    if isinstance(value, torch.Tensor):
        tensors[str(len(tensors))] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": str(len(tensors) - 1)}
    if isinstance(value, dict):  # as pairs: JSON's keys are strings, the optimizer's are numbers
        return {"dict": [[key, _flatten(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list" if isinstance(value, list) else "tuple": [_flatten(item, tensors) for item in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")


def _restore(value, tensors):
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _restore(item, tensors) for key, item in content}
    items = [_restore(item, tensors) for item in content]
    return items if kind == "list" else tuple(items)


def _sync(path):
    """Waits until a file or folder is on the disk: a name must not get there before what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """All of it or nothing.

    Raises:
        CheckpointError: it cannot be written; what was there before is untouched.
    """
    aside = path.with_name(f".{path.name}.part")
    try:
        aside.write_text(text)
        _sync(aside)
        os.replace(aside, path)
        _sync(path.parent)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise CheckpointError(f"{path} could not be written: {error.strerror}") from error


def save_state(folder: str | Path, state: dict) -> None:
    """Writes a tree of dicts, lists, tensors and plain values as a new folder, all of it or nothing.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written; what was there before is untouched.
    """
    folder = Path(folder)
    aside = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        tensors: dict[str, torch.Tensor] = {}
        tree = _flatten(state, tensors)
        save_file(tensors, aside / "state.safetensors")
        (aside / "state.json").write_text(json.dumps(tree))
        for path in (aside / "state.safetensors", aside / "state.json", aside):
            _sync(path)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)
        _sync(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"{folder}: the checkpoint could not be written: {error}; the last one is as it was"
        ) from error


def load_state(folder: str | Path) -> dict:
    """What `save_state` wrote, tensors on the CPU."""
    folder = Path(folder)
    try:
        tree = json.loads((folder / "state.json").read_text())
        return _restore(tree, load_file(folder / "state.safetensors"))
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: not a checkpoint that can be read: {error}; begin another run, finished stages given as "
            "--sft.model, --reward_model.model and --dpo.model"
        ) from error


class Trainer(Protocol):
    """What a stage steps, and a checkpoint holds."""

    steps: int

    @property
    def step_count(self) -> int:
        """Steps done."""

    @property
    def skipped(self) -> int:
        """Optimizer steps whose gradient was not finite."""

    def step(self) -> dict:
        """One step; returns its metrics."""

    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> None: ...


class Checkpoints:
    """The checkpoints of a run in `folder`.

    `progress.json` is the run's memory: stages that are done, the last checkpoint of the one under way, and the sizes of
    the logs at that moment, to which a resumed run cuts them: no record appears twice.
    """

    def __init__(self, folder: str | Path, log: RunLog, *, keep: int = 1, resume: bool = False):
        self.folder, self.log, self.keep = Path(folder), log, keep
        self.path = self.folder / "progress.json"
        self.progress: dict[str, Any] = {"done": [], "checkpoint": None, "logs": {}, "seconds": 0.0, "best": None}
        if resume:
            self._read()

    def _read(self):
        try:
            self.progress |= json.loads(self.path.read_text())
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"--resume: {self.path} cannot be read ({error}): nothing to go on from") from error
        for name in LOGS:
            path = self.folder / name
            if path.exists():
                os.truncate(path, min(path.stat().st_size, self.progress["logs"].get(name, 0)))
        self.log.start -= self.progress["seconds"]

    def _write(self, **changes):
        sizes = {name: (self.folder / name).stat().st_size for name in LOGS if (self.folder / name).exists()}
        for name in sizes:
            _sync(self.folder / name)
        self.progress |= {"logs": sizes, "seconds": self.log.seconds()} | changes
        write_text(self.path, json.dumps(self.progress))

    @contextlib.contextmanager
    def resumable(self) -> Iterator[None]:
        """From here on the run can be resumed, be it from its beginning; what ends it says how."""
        if not self.path.exists():
            self._write()
        try:
            yield
        except (UserError, OSError) as error:
            error.add_note(f"once that is mended, go on with: python -m rto_fast.train --resume {self.folder}")
            raise

    def is_done(self, stage: str) -> bool:
        return stage in self.progress["done"]

    def finish(self, stage: str) -> None:
        """`stage` has written its model: its checkpoints are of no more use."""
        self._write(done=[*self.progress["done"], stage], checkpoint=None)
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)

    def save(self, stage: str, trainer: Trainer) -> None:
        """The state of `trainer` after its last whole step."""
        name = f"{stage}-{trainer.step_count:08d}"
        folder = self.folder / "checkpoints"
        save_state(folder / name, trainer.state_dict())
        self._write(checkpoint=name)
        saved = sorted(path.name for path in folder.glob(f"{stage}-*"))
        for old in saved[: max(0, len(saved) - self.keep)]:
            shutil.rmtree(folder / old, ignore_errors=True)

    def restore(self, stage: str, trainer: Trainer) -> None:
        """Puts `trainer` where the last checkpoint of `stage` was, if there is one."""
        name = self.progress["checkpoint"]
        if name and name.rpartition("-")[0] == stage:
            folder = self.folder / "checkpoints" / name
            state = load_state(folder)
            try:
                trainer.load_state_dict(state)
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                reason = str(error).strip().splitlines()[0]
                raise CheckpointError(f"{folder}: not a checkpoint of this run's {stage} stage ({reason}); resume with the "
                                      "options it was begun with") from error  # fmt: skip
            self.log.say(f"{stage}: goes on after step {trainer.step_count}")

    @property
    def best(self) -> float | None:
        """The best evaluation so far, or None."""
        return self.progress["best"]

    def keep_best(self, score: float) -> None:
        self.progress["best"] = score
