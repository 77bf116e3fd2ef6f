"""Image folders: one file an image, one folder a class."""

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fedamm_pl.data.sources.image_data import ImageData, check_images, check_names
from fedamm_pl.data.sources.listing import (
    BESIDE,
    FRAMES,
    PassedOver,
    class_folders,
    image_files,
    visible,
)
from fedamm_pl.data.sources.reading import UnusableFileError, reading, require_memory, too_large

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""What Pillow may open, whatever the suffix: for others it starts programs, such as Ghostscript for EPS."""
GREY = {"1", "L", "LA"}
COLOURED = {"P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}
BYTES_PER_PIXEL = 16
"""While one image is decoded: its channels, with alpha, in up to four copies."""


def read_image_folder(folder: Path) -> ImageData:
    """Read ``<folder>/{train,test}/<class>/*.png`` (or .jpg, .bmp, .gif, .tif, .webp).

    A file's suffix says that it is an image, its content which of these formats it has. Images are turned upright as their
    EXIF orientation says. Palettes, 1-bit and CMYK images become grey levels or RGB (CMYK by the plain formula, without a
    colour profile); of several frames or pages the first is taken. Hidden and system names, other files and further folders
    are passed over; what is passed over is logged in one line. Links are followed, also out of the folder, which is logged too.

    Args:
        folder: The folder. All images are of one size; if those of both parts are grey they stay grey, else all become RGB.

    Returns:
        The images in memory, classes in alphabetical order of their folders.

    Raises:
        ValueError: If a folder is empty or missing, a file is no image of these formats, is transparent or has 16 bits a
            channel, sizes differ, or the images do not fit into memory. The message names the file.
    """
    passed = PassedOver(folder)
    classes = class_folders(folder / "train", passed)
    if not classes:
        raise UnusableFileError(f"Expected {folder / 'train'} to hold one folder of images for each class, got none.")
    check_names(classes, f" in {folder / 'train'}")
    has_test = os.path.isdir(folder / "test")
    if unknown := set(class_folders(folder / "test", passed) if has_test else ()) - set(classes):
        raise UnusableFileError(
            f"Expected classes of {folder / 'test'} to be in {folder / 'train'} too, got {sorted(unknown)}."
        )
    train, test = (image_files(folder / part, classes, passed) for part in ("train", "test"))
    if empty := set(range(len(classes))) - {label for _, label in train}:
        raise UnusableFileError(
            f"Expected {folder / 'train' / classes[min(empty)]} to hold images, got none: leave the class out."
        )
    for path in (folder / entry.name for entry in visible(folder, passed)):
        if path.name not in ("train", "test") and os.path.isdir(path):
            passed.add(BESIDE, path)
    images = _read_files([path for path, _ in train + test], passed)
    labels = torch.tensor([label for _, label in train + test])
    passed.log()
    split = len(train)
    data = ImageData(images[:split], labels[:split], images[split:], labels[split:], classes)
    check_images(data, f" of {folder}")
    return data


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    expected = "a PNG, JPEG, WebP, BMP, GIF or TIFF image, got a file that cannot be decoded"
    with reading(path, expected), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # what it needs is compared with what there is
        with Image.open(path, formats=FORMATS) as image:
            yield image


def _read_files(paths: list[Path], passed: PassedOver) -> Tensor:
    """Read images (N, C, H, W) of one size; headers first, so that nothing is decoded that does not fit."""
    first = _upright(paths[0], None).shape[:2]
    coloured, largest = False, 0
    for path in paths:
        mode, size, frames = _header(path)
        coloured |= mode not in GREY
        largest = max(largest, size[0] * size[1])
        if sorted(size) != sorted(first):
            raise _of_another_size(paths[0], path, first, (size[1], size[0]))
        if frames > 1:
            passed.add(FRAMES, path)
    mode, channels = ("RGB", 3) if coloured else ("L", 1)
    what = f"{len(paths)} images of {first[1]} x {first[0]} pixels in {passed.root}"
    require_memory(len(paths) * channels * first[0] * first[1] + BYTES_PER_PIXEL * largest, what)
    try:
        images = np.empty((len(paths), channels, *first), dtype=np.uint8)
    except MemoryError as error:
        raise too_large(what) from error
    for image, path in zip(images, paths, strict=True):
        pixels = _upright(path, mode)
        if pixels.shape[:2] != first:
            raise _of_another_size(paths[0], path, first, pixels.shape[:2])
        image[:] = pixels.reshape(*first, channels).transpose(2, 0, 1)
    return torch.from_numpy(images)


def _of_another_size(first_path: Path, path: Path, first: tuple[int, ...], size: tuple[int, ...]) -> UnusableFileError:
    return UnusableFileError(
        f"Expected all images to be of one size, {first[1]} x {first[0]} like {first_path.name}, "
        f"got {size[1]} x {size[0]} for {path}: resize them first."
    )


def _header(path: Path) -> tuple[str, tuple[int, int], int]:
    """Return mode, width and height as stored, and the number of frames."""
    with _opened(path) as image:
        _require_eight_bits(image, path)
        return image.mode, image.size, getattr(image, "n_frames", 1)


def _require_eight_bits(image: Image.Image, path: Path) -> None:
    # the raw modes of files with 16 bits a channel, of which Pillow keeps 8; those of a BMP are 16 bits for three channels
    raw = [
        str(part)
        for tile in getattr(image, "tile", ())
        for part in (tile[3] if isinstance(tile[3], tuple) else (tile[3],))
    ]
    deep = next((part for part in raw if re.match(r"(?!BGR).*;1[26]", part)), None)
    if deep or image.mode not in GREY | COLOURED:
        got = image.mode if image.mode not in GREY | COLOURED else deep
        raise UnusableFileError(
            f"Expected {path} to have 8 bits a channel, grey or in colour, got mode {got}: convert it first."
        )


def _upright(path: Path, mode: str | None) -> npt.NDArray[np.uint8]:
    """Return the pixels of an image as it is seen, (H, W) or (H, W, C), in this mode or as they are stored."""
    with _opened(path) as image:
        _require_eight_bits(image, path)
        if mode is None:
            width, height = image.size
            require_memory(BYTES_PER_PIXEL * width * height, f"{path} of {width} x {height} pixels")
        ImageOps.exif_transpose(image, in_place=True)
        seen: Image.Image = image
        if image.has_transparency_data:
            seen = image.convert("RGBA")
            if seen.getchannel("A").getextrema() != (255, 255):
                raise UnusableFileError(
                    f"Expected {path} to be opaque, got transparent pixels: put it on a background first, for example by "
                    f"`magick {path.name} -background white -flatten {path.name}`."
                )
        return np.array(seen.convert(mode) if mode else seen)
