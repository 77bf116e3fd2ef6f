"""Files of a run on disk: written whole or not at all, never through a link, one run in a folder."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

SUBFOLDERS = ("checkpoints", "clients", "figures")
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


def lock_folder(folder: Path) -> FileLock:
    """Make a folder if it is missing, and keep other runs out of it until the lock is released or the process ends.

    Raises:
        ValueError: If the folder cannot be written, holds links, or another run uses it.
    """
    lock = FileLock(folder / ".lock", thread_local=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        refuse_links(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"Expected `output_dir` to be a folder that no other run uses, got {folder}: wait for the other run or choose "
            "another folder."
        ) from error
    except OSError as error:
        raise ValueError(
            f"Expected `output_dir` to be a folder that can be written, got {folder} ({error.strerror})."
        ) from error
    return lock


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
