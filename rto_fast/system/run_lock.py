"""One run in a folder: a lock file that names the process which writes there, and by which a dead one is recognised.

A lock is taken by giving a file, written before, the lock's name with `link`, which fails where that name exists: one
operation of the file system, also on NFS. A dead process's lock is replaced only by who holds a second lock, whose name is a
digest of the dead one's content; who has it looks again whether the dead one is still there. So of several that find it at
once, one replaces it, whatever the others have read before.

Whether a process lives is asked of the system on its own host. Of another host's process (or one in another container, whose
ids mean something else there) its heartbeat tells: the time of the file, which the holder sets every few seconds. Both times
that are compared are the file system's, so clocks of hosts may differ.
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rto_fast.errors import CheckpointError, ConfigError

NAME = "run.lock"
BEAT = 5.0  # seconds between signs of life
PATIENCE = 120.0  # seconds without one after which another host's process is gone; NFS may show times a minute late
LONGEST = 4096  # bytes of a lock


class Found(NamedTuple):
    """A lock as it was read."""

    content: bytes
    modified: float  # seconds, by the file system's clock
    holder: dict[str, Any] | None  # None: it names no process


def _birth(pid: int) -> tuple[str, int] | None:
    """(state, start in clock ticks since the boot) of a process: a number that is used again has another start."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def _where() -> dict[str, str | None]:
    """What tells processes of this host, since its last boot, and of this container from others'."""
    where: dict[str, str | None] = {"host": socket.gethostname(), "boot": None, "namespace": None}
    with contextlib.suppress(OSError):
        where["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        where["namespace"] = os.readlink("/proc/self/ns/pid")
    return where


def _myself() -> dict[str, Any]:
    born = _birth(os.getpid())
    since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    return _where() | {"pid": os.getpid(), "start": born and born[1], "since": since, "key": secrets.token_hex(8)}


def _holder(content: bytes) -> dict[str, Any] | None:
    """The process that a lock names; None: what is written there is no lock's."""
    kinds = {"pid": int, "start": int | None, "host": str, "since": str, "boot": str | None, "namespace": str | None}
    try:
        holder = json.loads(content)
        is_sound = 0 < holder["pid"] < 2**31 and all(isinstance(holder[name], kind) for name, kind in kinds.items())
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return holder if is_sound else None


def _lives(holder: dict[str, Any]) -> bool | None:
    """Whether the process lives; None: that cannot be told from here."""
    here = _where()
    if not here["boot"] or any(holder[name] != value for name, value in here.items()):
        return None
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # somebody else's process: it exists
    born = _birth(holder["pid"])
    return born is None or (born[0] not in "ZX" and (holder["start"] is None or born[1] == holder["start"]))


def _read(path: Path) -> Found | None:
    """The lock at `path`, or None.

    Raises:
        ConfigError: something else has its name.
    """
    for _ in range(10):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise ConfigError(f"{path} is a symbolic link and no lock of a run; delete it") from None
            raise
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError(f"{path} is not a file and no lock of a run; remove it")
            found = Found(content := os.read(descriptor, LONGEST), status.st_mtime, _holder(content))
        finally:
            os.close(descriptor)
        if found.content:
            break
        time.sleep(0.02)  # it may be written just now: see `_place`
    return found


def _refuse(path: Path, found: Found, now: float) -> None:
    """
    Args:
        path: of the lock that the user knows. now: by the file system's clock.
    Raises:
        ConfigError: the lock's process lives, as far as can be told.
    """
    holder, age = found.holder, now - found.modified
    lives = _lives(holder) if holder else None
    if lives is False or (lives is None and age > PATIENCE):
        return
    others = f"wait for its end, stop it, or give another folder with --output_dir; if {path.parent} is"
    if not holder:
        what = f"{path} names no process; if no run is under way there, delete that file"
    else:
        what = f"process {holder['pid']} on {holder['host']} has been running there since {holder['since']}"
        if lives:
            what += f"; {others} a copy of that run's folder, delete {path}"
        else:
            life = f"{age:.0f} s ago" if age >= 0 else "in the future, by the file system's clock"
            what += (
                f" (its last sign of life: {life}; it counts as gone {PATIENCE:.0f} s after it); {others} no longer "
                f"in use, delete {path}"
            )
    raise ConfigError(f"{path.parent} is in use: {what}")


def refuse_if_in_use(folder: str | Path, by_others: bool = False) -> None:
    """Writes nothing; a lock that can be judged only by its heartbeat is left to `RunLock.take`.

    Args:
        by_others: than this process.
    Raises:
        ConfigError: a process of this host runs in the folder.
    """
    path = Path(folder) / NAME
    found = _read(path)
    if found and found.holder and _lives(found.holder) and not (by_others and found.holder["pid"] == os.getpid()):
        _refuse(path, found, found.modified)


def is_lock(path: Path) -> bool:
    """Whether it has the name of a lock, or of a file that is there while one is taken."""
    return path.name.removeprefix(".").startswith(NAME)


def _place(written: Path, path: Path) -> None:
    """Gives the content of the file `written` the name `path`.

    Raises:
        FileExistsError: there is one of that name.
    """
    try:
        os.link(written, path)
    except (FileExistsError, FileNotFoundError):
        raise
    except OSError:  # a file system without links: the file is there for a moment before its content is
        with open(path, "xb") as file:
            file.write(written.read_bytes())


class RunLock:
    """The lock of one run on its folder.

    A lock that somebody deletes is taken again. One that another run has taken, from a host that saw no sign of life for
    `PATIENCE`, is not taken back: `check` then ends this run before it writes anything that the other one could have
    written.

    Args:
        folder: exists when the lock is taken.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / NAME
        self.content = json.dumps(_myself()).encode()
        self.pid = os.getpid()
        self.stopped, self.mutex = threading.Event(), threading.Lock()  # the thread's end; one of both changes the file
        self.taken_by: Found | None = None
        self.was_deleted = False

    def take(self) -> None:
        """
        Raises:
            ConfigError: another run has it. OSError: the folder cannot be written to.
        """
        with self._written() as written:
            self._take(self.path, written)
        self._sweep()
        held.add(self)
        threading.Thread(target=self._beat, name=NAME, daemon=True).start()

    def release(self) -> None:
        """Nothing where it was not taken, or in a process that was forked from the run's."""
        if os.getpid() != self.pid or self not in held:
            return
        held.discard(self)
        self.stopped.set()
        locked = self.mutex.acquire(timeout=1.0)  # a thread in a file system that does not answer keeps nobody
        with contextlib.suppress(OSError, ConfigError):
            if (found := _read(self.path)) and found.content == self.content:
                self.path.unlink()
        if locked:
            self.mutex.release()

    def check(self, look: bool = True) -> str | None:
        """What the run is to say of its lock, if anything.

        Args:
            look: now, and not only at what the thread has seen a few seconds ago.
        Raises:
            CheckpointError: another run has it.
        """
        if look:
            self._look()
        if self.taken_by:
            holder = self.taken_by.holder
            who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
            raise CheckpointError(
                f"{self.path}: {who} has taken this run's lock, after no sign of life from here; this "
                "process ends and saves nothing, for the folder is the other's now"
            )
        if not self.was_deleted:
            return None
        self.was_deleted = False
        return f"{self.path} was deleted while this run lives; it is there again"

    def _beat(self) -> None:
        while not self.stopped.wait(BEAT):
            self._look()

    def _look(self) -> None:
        """A sign of life, if the lock is this run's still. A disk that fails has its say where the run writes."""
        with contextlib.suppress(OSError, ConfigError), self.mutex:
            if self not in held or self.taken_by:
                return
            found = _read(self.path)
            if found is None:
                with self._written() as written, contextlib.suppress(FileExistsError):
                    _place(written, self.path)
                    self.was_deleted = True
            elif found.content == self.content:
                os.utime(self.path)
            else:
                self.taken_by = found

    @contextlib.contextmanager
    def _written(self) -> Iterator[Path]:
        """A file with this lock's content, under a name of its own."""
        path = self.path.with_name(f".{NAME}.{secrets.token_hex(8)}")
        try:
            path.write_bytes(self.content)
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _take(self, path: Path, written: Path) -> None:
        """Takes the lock at `path`: the run's, or one of `_replace`."""
        while True:
            try:
                return _place(written, path)
            except FileExistsError:
                found = _read(path)
            if found and found.content == self.content:
                return  # NFS repeats a request whose answer got lost
            if found:
                _refuse(self.path, found, written.stat().st_mtime)
                if self._replace(path, found, written):
                    return

    def _replace(self, path: Path, dead: Found, written: Path) -> bool:
        """Puts this lock in the place of a dead one; false where that is not there any more."""
        name = hashlib.sha256(path.name.encode() + dead.content).hexdigest()[:16]
        guard = path.with_name(f".{NAME}.{name}")
        self._take(guard, written)  # nobody else replaces the same one until this is removed
        try:
            found = _read(path)
            if found is None or found.content != dead.content:
                return False
            with self._written() as copy:
                os.replace(copy, path)
            return True
        finally:
            guard.unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Removes what processes left that were killed while they took the lock."""
        now = self.path.stat().st_mtime
        for path in self.path.parent.glob(f".{NAME}.*"):
            with contextlib.suppress(OSError, ConfigError):
                if found := _read(path):
                    _refuse(path, found, now)
                    path.unlink(missing_ok=True)


held: set[RunLock] = set()  # by this process


def release_all() -> None:
    """For a process that is about to end without cleaning up."""
    for lock in list(held):
        lock.release()
