"""Writing a file: all of it or nothing where a file is to be, and into it where it is something else.

A regular file is written aside and renamed, so that a kill at any moment leaves what was there before. A symbolic link stays
one: what it points at is written. A pipe or a character device is written into; a folder, a socket, a disk is refused.
What is new has the permissions that the umask gives, what is replaced keeps its own.

That is for the places that a user names. In a run's folder the names are the run's, and a link there may lead to anybody's
file: see `write_own` and `own_folder`.
"""

import contextlib
import errno
import os
import stat
import sys
from pathlib import Path

# Why a file's folder lets nothing be put in its place: it is read-only or sticky, or the file is a mount of its own.
UNREPLACEABLE = errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EXDEV
REFUSED = {stat.S_IFDIR: "is a folder", stat.S_IFSOCK: "is a socket", stat.S_IFBLK: "is a disk"}


def write_file(path: str | Path, content: str | bytes) -> None:
    """Writes `content` (text as UTF-8) to `path`; its folder is there.

    Raises:
        OSError: with `path` and the reason; what was there before is untouched, unless its folder is read-only: then the
            file is written over in its place.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
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
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def write_own(path: str | Path, content: str | bytes) -> None:
    """`write_file` for a file of a run's folder: a symbolic link of its name is replaced, and what it points at stays as it
    is; anything but a file is refused.

    Raises:
        OSError: with `path` and the reason; what was there before is untouched.
    """
    path = Path(path)
    if path.is_symlink():
        data = content.encode("utf-8") if isinstance(content, str) else content
        try:
            return _put(path, data, None)
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    check_own(path)
    write_file(path, content)


def check_own(path: Path) -> None:
    """Raises OSError where something that is not a file, such as a folder or a pipe, has the name of a run's file."""
    with contextlib.suppress(FileNotFoundError):  # it is made
        kind = stat.S_IFMT(os.lstat(path).st_mode)
        if kind not in (stat.S_IFREG, stat.S_IFLNK):
            raise OSError(
                errno.EINVAL, f"{REFUSED.get(kind, 'is a pipe or a device')} and no file of the run", str(path)
            )


def own_folder(folder: Path) -> None:
    """Makes a folder of a run's folder; a symbolic link of its name is removed, and what it points at stays as it is."""
    if folder.is_symlink():
        folder.unlink()
    folder.mkdir(parents=True, exist_ok=True)


def make_own(path: Path, size: int) -> None:
    """Makes a file of a run's folder one that can be written into: a symbolic link, or a hard link of which another name
    may be a copy's that somebody keeps, becomes a file with the first `size` bytes of what was there.

    Raises:
        OSError: it is not a file, or cannot be copied.
    """
    check_own(path)
    if not path.is_symlink() and (not path.exists() or path.stat().st_nlink == 1):
        return
    if not size or not path.is_file():  # a link to nothing, or to something that may never end
        return path.unlink()
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(path, "rb") as source, open(aside, "wb") as copy:
            while size > 0 and (block := source.read(min(size, 2**20))):
                size -= copy.write(block)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def check_target(path: str | Path) -> None:
    """Makes the folder of a file that is written later, and refuses what cannot be written, before the work for it is done.

    Raises:
        OSError: with `path` and the reason.
    """
    check_kind(path)
    folder = Path(os.path.realpath(path)).parent
    try:
        if is_file(path):
            folder.mkdir(parents=True, exist_ok=True)
        if own_descriptor(path) is None and not os.access(path if os.path.exists(path) else folder, os.W_OK):
            raise PermissionError(errno.EACCES, "is read-only, or in a folder that is")
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def check_kind(path: str | Path) -> None:
    """Raises OSError where `path` is something that cannot be written as a file."""
    if own_descriptor(path) is None:
        with contextlib.suppress(FileNotFoundError):  # it is made
            if reason := REFUSED.get(stat.S_IFMT(os.stat(path).st_mode)):
                raise OSError(errno.EINVAL, reason, str(path))


def is_file(path: str | Path) -> bool:
    """Whether `path` is a regular file, or nothing yet; else it is a pipe, a device or an open file of a process."""
    if own_descriptor(path) is not None or os.path.realpath(path).startswith("/proc/"):
        return False
    return not os.path.exists(path) or os.path.isfile(path)


def own_descriptor(path: str | Path) -> int | None:
    """The number of this process's open file that `path` names (/dev/stdout, /dev/fd/3, a link to one), or None."""
    for _ in range(40):  # links that lead to one another; the system follows as many
        folder, name = os.path.split(os.path.abspath(path))
        if name.isdecimal() and os.path.realpath(folder) == os.path.realpath("/proc/self/fd"):
            return int(name)
        if not os.path.islink(path):
            break
        path = os.path.join(folder, os.readlink(path))
    return None


def _put(target: Path, data: bytes, before: os.stat_result | None) -> None:
    """Replaces `target`, whose status is `before`, or creates it."""
    aside = target.with_name(f".{target.name[:50]}.{os.getpid()}.part")
    try:
        aside.unlink(missing_ok=True)  # of a process that was killed
        with open(aside, "xb") as file:  # a new one: no link that somebody has put there is followed
            if before:
                with contextlib.suppress(OSError):  # a file system without owners or modes
                    os.fchown(file.fileno(), before.st_uid, before.st_gid)
                with contextlib.suppress(OSError):
                    os.fchmod(file.fileno(), stat.S_IMODE(before.st_mode))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, target)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # a folder that may be written to and not read
        sync(target.parent)


def _write_into(path: str | Path, data: bytes) -> None:
    descriptor = own_descriptor(path)
    if descriptor is not None:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()  # what is in front of it
    # Opened by its name, an open file would be cut to nothing, and a socket refused.
    with open(path if descriptor is None else os.dup(descriptor), "wb") as file:
        file.write(data)


def set_permissions(folder: Path, like: Path) -> None:
    """Gives all that is in `folder` the permissions that the folder `like` has: safetensors writes files that only their
    owner can read. A new folder has what the umask gives, which cannot be read without being set, for all threads."""
    mode = stat.S_IMODE(like.stat().st_mode) & 0o777
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            with contextlib.suppress(OSError):  # a file system without modes
                path.chmod(mode if path.is_dir() else mode & 0o666)


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk: a name must not get there before what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
