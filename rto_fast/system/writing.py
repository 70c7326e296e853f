"""Writes files as a whole or not at all.

`write_file` writes to the places that a user names. A regular file is written beside its place and renamed, so that a kill
at any moment leaves what was there before. Of a symbolic link the file that it points at is written. A pipe or a character
device is written into. A folder, a socket or a disk is refused. A new file has the permissions that the umask gives; a file
that is replaced keeps its own.

In a run's folder a symbolic link may lead to a file that is not the run's: `write_own`, `own_folder` and `make_own` replace
the link.
"""

import contextlib
import errno
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# Errors with which a file cannot be replaced: its folder is read-only or sticky, or the file is a mount point.
UNREPLACEABLE = errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EXDEV
REFUSED = {stat.S_IFDIR: "is a folder", stat.S_IFSOCK: "is a socket", stat.S_IFBLK: "is a disk"}


def write_file(path: str | Path, content: str | bytes) -> None:
    """Writes `content` (text as UTF-8) to `path`, whose folder exists.

    Raises:
        OSError: names `path` and the reason. What was there before is untouched, unless the folder is read-only, where the
            file is overwritten in its place.
    """
    with _naming(path):
        data = content.encode("utf-8") if isinstance(content, str) else content
        check_kind(path)
        target = Path(os.path.realpath(path))
        if not is_file(path):
            _write_into(path, data)
        elif not target.exists():
            _put(target, data, None)
        elif not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, "is read-only")
        else:
            try:
                _put(target, data, target.stat())
            except OSError as error:
                if error.errno not in UNREPLACEABLE:
                    raise
                _write_into(target, data)


def write_own(path: str | Path, content: str | bytes) -> None:
    """`write_file` for a file of a run's folder. A symbolic link at `path` is replaced, and the file that it points at stays
    as it is. Anything else but a file is refused.

    Raises:
        OSError: names `path` and the reason. What was there before is untouched.
    """
    path = Path(path)
    check_own(path)
    if not path.is_symlink():
        return write_file(path, content)
    with _naming(path):
        _put(path, content.encode("utf-8") if isinstance(content, str) else content, None)


def check_own(path: Path) -> None:
    """Raises OSError where `path`, a file of the run, is something else, such as a folder or a pipe."""
    with contextlib.suppress(FileNotFoundError):
        kind = stat.S_IFMT(os.lstat(path).st_mode)
        if kind not in (stat.S_IFREG, stat.S_IFLNK):
            raise OSError(
                errno.EINVAL, f"{REFUSED.get(kind, 'is a pipe or a device')} and no file of the run", str(path)
            )


def own_folder(folder: Path) -> None:
    """Makes a folder of the run. A symbolic link in its place is removed, and what it points at stays as it is."""
    if folder.is_symlink():
        folder.unlink()
    folder.mkdir(parents=True, exist_ok=True)


def make_own(path: Path, size: int) -> None:
    """Makes sure that appending to a file of a run's folder changes no other file. A symbolic link, or a file with another
    hard link (perhaps somebody's copy of the run), is replaced by a file with the first `size` bytes of what was there.

    Raises:
        OSError: `path` is not a file, or cannot be copied.
    """
    check_own(path)
    if not path.is_symlink() and (not path.exists() or path.stat().st_nlink == 1):
        return
    if not size or not path.is_file():  # a link to nothing, or to something that may never end
        return path.unlink()
    with open(path, "rb") as source, _written_aside(path) as copy:
        while size > 0 and (block := source.read(min(size, 2**20))):
            size -= copy.write(block)


def check_target(path: str | Path) -> None:
    """Makes the folder of a file that is written later. Refuses a place that cannot be written before the work is done.

    Raises:
        OSError: names `path` and the reason.
    """
    check_kind(path)
    folder = Path(os.path.realpath(path)).parent
    with _naming(path):
        if is_file(path):
            folder.mkdir(parents=True, exist_ok=True)
        if own_descriptor(path) is None and not os.access(path if os.path.exists(path) else folder, os.W_OK):
            raise PermissionError(errno.EACCES, "is read-only, or in a folder that is")


def check_kind(path: str | Path) -> None:
    """Raises OSError where `path` is something that cannot be written like a file."""
    if own_descriptor(path) is None:
        with contextlib.suppress(FileNotFoundError):
            if reason := REFUSED.get(stat.S_IFMT(os.stat(path).st_mode)):
                raise OSError(errno.EINVAL, reason, str(path))


def is_file(path: str | Path) -> bool:
    """Whether `path` is a regular file or does not exist. Else it is a pipe, a device or an open file of a process."""
    if own_descriptor(path) is not None or os.path.realpath(path).startswith("/proc/"):
        return False
    return not os.path.exists(path) or os.path.isfile(path)


def own_descriptor(path: str | Path) -> int | None:
    """The descriptor of this process that `path` names, such as /dev/stdout, /dev/fd/3 or a link to one; else None."""
    for _ in range(40):  # as many links as the system follows
        folder, name = os.path.split(os.path.abspath(path))
        if name.isdecimal() and os.path.realpath(folder) == os.path.realpath("/proc/self/fd"):
            return int(name)
        if not os.path.islink(path):
            break
        path = os.path.join(folder, os.readlink(path))
    return None


@contextlib.contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Has an OSError in the block name `path`."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


@contextlib.contextmanager
def _written_aside(target: Path) -> Iterator[BinaryIO]:
    """Yields a new file beside `target`, which takes its place at the end of the block."""
    aside = target.with_name(f".{target.name[:50]}.{os.getpid()}.part")
    try:
        aside.unlink(missing_ok=True)  # of a process that was killed
        with open(aside, "xb") as file:  # "x" follows no link that somebody has put there
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, target)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def _put(target: Path, data: bytes, before: os.stat_result | None) -> None:
    """Replaces `target`, whose status was `before`, or creates it where that is None."""
    with _written_aside(target) as file:
        if before:
            with contextlib.suppress(OSError):  # a file system without owners or modes
                os.fchown(file.fileno(), before.st_uid, before.st_gid)
            with contextlib.suppress(OSError):
                os.fchmod(file.fileno(), stat.S_IMODE(before.st_mode))
        file.write(data)
    with contextlib.suppress(OSError):  # a folder that may be written to and not read
        sync(target.parent)


def _write_into(path: str | Path, data: bytes) -> None:
    descriptor = own_descriptor(path)
    if descriptor is not None:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()  # what was printed before comes first
    # Opening it by its name would truncate a file and fail for a socket.
    with open(path if descriptor is None else os.dup(descriptor), "wb") as file:
        file.write(data)


def set_permissions(folder: Path, like: Path) -> None:
    """Gives all files in `folder` the permissions of the folder `like`, because safetensors writes files that only their
    owner can read. A new folder has the permissions of the umask, which can be read only by setting it for all threads."""
    mode = stat.S_IMODE(like.stat().st_mode) & 0o777
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            with contextlib.suppress(OSError):  # a file system without modes
                path.chmod(mode if path.is_dir() else mode & 0o666)


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk, since a name must not get there before the content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
