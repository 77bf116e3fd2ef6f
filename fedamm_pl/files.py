"""Files of a run on disk: written whole or not at all, never through a link, one run in a folder."""

import errno
import json
import os
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from fedamm_pl.terminal import printable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SUBFOLDERS = ("checkpoints", "clients", "figures")
LOCK, HOLDER = ".lock", ".lock.holder"
DISK_ERRORS = {
    getattr(errno, name)
    for name in [
        "EACCES",
        "EDQUOT",
        "EFBIG",
        "EIO",
        "EISDIR",
        "ELOOP",
        "EMFILE",
        "ENAMETOOLONG",
        "ENFILE",
        "ENOENT",
        "ENOSPC",
        "ENOTDIR",
        "EPERM",
        "EROFS",
        "ESTALE",
    ]
    if hasattr(errno, name)  # Windows has some of them only
}
NO_FOLLOW: int = getattr(os, "O_NOFOLLOW", 0)  # Windows has none


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a new file to write to; what it holds at the end becomes ``path``, whole or not at all, also after a power loss.

    A link at ``path`` is replaced, not followed.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # of a run that was killed, or a link that somebody has put there
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_FOLLOW, 0o666))
    try:
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):  # the disk may be full: give the room back
            temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new name itself, too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def append_whole(path: Path, content: bytes) -> None:
    """Append to a file; if that fails, leave it as it was.

    Raises:
        OSError: If the disk is full, or ``path`` is a link.
    """
    with open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | NO_FOLLOW, 0o666), "ab", buffering=0) as file:
        size = file.tell()
        try:
            if file.write(content) < len(content):  # a disk that fills up takes a part
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(size)
            raise


def of_the_disk(error: BaseException) -> bool:
    """Whether an error is of files and disks; others that are OSErrors too are of a network."""
    return isinstance(error, OSError) and error.errno in DISK_ERRORS


class FolderLock:
    """A folder that is in use by this process, and a file in it that says so to others.

    Args:
        lock: Held.
        holder: The file.
    """

    def __init__(self, lock: BaseFileLock, holder: Path) -> None:
        self._lock = lock
        self._holder = holder
        said = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with suppress(OSError):  # the disk may be full; the lock holds without it
            holder.unlink(missing_ok=True)  # of a run that was killed
            write_atomically(holder, json.dumps(said).encode())

    def release(self, force: bool = True) -> None:
        """Let others use the folder; a second time nothing happens."""
        if self._lock.is_locked:
            with suppress(OSError):  # the folder may be gone
                self._holder.unlink(missing_ok=True)
            self._lock.release(force=force)

    def __enter__(self) -> "FolderLock":
        """Return the lock."""
        return self

    def __exit__(self, *_: object) -> None:
        """Release it."""
        self.release()


def lock_folder(folder: Path) -> FolderLock:
    """Make a folder if it is missing, and keep other runs out of it until the lock is released or the process ends.

    Where the file system has no ``flock``, the lock is a file that outlives a process that is killed.

    Raises:
        ValueError: If the folder cannot be written, holds links, or another run uses it; the message says who, and what to do
            about a lock that a dead process has left.
    """
    path, holder = folder / LOCK, folder / HOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        refuse_links(folder)
        with tempfile.TemporaryFile(dir=folder) as probe:
            soft = not has_flock(probe.fileno())
        lock = (SoftFileLock if soft else FileLock)(path, thread_local=False)
        lock.acquire(timeout=0)
    except Timeout as error:
        by = held_by(path, holder) if soft else held_by(holder)
        way_out = "wait for the other run or choose another folder."
        if soft:
            way_out = (
                "if that run is over (this file system has no flock, so the lock of a run that was killed stays), delete "
                f"{path} and start again; else {way_out}"
            )
        raise ValueError(
            f"Expected `output_dir` to be a folder that no other run uses, got {folder}: {by and f'{by}; '}{way_out}"
        ) from error
    except OSError as error:
        raise ValueError(
            f"Expected `output_dir` to be a folder that can be written, got {folder} ({error.strerror})."
        ) from error
    return FolderLock(lock, holder)


def has_flock(descriptor: int) -> bool:
    """Whether a file can be locked for as long as its process lives."""
    if fcntl is None:  # Windows has other locks that end with the process
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.ENOSYS, errno.ENOTSUP)
    return True


def held_by(*paths: Path) -> str:
    """Say who holds a lock, by the first of some files that says so; empty if none does.

    The files may be anybody's. One is written by :class:`FolderLock`, or by filelock: process, host, and more, line by line.
    """
    for path in paths:
        content, changed = read_beginning(path)
        try:
            pid, host, *_ = content.split("\n")
            found = {
                "pid": int(pid),
                "host": host,
                "since": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(changed)),
            }
        except (ValueError, OverflowError, OSError):
            try:
                found = dict(json.loads(content))
            except (ValueError, TypeError, RecursionError):
                continue
        said = [printable(str(found.get(name, "?"))[:100]) for name in ("pid", "host", "since")]
        return "process {} on {} has used it since {}".format(*said)
    return ""


def read_beginning(path: Path, most: int = 1000) -> tuple[str, float]:
    """Return the first bytes of a file as text, and when it was changed; empty if it is not a file that can be read at once."""
    try:
        descriptor = os.open(path, os.O_RDONLY | NO_FOLLOW | getattr(os, "O_NONBLOCK", 0))
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            content = file.read(most) if stat.S_ISREG(status.st_mode) else b""
    except OSError:
        return "", 0.0
    return content.decode(errors="replace"), status.st_mtime


def refuse_links(folder: Path) -> None:
    """Check that nothing in the folder of a run leads out of it.

    Raises:
        ValueError: If it, or a subfolder that a run writes to, holds a symbolic link; the message names it.
    """
    for place in (folder, *(folder / name for name in SUBFOLDERS)):
        if place.is_dir():
            for entry in sorted(place.iterdir()):
                if entry.is_symlink():
                    raise ValueError(
                        f"Expected `output_dir` to hold no links, got {entry}, which points to {os.readlink(entry)}: a run "
                        "writes into its own folder only. Remove the link, or choose another folder."
                    )
