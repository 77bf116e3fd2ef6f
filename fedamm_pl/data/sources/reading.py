"""Read untrusted files without blocking, within the available memory, and with one-line errors for any fault."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedamm_pl.terminal import printable


class UnusableFileError(ValueError):
    """A file cannot be used; the message names the file and the fault, in one line whatever the file's name is.

    Args:
        message: The message.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


@contextmanager
def reading(path: Path, expected: str) -> Iterator[None]:
    """Convert any error while a file is read to an ``UnusableFileError``.

    Args:
        path: The file.
        expected: What was expected and what was found, for example "a whole npz file, got one that cannot be read".

    Raises:
        UnusableFileError: If the block fails, or ``path`` exists and is not a regular file. Too little memory is
            reported as such, not as damage.
    """
    with reworded(path, expected):
        require_regular_file(path)
        yield


@contextmanager
def reworded(what: object, expected: str) -> Iterator[None]:
    """Convert any error while data are read to an ``UnusableFileError``; the data need not be a separate file.

    Args:
        what: The data, for the message.
        expected: As for :func:`reading`.

    Raises:
        UnusableFileError: If the block fails.
    """
    try:
        yield
    except UnusableFileError:
        raise
    except MemoryError as error:
        raise too_large(what) from error
    except FileNotFoundError as error:
        raise UnusableFileError(
            f"Expected {what} to be {expected.partition(', got ')[0]}, got no such file."
        ) from error
    except Exception as error:  # a damaged file may raise any error
        raise UnusableFileError(f"Expected {what} to be {expected} ({one_line(error)}).") from error


def require_regular_file(path: Path) -> None:
    """Check that a path is not a pipe, a device or a folder, which might block a reader forever.

    Raises:
        OSError: If ``path`` exists and is not a regular file.
    """
    if path.exists() and not path.is_file():
        raise OSError("it is not a regular file")


def too_large(what: object) -> UnusableFileError:
    """Return the error to raise when memory is used up."""
    free = available_memory()
    there = "there is" if free is None else f"the {amount(free)} available"
    return UnusableFileError(f"Expected {what} to fit into memory, got more needed than {there}.")


def require_memory(needed: int, what: str) -> None:
    """Check that data fit into memory before any memory is allocated for them.

    Args:
        needed: Number of bytes.
        what: The data that need them, for the message.

    Raises:
        UnusableFileError: If fewer bytes are available.
    """
    free = available_memory()
    if free is not None and needed > free:
        raise UnusableFileError(
            f"Expected {what} to fit into memory, got {amount(needed)} needed and {amount(free)} available."
        )


def available_memory() -> int | None:
    """Return how many bytes this process can still allocate, or None if the system does not report it.

    This is the smallest of the machine's free memory, the rest of the limits of its control groups (containers, batch
    systems), and the rest of the process's own limit (``ulimit -v``).
    """
    bounds = list(_left_by_control_groups())
    with suppress(ImportError, OSError, ValueError):
        import resource  # not available on Windows

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        if limit != resource.RLIM_INFINITY:
            bounds.append(limit - pages * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError, ValueError, IndexError):
        bounds.append(int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]) * 1024)
    return max(min(bounds), 0) if bounds else None


def _left_by_control_groups() -> Iterator[int]:
    root = Path("/sys/fs/cgroup")
    with suppress(OSError):
        own = root / Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2].strip("/")
        for group in {own, *(place for place in own.parents if place.is_relative_to(root))}:
            with suppress(OSError, ValueError, IndexError):
                limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
                # memory for cached files is freed when it is needed
                cached = int((group / "memory.stat").read_text().partition("inactive_file ")[2].split()[0])
                yield limit - used + cached


def amount(num_bytes: int) -> str:
    """Format a number of bytes.

    Example:
        >>> amount(1_200_000), amount(2_800_000_000)
        ('1.2 MB', '2.8 GB')
    """
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def one_line(error: Exception) -> str:
    """Return the message of an error without line breaks, or its type if the message is empty."""
    return " ".join(str(error).split()) or type(error).__name__


def some(names: list[str], shown: int = 3) -> str:
    """Format the first elements of a list.

    Example:
        >>> some(["a", "b", "c", "d"])
        'a, b, c, ...'
    """
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")
