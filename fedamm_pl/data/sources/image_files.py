"""``ImageFiles``: images in separate files, and functions that read them."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedamm_pl.data.sources.decoded import DecodedImages, kept, read_headers
from fedamm_pl.data.sources.decoding import read_pixels
from fedamm_pl.data.sources.listing import FRAMES, PassedOver
from fedamm_pl.data.sources.options import ReadOptions
from fedamm_pl.data.sources.source import Source


@dataclass(frozen=True, eq=False)
class ImageFiles(DecodedImages):
    """Images in separate files, decoded on demand.

    Attributes:
        root: The folder of the files.
        names: Their paths below ``root``, concatenated as bytes; a list of a million objects would take much more
            memory.
        ends: End of each path in ``names``, int64.
        num_bytes: Size of each file, int64.
    """

    root: str
    names: bytes
    ends: npt.NDArray[np.int64]
    num_bytes: npt.NDArray[np.int64]

    @property
    def fingerprint(self) -> str:
        """A hash of the files' paths below the root, of their sizes in bytes, and of the form of the images.

        It is fast to compute and the same on every machine. It does not detect that a file was replaced by another one
        of the same size.
        """
        digest = hashlib.sha256(f"{self.form.shape} {self.form.resized}".encode())
        for row in self.rows.tolist():
            digest.update(self._name(row).replace(os.sep.encode(), b"/") + b"\0%d\0" % self.num_bytes[row])
        return digest.hexdigest()

    def file(self, row: int) -> Path:
        """Return the path of a file."""
        return Path(self.root, os.fsdecode(self._name(row)))

    def _name(self, row: int) -> bytes:
        return self.names[self.ends[row - 1] if row else 0 : self.ends[row]]


def read_images(
    parts: Sequence[Sequence[str | Path]], *, root: Path, options: ReadOptions, passed: PassedOver | None = None
) -> list[Source]:
    """Read image files, all headers first, so that an unusable file is reported before any image is decoded.

    Faults in the pixels (damage, transparency) are found at once for images that are kept in memory, and for others
    when they are decoded.

    Args:
        parts: Paths of the files of each part of the data set, below ``root``.
        root: The folder, used in messages; fingerprints use paths below it, so equal data elsewhere have the same
            fingerprint.
        options: ``image_size``: the size to which images are resized; None: all have one size. ``in_memory``: whether
            they are all decoded now; None: if they take no more than 1 GiB.
        passed: Records files with several frames; None: they are logged.

    Returns:
        A source for each part: tensors (N, C, H, W) in memory, or :class:`ImageFiles`. There is one channel if all
        images are grey.

    Raises:
        ValueError: If there are no files, a file is missing, is not an image of a known format, is transparent or has
            16 bits per channel, sizes differ, or the images do not fit into memory. The message names the file.
    """
    files = open_images([path for part in parts for path in part], root=root, options=options, passed=passed)
    ends = np.cumsum([len(part) for part in parts])[:-1]
    return kept([files.subset(rows) for rows in files.rows.tensor_split(ends.tolist())], options)


def open_images(
    paths: Sequence[str | Path], *, root: Path, options: ReadOptions, passed: PassedOver | None = None
) -> ImageFiles:
    """Check the headers of image files without decoding images; see :func:`read_images`."""
    form, num_bytes, several = read_headers(len(paths), lambda i: Path(paths[i]), options.image_size, str(root))
    noted = PassedOver(root) if passed is None else passed
    for i in several:
        noted.add(FRAMES, Path(paths[i]))
    if passed is None:
        noted.log()
    start = os.path.join(root, "")
    names = [os.fsencode(os.fspath(path).removeprefix(start)) for path in paths]
    ends = np.cumsum([len(name) for name in names], dtype=np.int64)
    return ImageFiles(torch.arange(len(paths)), form, str(root), b"".join(names), ends, num_bytes)


def read_image_files(paths: Sequence[str | Path], image_size: Sequence[int], in_channels: int) -> Tensor:
    """Read image files in the same way as for training, to predict their classes with a model.

    Args:
        paths: The files; a leading ``~`` stands for the user's home directory.
        image_size: Height and width, ``info["image_size"]`` of the module.
        in_channels: 1 for grey, 3 for RGB, as in the module.

    Returns:
        uint8 images of shape (N, C, H, W).

    Raises:
        ValueError: If there are no files, or a file is missing, damaged, transparent, has 16 bits per channel or is not
            an image. The message names the file.
    """
    if in_channels not in (1, 3) or len(image_size) != 2 or isinstance(paths, str | Path) or not len(paths):
        raise ValueError(
            "Expected a list of paths, an `image_size` of height and width, and `in_channels` to be 1 or 3, got "
            f"{paths!s:.60}, {image_size} and {in_channels}."
        )
    height, width = image_size
    mode = "L" if in_channels == 1 else "RGB"
    pixels = [read_pixels(Path(path).expanduser(), mode, (height, width)) for path in paths]
    return (
        torch.from_numpy(np.stack(pixels)).view(len(paths), height, width, in_channels).permute(0, 3, 1, 2).contiguous()
    )
