"""Image folders: one file an image, one folder a class."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fedamm_pl.data.sources.in_memory import ImageData, image_tensor, one_line, require_regular_file

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""What Pillow may open, whatever the suffix: for others it starts programs, such as Ghostscript for EPS."""


def read_image_folder(folder: Path) -> ImageData:
    """Read ``<folder>/{train,test}/<class>/*.png`` (or .jpg, .bmp, .gif, .tif, .webp).

    A file's suffix says that it is an image, its content which of these formats it has.

    Args:
        folder: The folder. All images are of one size; if all training images are grey they stay grey, else all become RGB.

    Returns:
        The images in memory, classes in alphabetical order of their folders.

    Raises:
        ValueError: If a folder is empty or missing, a file is no image of these formats, or sizes differ. The message names
            the file.
    """
    classes = sorted(entry.name for entry in (folder / "train").iterdir() if entry.is_dir())
    if not classes:
        raise ValueError(f"Expected {folder / 'train'} to hold one folder of images for each class, got none.")
    unknown = {entry.name for entry in (folder / "test").glob("*") if entry.is_dir()} - set(classes)
    if unknown:
        raise ValueError(
            f"Expected classes of {folder / 'test'} to be in {folder / 'train'} too, got {sorted(unknown)}."
        )
    train_files, train_labels = _image_files(folder / "train", classes)
    test_files, test_labels = _image_files(folder / "test", classes)
    mode = "L" if all(_mode_and_size(path)[0] in ("1", "L") for path in train_files) else "RGB"
    first = train_files[0]
    return ImageData(
        _read_files(train_files, mode, first), train_labels, _read_files(test_files, mode, first), test_labels, classes
    )


def _image_files(folder: Path, classes: list[str]) -> tuple[list[Path], Tensor]:
    files = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).glob("*"))
        if path.suffix.lower() in SUFFIXES
    ]
    if not files:
        raise ValueError(f"Expected {folder} to hold images as <class>/*.png, got none.")
    return [path for path, _ in files], torch.tensor([label for _, label in files])


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        require_regular_file(path)
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except Exception as error:  # a damaged image may raise anything
        raise ValueError(
            f"Expected {path} to be a PNG, JPEG, WebP, BMP, GIF or TIFF image, got a file that cannot be decoded "
            f"({one_line(error)})."
        ) from error


def _mode_and_size(path: Path) -> tuple[str, tuple[int, int]]:
    with _opened(path) as image:
        return image.mode, image.size


def _read_files(paths: list[Path], mode: str, first: Path) -> Tensor:
    (_, size), pixels = _mode_and_size(first), []
    for path in paths:
        with _opened(path) as image:
            pixels.append(np.asarray(image.convert(mode)))
        if image.mode[0] in "IF":
            raise ValueError(f"Expected {path} to have 8 bits a channel, got mode {image.mode}: convert it first.")
        if image.size != size:
            raise ValueError(
                f"Expected all images to be of one size, {size[0]} x {size[1]} as {first.name}, "
                f"got {image.size[0]} x {image.size[1]} for {path}: resize them first."
            )
    return image_tensor(np.stack(pixels), "images")
