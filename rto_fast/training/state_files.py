"""A training state on disk: tensors as safetensors, the rest as JSON, nothing pickled, each file with its SHA-256.

Everything is written aside and renamed, so that a kill at any moment leaves what was there before. Each rank writes a file
of its own, at the same time as the others; any number of ranks can read what they wrote.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rto_fast.errors import CheckpointError
from rto_fast.system.writing import set_permissions, sync, write_own
from rto_fast.training import ranks

OWNER = "run"  # the file that names the run which wrote the state
STATE_FILE = rf"{OWNER}|state(-\d{{5,}})?\.(json|safetensors)(\.sha256)?"
# The files that this package writes into folders of states and models; files of other names are the user's.
OURS = re.compile(
    rf"{STATE_FILE}|(pytorch_)?model\b.*|adapter|.*config\.json|tokenizer\b.*|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\..*|merges\.txt|spiece\.model|chat_template\..*|additional_chat_templates|README\.md|images"
)
LARGEST_JSON = 2**30  # bytes of a state's JSON; that of a model with 100,000 tensors has about ten million


def _flatten(value: Any, tensors: dict[str, torch.Tensor], count: Iterator[int]) -> Any:
    """Converts `value` to what JSON can hold, and puts the tensors that this rank writes into `tensors`, by number."""
    if callable(value):  # gathers a tensor from all ranks; one at a time, so that they are never all in memory
        value = value()
    if isinstance(value, torch.Tensor):
        number = next(count)
        if number % ranks.world_size() == ranks.rank():
            tensors[str(number)] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": str(number)}
    if isinstance(value, dict):  # as pairs: JSON's keys are strings, those of a state may be numbers
        return {"dict": [[key, _flatten(item, tensors, count)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list" if isinstance(value, list) else "tuple": [_flatten(item, tensors, count) for item in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")


def _restore(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind not in ("dict", "list", "tuple") or not isinstance(content, list):
        raise ValueError(f"it holds a {kind!r} with a {type(content).__name__}")
    if kind == "dict":
        return {key: _restore(item, tensors) for key, item in content}
    items = [_restore(item, tensors) for item in content]
    return items if kind == "list" else tuple(items)


def write_text(path: Path, text: str) -> None:
    """Writes a file of the run, see `write_own`.

    Raises:
        CheckpointError: it cannot be written; what was there before is untouched.
    """
    try:
        write_own(path, text)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error.strerror}") from error


def remove(path: Path) -> None:
    """Removes a file, or a folder with all that is in it. Of a symbolic link only the link is removed."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def replace_folder(new: Path, folder: Path) -> None:
    """Puts the folder `new` in the place of `folder`. A kill at any moment leaves one of the two.

    The user's files in the old folder move to the new one. Where `folder` is a symbolic link, only the link is removed.
    """
    set_permissions(new, like=folder if folder.is_dir() else new)
    old = folder.with_name(f".{folder.name}.old")
    if os.path.lexists(old):  # left by a kill
        if os.path.lexists(folder):
            _take_over(old, folder)
        else:
            os.replace(old, folder)
    if os.path.lexists(folder):  # renamed, since removing it takes time in which there would be neither
        os.replace(folder, old)
    os.replace(new, folder)
    sync(folder.parent)
    _take_over(old, folder)


def _take_over(old: Path, folder: Path) -> None:
    """Moves the user's files in `old` to `folder`, and removes `old`."""
    for path in [] if old.is_symlink() or not old.is_dir() else list(old.iterdir()):
        if not OURS.fullmatch(path.name) and not os.path.lexists(folder / path.name):
            os.replace(path, folder / path.name)
    remove(old)


def _signed(owner: str) -> bytes:
    """A run's name with a digest, which tells a damaged name from that of another run."""
    return f"{owner} {hashlib.sha256(owner.encode()).hexdigest()[:16]}".encode()


def owner_of(folder: Path) -> str | None:
    """The name of the run that wrote a state; None where there is none, or a damaged one."""
    try:
        if not (folder / OWNER).is_file():  # a pipe would never end
            return None
        with open(folder / OWNER, "rb") as file:
            content = file.read(100)
        owner = content.partition(b" ")[0].decode("ascii")
        return owner if owner and content == _signed(owner) else None
    except (OSError, UnicodeDecodeError):
        return None


def is_another_runs(folder: Path, run: str) -> bool:
    return owner_of(folder) not in (None, run)


