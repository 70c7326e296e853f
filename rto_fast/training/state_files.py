"""A training state on disk: tensors as safetensors, the rest as JSON, nothing pickled, each file with its SHA-256.

Everything is written aside and renamed, so that a kill at any moment leaves what was there before. Several ranks write a
file each, at the same time; what they write can be read by any number of ranks.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rto_fast.errors import CheckpointError
from rto_fast.training import ranks
from rto_fast.writing import set_permissions, sync, write_file


def _flatten(value, tensors, count):
    """`value` as JSON can hold it; the tensors that are this rank's to write go into `tensors`, by number."""
    if callable(value):  # a tensor that all ranks put together, and only now: they are not all in memory at once
        value = value()
    if isinstance(value, torch.Tensor):
        number = next(count)
        if number % ranks.world_size() == ranks.rank():
            tensors[str(number)] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": str(number)}
    if isinstance(value, dict):  # as pairs: JSON's keys are strings, a state's may be numbers
        return {"dict": [[key, _flatten(item, tensors, count)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list" if isinstance(value, list) else "tuple": [_flatten(item, tensors, count) for item in value]}
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


def write_text(path: Path, text: str) -> None:
    """`write_file` for a file of the run.

    Raises:
        CheckpointError: it cannot be written; what was there before is untouched.
    """
    try:
        write_file(path, text)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error.strerror}") from error


def replace_folder(new: Path, folder: Path) -> None:
    """Puts a folder in the place of another, which is no link. Removing one takes time, in which there would be neither."""
    set_permissions(new, like=folder if folder.is_dir() else new)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_part(folder, name, write):
    """Writes a file of a state, and its digest beside it."""
    write(folder / name)
    (folder / f"{name}.sha256").write_text(_digest(folder / name), encoding="utf-8")
    sync(folder / name)
    sync(folder / f"{name}.sha256")


def save_state(folder: str | Path, state: dict) -> None:
    """Writes a tree of dicts, lists, tensors (or functions that return one) and plain values as a new folder, all of it or
    nothing. Every rank calls it, with the same tree.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written; what was there before is untouched.
    """
    folder = Path(folder)
    aside = folder.with_name(f".{folder.name}.part")
    try:
        if ranks.is_main():
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        ranks.barrier()
        tensors: dict[str, torch.Tensor] = {}
        tree = _flatten(state, tensors, iter(range(2**31)))
        _write_part(aside, f"state-{ranks.rank():05d}.safetensors", lambda path: save_file(tensors, path))
        if ranks.is_main():
            text = json.dumps({"files": ranks.world_size(), "state": tree})
            _write_part(aside, "state.json", lambda path: path.write_text(text, encoding="utf-8"))
        ranks.barrier()
        if ranks.is_main():
            sync(aside)
            replace_folder(aside, folder)
        ranks.barrier()
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"{folder}: the checkpoint could not be written: {error}; the last one is as it was"
        ) from error


def _parts(folder):
    """(the JSON of a state, the paths of its tensors)."""
    content = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return content["state"], [folder / f"state-{rank:05d}.safetensors" for rank in range(content["files"])]


def find_damage(folder: str | Path) -> str | None:
    """What is wrong with the files of a state, if they are not as they were written."""
    folder = Path(folder)
    try:
        _, paths = _parts(folder)
        for path in [folder / "state.json", *paths]:
            if _digest(path) != (folder / f"{path.name}.sha256").read_text(encoding="utf-8"):
                return f"{path.name} is not as it was written"
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def load_state(folder: str | Path) -> dict:
    """What `save_state` wrote, tensors on the CPU (mapped from the files: ranks of a machine share the memory).

    Raises:
        CheckpointError: it cannot be read.
    """
    folder = Path(folder)
    try:
        tree, paths = _parts(folder)
        tensors = {}
        for path in paths:
            tensors |= load_file(path)
        return _restore(tree, tensors)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: not a checkpoint that can be read: {error}") from error
