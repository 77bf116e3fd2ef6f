"""``ImageFiles``: images that are decoded when they are asked for, and how image files are read, in memory or so."""

import hashlib
import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedamm_pl.cores import usable_cores
from fedamm_pl.data.sources.decoding import BYTES_PER_PIXEL, LARGE, Header, read_header, read_pixels
from fedamm_pl.data.sources.listing import FRAMES, PassedOver
from fedamm_pl.data.sources.options import ReadOptions
from fedamm_pl.data.sources.reading import UnusableFileError, amount, require_memory, too_large
from fedamm_pl.data.sources.source import Source

IN_MEMORY_UP_TO = 2**30
"""Bytes of decoded images that are kept in memory where nobody says; the same on every machine, like what follows from it."""
IMAGES, HEADERS = 8, 256
"""How many of them a thread takes on at once."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """A :class:`~fedamm_pl.data.sources.source.Source` of uint8 images in files, which threads decode when they are asked for.

    One pool of threads serves all sources of a process. What it returns does not depend on the number of threads.

    Attributes:
        root: The folder of the files.
        names: Their paths below ``root``, as UTF-8, one after the other; all sources of a data set share them.
        ends: Where each path ends in ``names``, int64.
        num_bytes: Size of each file, int64.
        rows: Which files are the examples of this source, int64 of shape (N,).
        mode: L (grey) or RGB.
        size: Height and width.
        resized: Whether images are brought to that size; otherwise they must have it.
    """

    root: str
    names: bytes
    ends: npt.NDArray[np.int64]
    num_bytes: npt.NDArray[np.int64]
    rows: Tensor
    mode: str
    size: tuple[int, int]
    resized: bool

    @property
    def shape(self) -> torch.Size:
        """(N, C, H, W)."""
        return torch.Size((len(self.rows), 1 if self.mode == "L" else 3, *self.size))

    @property
    def dtype(self) -> torch.dtype:
        """Always uint8."""
        return torch.uint8

    @property
    def device(self) -> torch.device:
        """Always the CPU."""
        return torch.device("cpu")

    @property
    def fingerprint(self) -> str:
        """A hash of the files' paths below the root and their sizes in bytes, and of the size and channels of the images.

        It is cheap, and the same on every machine. It does not see a file that is replaced by another one of as many bytes.
        """
        digest = hashlib.sha256(f"{self.mode} {self.size} {self.resized}".encode())
        for row in self.rows.tolist():
            digest.update(self._name(row).replace(os.sep.encode(), b"/") + b"\0%d\0" % self.num_bytes[row])
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: Any) -> Tensor:
        """Return images (B, C, H, W).

        Raises:
            ValueError: If a file cannot be decoded. The message names it.
        """
        rows = self.rows[indices]
        (images,) = self._decoded([rows.flatten()])
        return images.view(*rows.shape, *images.shape[1:])

    def stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the images of each chunk of indices; meanwhile the next ones are decoded, two chunks or more for few images."""
        return self._decoded(self.rows[chunk] for chunk in chunks)

    def subset(self, indices: Tensor) -> "ImageFiles":
        """Return the source of these examples alone; the list of files is shared."""
        return replace(self, rows=self.rows[indices])

    def path(self, row: int) -> Path:
        """Return the path of a file."""
        return Path(self.root, os.fsdecode(self._name(row)))

    def _name(self, row: int) -> bytes:
        return self.names[self.ends[row - 1] if row else 0 : self.ends[row]]

    def _decoded(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        pool, enough = thread_pool(), 2 * IMAGES * num_threads()
        waiting: deque[tuple[Tensor, list[Future[None]]]] = deque()
        try:
            for rows in chunks:
                waiting.append(self._begun(rows, pool))
                # two ahead of the one that is waited for, and more of small ones, or threads are idle
                while len(waiting) > 2 and sum(len(images) for images, _ in waiting) - len(waiting[0][0]) > enough:
                    yield _done(*waiting.popleft())
            while waiting:
                yield _done(*waiting.popleft())
        finally:  # also where nobody asks for the rest
            for _, parts in waiting:
                for part in parts:
                    part.cancel()

    def _begun(self, rows: Tensor, pool: ThreadPoolExecutor) -> tuple[Tensor, list["Future[None]"]]:
        chosen, images = rows.tolist(), np.empty((len(rows), *self.shape[1:]), dtype=np.uint8)
        starts = range(0, len(chosen), IMAGES)
        parts = [pool.submit(self._decode, chosen[i : i + IMAGES], images[i : i + IMAGES]) for i in starts]
        return torch.from_numpy(images), parts

    def _decode(self, rows: list[int], images: npt.NDArray[np.uint8]) -> None:
        for row, image in zip(rows, images, strict=True):
            path = self.path(row)
            pixels = read_pixels(path, self.mode, self.size if self.resized else None)
            if pixels.shape[:2] != self.size:
                raise _of_another_size(self.path(0), path, self.size, pixels.shape[:2])
            image[:] = pixels.reshape(*self.size, len(image)).transpose(2, 0, 1)


def _done(images: Tensor, parts: list["Future[None]"]) -> Tensor:
    try:
        for part in parts:
            part.result()
    except BaseException:
        for part in parts:
            part.cancel()
        raise
    return images


def num_threads() -> int:
    """Return how many threads decode: as many as torch computes with, so that what is said to it bounds both."""
    return max(1, min(torch.get_num_threads(), usable_cores()))


def thread_pool() -> ThreadPoolExecutor:
    """Return the threads that decode images for this process; they start with the first image and outlive the clients' fits."""
    return _thread_pool(os.getpid(), num_threads())


@lru_cache(maxsize=1)  # of another process, after a fork, nothing but the name is left
def _thread_pool(process: int, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, f"images-of-{process}")


def read_images(
    parts: Sequence[Sequence[str | Path]], *, root: Path, options: ReadOptions, passed: PassedOver | None = None
) -> list[Source]:
    """Read image files, all headers first, so that a file that cannot be used is named before anything is decoded.

    What only the pixels show (damage, transparency) is found at once for images in memory, for others when they are needed.

    Args:
        parts: Paths of the files of each part of the data set, below ``root``.
        root: The folder, for messages, and so that equal data have the same fingerprint elsewhere.
        options: ``image_size``: the size to which images are brought; None: all have one size. ``in_memory``: whether they
            are all decoded now; None: if they take no more than :data:`IN_MEMORY_UP_TO`.
        passed: Where files with several frames are noted; None: they are logged.

    Returns:
        A source for each part: tensors (N, C, H, W) in memory, or :class:`ImageFiles`. Of one channel if all images are grey.

    Raises:
        ValueError: If there are no files, one is missing, is no image of a known format, is transparent or has 16 bits a channel,
            sizes differ, or the images do not fit into memory. The message names the file.
    """
    paths = [path for part in parts for path in part]
    if not paths:
        raise UnusableFileError(f"Expected {root} to hold images, got none.")
    noted = PassedOver(root) if passed is None else passed
    files, largest = _listed(paths, root, options.image_size, noted)
    ends = np.cumsum([len(part) for part in parts])
    sources = [files.subset(rows) for rows in torch.arange(len(paths)).tensor_split(ends[:-1].tolist())]
    needed, several = files.shape.numel(), min(num_threads(), len(paths)) - 1
    decoding = BYTES_PER_PIXEL * (largest + several * min(largest, LARGE))
    what = f"{len(paths)} images of {files.size[1]} x {files.size[0]} pixels in {root}"
    in_memory = needed <= IN_MEMORY_UP_TO if options.in_memory is None else options.in_memory
    require_memory(
        decoding + needed * in_memory, what if in_memory else f"the largest images in {root}, while decoded,"
    )
    if not in_memory:
        log.info("%s (%s) are decoded when they are needed", what, amount(needed))
    try:
        read: list[Source] = [source[:] for source in sources] if in_memory else [*sources]
    except MemoryError as error:
        raise too_large(what) from error
    if passed is None:
        noted.log()
    return read


def _listed(
    paths: Sequence[str | Path], root: Path, image_size: int | tuple[int, int] | None, passed: PassedOver
) -> tuple[ImageFiles, int]:
    """Check all headers; return the source of all files, and how many pixels the largest image has."""
    resized = image_size is not None
    if image_size is None:
        size = _size_of(Path(paths[0]))
    else:
        size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[-1])
    num_bytes, largest, coloured = np.empty(len(paths), dtype=np.int64), 0, False
    for i, header in enumerate(_headers(paths)):
        largest, coloured, num_bytes[i] = max(largest, header.pixels), coloured or header.coloured, header.num_bytes
        seen = header.size[::-1] if header.sideways else header.size
        if not resized and seen != size and (header.sideways is not None or seen[::-1] != size):
            raise _of_another_size(Path(paths[0]), Path(paths[i]), size, seen)
        if header.frames > 1:
            passed.add(FRAMES, Path(paths[i]))
    start = os.path.join(root, "")
    names = [os.fsencode(os.fspath(path).removeprefix(start)) for path in paths]
    ends = np.cumsum([len(name) for name in names], dtype=np.int64)
    rows, mode = torch.arange(len(paths)), "RGB" if coloured else "L"
    return ImageFiles(str(root), b"".join(names), ends, num_bytes, rows, mode, size, resized), largest


def _size_of(path: Path) -> tuple[int, int]:
    header = read_header(path)
    require_memory(BYTES_PER_PIXEL * header.pixels, f"{path} of {header.size[1]} x {header.size[0]} pixels")
    height, width = read_pixels(path, None).shape[:2]
    return height, width


def _headers(paths: Sequence[str | Path]) -> Iterator[Header]:
    def read(start: int) -> list[Header]:
        return [read_header(Path(path)) for path in paths[start : start + HEADERS]]

    for headers in thread_pool().map(read, range(0, len(paths), HEADERS)):
        yield from headers


def _of_another_size(first_path: Path, path: Path, first: tuple[int, ...], size: tuple[int, ...]) -> UnusableFileError:
    return UnusableFileError(
        f"Expected all images to be of one size, {first[1]} x {first[0]} like {first_path.name}, "
        f"got {size[1]} x {size[0]} for {path}: --data.image_size brings them to one."
    )
