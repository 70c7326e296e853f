"""Checkpoints of a run: what is done, the state of the stage under way, and how long its logs were then.

Nothing is pickled: tensors are safetensors, the rest JSON. Everything is written aside and renamed, so that a kill at any
moment leaves the last good checkpoint.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rto_fast.errors import CheckpointError

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


def write_json(path, value):
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(json.dumps(value))
    _sync(aside)
    os.replace(aside, path)
    _sync(path.parent)


def save_state(folder, state):
    """Writes a tree of dicts, lists, tensors and plain values as a new folder, all of it or nothing.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written; what was there before is untouched.
    """
    folder = Path(folder)
    aside = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        tensors = {}
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


def load_state(folder):
    """What `save_state` wrote, tensors on the CPU."""
    folder = Path(folder)
    try:
        tree = json.loads((folder / "state.json").read_text())
        return _restore(tree, load_file(folder / "state.safetensors"))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: not a checkpoint that can be read: {error}") from error


class Checkpoints:
    """The checkpoints of a run in `folder`.

    `progress.json` is the run's memory: stages that are done, the last checkpoint of the one under way, and the sizes of
    the logs at that moment, to which a resumed run cuts them: no record appears twice.
    """

    def __init__(self, folder, log, *, keep=1, resume=False):
        self.folder, self.log, self.keep = Path(folder), log, keep
        self.path = self.folder / "progress.json"
        self.progress = {"done": [], "checkpoint": None, "logs": {}, "seconds": 0.0, "best": None}
        if resume:
            self._read()

    def _read(self):
        try:
            self.progress |= json.loads(self.path.read_text())
        except (OSError, ValueError) as error:
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
        write_json(self.path, self.progress)

    def is_done(self, stage):
        return stage in self.progress["done"]

    def finish(self, stage):
        """`stage` has written its model: its checkpoints are of no more use."""
        self._write(done=[*self.progress["done"], stage], checkpoint=None)
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)

    def save(self, stage, trainer):
        """The state of `trainer` after its last whole step."""
        name = f"{stage}-{trainer.step_count:08d}"
        folder = self.folder / "checkpoints"
        save_state(folder / name, trainer.state_dict())
        self._write(checkpoint=name)
        saved = sorted(path.name for path in folder.glob(f"{stage}-*"))
        for old in saved[: max(0, len(saved) - self.keep)]:
            shutil.rmtree(folder / old, ignore_errors=True)

    def restore(self, stage, trainer):
        """Puts `trainer` where the last checkpoint of `stage` was, if there is one."""
        name = self.progress["checkpoint"]
        if name and name.rpartition("-")[0] == stage:
            trainer.load_state_dict(load_state(self.folder / "checkpoints" / name))
            self.log.say(f"{stage}: goes on after step {trainer.step_count}")

    @property
    def best(self):
        """The best evaluation so far, or None."""
        return self.progress["best"]

    def keep_best(self, score):
        self.progress["best"] = score