def is_own_state(folder: Path, run: str, is_named: bool) -> bool:
    """Whether a state, complete or not, may be removed as the run's own.

    Args:
        is_named: the run's records name this folder, which is enough where the folder itself names no run.
    """
    if not folder.is_dir() or is_another_runs(folder, run):
        return False
    is_begun = all(file.name == OWNER and not file.stat().st_size for file in folder.iterdir())
    return owner_of(folder) == run or is_named or is_begun


def remove_state(folder: Path) -> None:
    """Removes the files of a state, and their folder if it is empty then. Of a symbolic link only the link is removed."""
    if folder.is_symlink():
        folder.unlink(missing_ok=True)
        return
    paths = [path for path in folder.iterdir() if re.fullmatch(STATE_FILE, path.name)]
    for path in sorted(paths, key=lambda path: path.name == OWNER):  # the run's name goes last
        path.unlink(missing_ok=True)
    folder.rmdir()


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_part(folder: Path, name: str, write: Callable[[Path], object]) -> None:
    """Writes a file of a state and its digest."""
    write(folder / name)
    (folder / f"{name}.sha256").write_text(_digest(folder / name), encoding="utf-8")
    sync(folder / name)
    sync(folder / f"{name}.sha256")


def save_state(folder: str | Path, state: dict[str, Any], owner: str = "") -> None:
    """Writes a state as a new folder, all of it or nothing. Every rank calls it, with the same state.

    Args:
        state: dicts, lists, plain values, tensors, and functions that return a tensor.
        owner: the name of the run, as the main rank knows it.
    Raises:
        CheckpointError: the disk is full, the folder cannot be written, or it is another run's. What was there before is
            untouched.
    """
    folder = Path(folder)
    aside = folder.with_name(f".{folder.name}.part")
    # The main rank alone looks: it may have begun to write when the others come here.
    for path in (aside, folder) if ranks.is_main() else ():
        if is_another_runs(path, owner):
            raise CheckpointError(f"{path} was written by another run; make {folder.parent} a folder of this run alone")
    try:
        if ranks.is_main():
            remove(aside)
            aside.mkdir(parents=True)
            (aside / OWNER).write_bytes(_signed(owner))
        ranks.barrier()
        tensors: dict[str, torch.Tensor] = {}
        tree = _flatten(state, tensors, iter(range(2**31)))
        _write_part(aside, f"state-{ranks.rank():05d}.safetensors", lambda path: save_file(tensors, path))
        if ranks.is_main():
            text = json.dumps({"run": owner, "files": ranks.world_size(), "state": tree})
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


def _parts(folder: Path) -> tuple[dict[str, Any], list[Path]]:
    """Reads state.json; returns its content and the paths of the files of tensors."""
    with open(folder / "state.json", "rb") as file:
        content = json.loads(file.read(LARGEST_JSON))
    files, found = content["files"], len(list(folder.glob("state-*.safetensors")))
    if type(files) is not int or not 1 <= files <= found:
        raise ValueError(f"state.json names {str(files)[:20]} files of tensors, there are {found}")
    return content, [folder / f"state-{rank:05d}.safetensors" for rank in range(files)]


def find_damage(folder: str | Path, run: str = "") -> str | None:
    """Says what is wrong with the files of a state, if they are not as the run wrote them."""
    folder = Path(folder)

    def is_whole(path: Path) -> bool:
        with open(folder / f"{path.name}.sha256", "rb") as file:
            expected = file.read(100)  # of a digest's 64
        return _digest(path).encode() == expected

    try:
        for path in folder.iterdir():
            if not path.is_file() and re.fullmatch(STATE_FILE, path.name):
                return f"{path.name} is not a file"  # but maybe a pipe, whose reading never ends
        if (folder / "state.json").stat().st_size > LARGEST_JSON or not is_whole(folder / "state.json"):
            return "state.json is not as it was written"
        content, paths = _parts(folder)
        for path in paths:
            if not is_whole(path):
                return f"{path.name} is not as it was written"
        if owner_of(folder) != (content.get("run") or None):  # older versions wrote no name
            return f"{OWNER} is not as it was written"
        if is_another_runs(folder, run):
            return "it is another run's"
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def load_state(folder: str | Path) -> dict[str, Any]:
    """Reads what `save_state` wrote. Tensors are on the CPU, mapped from the files: the ranks of a machine share the memory.

    Raises:
        CheckpointError: it cannot be read.
    """
    folder = Path(folder)
    try:
        content, paths = _parts(folder)
        tensors = {}
        for path in paths:
            tensors |= load_file(path)
        return _restore(content["state"], tensors)
    except (OSError, ValueError, TypeError, KeyError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: not a checkpoint that can be read: {error}") from error
