"""Reading files of strangers: no waiting, no more memory than there is, and one line for whatever is wrong with them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedamm_pl.terminal import printable


class UnusableFileError(ValueError):
    """A file cannot be used; the message names it and says all, in one line whatever its name is.

    Args:
        message: The message.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


@contextmanager
def reading(path: Path, expected: str) -> Iterator[None]:
    """Reword whatever goes wrong while a file is read.

    Args:
        path: The file.
        expected: What it should be and is not, for example "a whole npz file, got one that cannot be read".

    Raises:
        UnusableFileError: If the block fails, or there is something at ``path`` that is no regular file. Too little memory is
            called so, not damage.
    """
    with reworded(path, expected):
        require_regular_file(path)
        yield


@contextmanager
def reworded(what: object, expected: str) -> Iterator[None]:
    """Reword whatever goes wrong with a thing that need not be a file of its own.

    Args:
        what: The thing.
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
    except Exception as error:  # a damaged file may raise anything
        raise UnusableFileError(f"Expected {what} to be {expected} ({one_line(error)}).") from error


def require_regular_file(path: Path) -> None:
    """Refuse a pipe, a device or a folder, which might keep a reader waiting for ever.

    Raises:
        OSError: If there is something at ``path`` that is no regular file.
    """
    if path.exists() and not path.is_file():
        raise OSError("it is not a regular file")


def too_large(what: object) -> UnusableFileError:
    """Return what to raise where the memory is used up."""
    free = available_memory()
    there = "there is" if free is None else f"the {amount(free)} available"
    return UnusableFileError(f"Expected {what} to fit into memory, got more needed than {there}.")


def require_memory(needed: int, what: str) -> None:
    """Refuse data that do not fit, before any memory is taken for them.

    Args:
        needed: Bytes.
        what: What needs them, for the message.

    Raises:
        UnusableFileError: If fewer are available.
    """
    free = available_memory()
    if free is not None and needed > free:
        raise UnusableFileError(
            f"Expected {what} to fit into memory, got {amount(needed)} needed and {amount(free)} available."
        )


def available_memory() -> int | None:
    """Return how many bytes this process may still take; None where the system does not say.

    The least of what the machine has free, what its control groups (containers, batch systems) leave, and the process's
    own limit (``ulimit -v``).
    """
    bounds = list(_left_by_control_groups())
    with suppress(ImportError, OSError, ValueError):
        import resource  # there is none on Windows

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
                # files in the cache are given back when memory is needed
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
    """Return what an error says, without line breaks; its type if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def some(names: list[str], shown: int = 3) -> str:
    """Format a list of which the first few are shown.

    Example:
        >>> some(["a", "b", "c", "d"])
        'a, b, c, ...'
    """
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")
