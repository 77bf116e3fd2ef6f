"""The files of a run: written completely or not at all, never through a symbolic link, with one run per folder."""

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
    if hasattr(errno, name)  # Windows lacks some of them
}
NO_FOLLOW: int = getattr(os, "O_NOFOLLOW", 0)  # missing on Windows


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file that becomes ``path`` at the end, completely or not at all, even after a power loss.

    A symbolic link at ``path`` is replaced, not followed.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # left by a run that was killed, or a link made by someone else
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_FOLLOW, 0o666))
    try:
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):  # the disk may be full: free the space
            temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new directory entry must be on disk, too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file completely or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def append_whole(path: Path, content: bytes) -> None:
    """Append to a file; if this fails, restore the file.

    Raises:
        OSError: If the disk is full, or ``path`` is a link.
    """
    with open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | NO_FOLLOW, 0o666), "ab", buffering=0) as file:
        size = file.tell()
        try:
            if file.write(content) < len(content):  # a disk that fills up takes only a part
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(size)
            raise


def of_the_disk(error: BaseException) -> bool:
    """Whether an error concerns files or disks; other kinds of OSError concern the network."""
    return isinstance(error, OSError) and error.errno in DISK_ERRORS


class FolderLock:
    """The lock of a folder that this process uses, with a file in the folder that tells other processes who uses it.

    Args:
        lock: The lock, already acquired.
        holder: Path of the file.
    """

    def __init__(self, lock: BaseFileLock, holder: Path) -> None:
        self._lock = lock
        self._holder = holder
        said = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with suppress(OSError):  # the disk may be full; the lock works without the file
            holder.unlink(missing_ok=True)  # left by a run that was killed
            write_atomically(holder, json.dumps(said).encode())

    def release(self, force: bool = True) -> None:
        """Let other processes use the folder; a second call does nothing."""
        if self._lock.is_locked:
            with suppress(OSError):  # the folder may be gone
                self._holder.unlink(missing_ok=True)
            self._lock.release(force=force)

    def __enter__(self) -> "FolderLock":
        """Return the lock."""
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock."""
        self.release()


def lock_folder(folder: Path) -> FolderLock:
    """Create a folder if it is missing, and keep other runs out of it until the lock is released or the process ends.

    On a file system without ``flock`` the lock is a file, which remains if the process is killed.

    Raises:
        ValueError: If the folder cannot be written, contains symbolic links, or is used by another run. The message
            names that process, and says what to do about a lock that a dead process has left.
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
    """Whether the file system has locks that end with the process that holds them."""
    if fcntl is None:  # Windows has other locks that end with the process
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.ENOSYS, errno.ENOTSUP)
    return True


def held_by(*paths: Path) -> str:
    """Return a text that says who holds a lock, from the first of the files that contains it, or an empty text.

    The files are not trusted, since anyone may have written them. They are expected to come from :class:`FolderLock`,
    or from filelock, which writes process, host and more on separate lines.
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
    """Return the first bytes of a file as text, and its modification time.

    The text is empty if the path is not a regular file that can be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | NO_FOLLOW | getattr(os, "O_NONBLOCK", 0))
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            content = file.read(most) if stat.S_ISREG(status.st_mode) else b""
    except OSError:
        return "", 0.0
    return content.decode(errors="replace"), status.st_mtime


def refuse_links(folder: Path) -> None:
    """Check that the folder of a run contains no symbolic links, through which a run could write elsewhere.

    Raises:
        ValueError: If the folder, or a subfolder that a run writes to, contains a symbolic link; the message names it.
    """
    for place in (folder, *(folder / name for name in SUBFOLDERS)):
        if place.is_dir():
            for entry in sorted(place.iterdir()):
                if entry.is_symlink():
                    raise ValueError(
                        f"Expected `output_dir` to hold no links, got {entry}, which points to {os.readlink(entry)}: a run "
                        "writes into its own folder only. Remove the link, or choose another folder."
                    )
