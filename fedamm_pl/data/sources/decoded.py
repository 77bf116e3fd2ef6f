"""``DecodedImages``: images that are decoded on demand, by one pool of threads per process."""

import logging
import math
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from fedamm_pl.data.sources.decoding import BYTES_PER_PIXEL, LARGE, Content, Header, read_header, read_pixels
from fedamm_pl.data.sources.image_data import ImageData
from fedamm_pl.data.sources.options import ReadOptions
from fedamm_pl.data.sources.reading import UnusableFileError, amount, require_memory, too_large
from fedamm_pl.data.sources.source import Source

IN_MEMORY_UP_TO = 2**30
"""Bytes of decoded images that are kept in memory by default.

The value is the same on every machine, so the results that depend on it are the same, too.
"""
IMAGES, HEADERS = 8, 256
"""Number of images, and of headers, in one task of a thread."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Form:
    """The form to which the images of a data set are converted.

    Attributes:
        mode: L (grey) or RGB.
        size: Height and width.
        resized: Whether images are resized to that size; otherwise they must have it.
        first: The image whose size they must have, for messages.
        most_pixels: Number of pixels of the largest image as stored.
        where: The source of the images, for messages.
    """

    mode: str
    size: tuple[int, int]
    resized: bool
    first: str
    most_pixels: int
    where: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return (1 if self.mode == "L" else 3, *self.size)

    def decode(self, path: Path | Content, image: npt.NDArray[np.uint8]) -> None:
        """Decode an image file into an array (C, H, W)."""
        pixels = read_pixels(path, self.mode, self.size if self.resized else None)
        if pixels.shape[:2] != self.size:
            raise self.of_another_size(path, pixels.shape[:2])
        image[:] = pixels.reshape(*self.size, len(image)).transpose(2, 0, 1)

    def of_another_size(self, path: Path | Content, size: tuple[int, ...]) -> UnusableFileError:
        """Return the error to raise for an image of another size."""
        return UnusableFileError(
            f"Expected all images to be of one size, {self.size[1]} x {self.size[0]} like {self.first}, "
            f"got {size[1]} x {size[0]} for {path}: --data.image_size brings them to one."
        )


@dataclass(frozen=True, eq=False)
class DecodedImages(ABC):
    """A :class:`~fedamm_pl.data.sources.source.Source` of uint8 images that threads decode on demand.

    One pool of threads serves all sources of a process. The result does not depend on the number of threads.

    Attributes:
        rows: Numbers of the files that are the examples of this source, int64 of shape (N,).
        form: The form to which the images are converted.
    """

    rows: Tensor
    form: Form

    @abstractmethod
    def file(self, row: int) -> Path | Content:
        """Return an image file."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of the information about the files that is known without decoding them."""

    @property
    def shape(self) -> torch.Size:
        """(N, C, H, W)."""
        return torch.Size((len(self.rows), *self.form.shape))

    @property
    def dtype(self) -> torch.dtype:
        """Always uint8."""
        return torch.uint8

    @property
    def device(self) -> torch.device:
        """Always the CPU."""
        return torch.device("cpu")

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
        """Yield the images of each chunk of indices while the next two chunks (more if they are small) are decoded."""
        return self._decoded(self.rows[chunk] for chunk in chunks)

    def subset(self, indices: Tensor) -> "DecodedImages":
        """Return a source with these examples only; it shares the information about the files."""
        return replace(self, rows=self.rows[indices])

    def _decoded(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        pool, enough = thread_pool(), 2 * IMAGES * num_threads()
        waiting: deque[tuple[Tensor, list[Future[None]]]] = deque()
        ahead = 0  # images beyond the first chunk that waits
        try:
            for rows in chunks:
                ahead += len(rows) if waiting else 0
                waiting.append(self._begun(rows, pool))
                if len(waiting) > 2 and ahead >= enough:
                    ahead -= len(waiting[1][0])
                    yield _done(*waiting.popleft())
            while waiting:
                yield _done(*waiting.popleft())
        finally:  # also if the remaining images are not requested
            for _, parts in waiting:
                for part in parts:
                    part.cancel()

    def _begun(self, rows: Tensor, pool: ThreadPoolExecutor) -> tuple[Tensor, list["Future[None]"]]:
        chosen, images = rows.tolist(), np.empty((len(rows), *self.form.shape), dtype=np.uint8)
        starts = range(0, len(chosen), IMAGES)
        parts = [pool.submit(self._decode, chosen[i : i + IMAGES], images[i : i + IMAGES]) for i in starts]
        return torch.from_numpy(images), parts

    def _decode(self, rows: list[int], images: npt.NDArray[np.uint8]) -> None:
        for row, image in zip(rows, images, strict=True):
            self.form.decode(self.file(row), image)


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
    """Return the number of decoding threads: as many as torch uses, so that one setting limits both."""
    return max(1, min(torch.get_num_threads(), usable_cores()))


def thread_pool() -> ThreadPoolExecutor:
    """Return the threads that decode images for this process; they start with the first image and last for all fits."""
    return _thread_pool(os.getpid(), num_threads())


@lru_cache(maxsize=1)  # after a fork, the parent's threads do not exist in the child
def _thread_pool(process: int, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, f"images-of-{process}")


def read_headers(
    number: int, file: Callable[[int], Path | Content], image_size: int | tuple[int, int] | None, where: str
) -> tuple[Form, npt.NDArray[np.int64], list[int]]:
    """Check the headers of all images, so that an unusable file is reported before any image is decoded.

    Args:
        number: Number of images N.
        file: Number of an image -> its file.
        image_size: The size to which images are resized, see :class:`ReadOptions`; None: all have one size.
        where: The source of the images, for messages.

    Returns:
        The form of the images, the sizes of the files in bytes (N,), and the numbers of the images with several frames.

    Raises:
        ValueError: If a file is missing, is not an image of a known format, or has 16 bits per channel, or if sizes
            differ.
    """
    if not number:
        raise UnusableFileError(f"Expected {where} to hold images, got none.")
    sizes = (image_size,) if isinstance(image_size, int) else image_size
    size = (sizes[0], sizes[-1]) if sizes else _size_of(file(0))
    first = file(0)
    form = Form("L", size, bool(sizes), first.name, 0, where)
    num_bytes, several, most, coloured = np.empty(number, dtype=np.int64), [], 0, False
    for i, header in enumerate(_headers(number, file)):
        most, coloured, num_bytes[i] = max(most, header.pixels), coloured or header.coloured, header.num_bytes
        seen = header.size[::-1] if header.sideways else header.size
        if not form.resized and seen != size and (header.sideways is not None or seen[::-1] != size):
            raise form.of_another_size(file(i), seen)
        if header.frames > 1:
            several.append(i)
    return replace(form, mode="RGB" if coloured else "L", most_pixels=most), num_bytes, several


def _size_of(path: Path | Content) -> tuple[int, int]:
    header = read_header(path)
    require_memory(BYTES_PER_PIXEL * header.pixels, f"{path} of {header.size[1]} x {header.size[0]} pixels")
    height, width = read_pixels(path, None).shape[:2]
    return height, width


def _headers(number: int, file: Callable[[int], Path | Content]) -> Iterator[Header]:
    def read(start: int) -> list[Header]:
        return [read_header(file(i)) for i in range(start, min(start + HEADERS, number))]

    for headers in thread_pool().map(read, range(0, number, HEADERS)):
        yield from headers


def kept(sources: Sequence[DecodedImages], options: ReadOptions) -> list[Source]:
    """Decode all images now and keep them in memory, or leave them to be decoded on demand.

    Args:
        sources: The parts of a data set, all with the same form.
        options: ``in_memory`` decides; None: images are kept if they take no more than :data:`IN_MEMORY_UP_TO`.

    Raises:
        ValueError: If the images do not fit into memory, or one of them cannot be decoded now. The message names it.
    """
    form, number = sources[0].form, sum(len(source) for source in sources)
    each = math.prod(form.shape)  # a Python int: with a huge size given by mistake, torch's integers would overflow
    needed = number * each
    at_once = BYTES_PER_PIXEL * (form.most_pixels + (min(num_threads(), number) - 1) * min(form.most_pixels, LARGE))
    what = f"{number} images of {form.size[1]} x {form.size[0]} pixels in {form.where}"
    if not (needed <= IN_MEMORY_UP_TO if options.in_memory is None else options.in_memory):
        require_memory(at_once, f"the largest images in {form.where}, of {form.most_pixels} pixels,")
        ahead = min(number, 2 * IMAGES * num_threads())
        require_memory(ahead * each, what.replace(f"{number}", f"{ahead}", 1))
        log.info("%s are decoded on demand; in memory they would take %s", what, amount(needed))
        return [*sources]
    require_memory(needed + at_once, what)
    try:
        return [source[:] for source in sources]
    except MemoryError as error:
        raise too_large(what) from error


def kept_parts(data: ImageData, options: ReadOptions) -> ImageData:
    """Apply :func:`kept` to all parts of a data set that are decoded images; other data are returned unchanged."""
    parts = [(name, images) for name, (images, _) in data.parts.items() if isinstance(images, DecodedImages)]
    if not parts:
        return data
    sources = kept([images for _, images in parts], options)
    changed: dict[str, Any] = {f"{name}_images": images for (name, _), images in zip(parts, sources, strict=True)}
    return replace(data, **changed)
