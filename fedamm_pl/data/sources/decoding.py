"""Read one image file: its header, and its pixels, upright, opaque and in the requested size."""

import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import (
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageFile,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from fedamm_pl.data.sources.reading import UnusableFileError, reading, reworded

FORMATS = {
    "PNG": PngImagePlugin.PngImageFile,
    "JPEG": JpegImagePlugin.jpeg_factory,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
}
"""The formats that may be opened, whatever the suffix; for others Pillow may start programs, as Ghostscript for EPS."""
GREY = {"1", "L", "LA"}
COLOURED = {"P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}
BYTES_PER_PIXEL = 16
"""Memory needed to decode one image: its channels, with alpha, in up to four copies."""
LARGE = 2**24
"""Number of pixels above which images are decoded one at a time, since several threads would need more memory."""
SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that exchange height and width."""
_one_large = Lock()


@dataclass(frozen=True)
class Content:
    """An image file inside another file.

    Attributes:
        name: Its name in messages.
        content: Its bytes.
    """

    name: str
    content: "bytes | memoryview"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Header:
    """The information in the header of an image file.

    Attributes:
        coloured: Whether the image is in colour.
        size: Height and width as stored.
        sideways: Whether a viewer exchanges height and width; None: known only after decoding.
        frames: Number of frames or pages.
        num_bytes: Size of the file.
    """

    coloured: bool
    size: tuple[int, int]
    sideways: bool | None
    frames: int
    num_bytes: int

    @property
    def pixels(self) -> int:
        """Number of pixels."""
        return math.prod(self.size)


def read_header(path: Path | Content) -> Header:
    """Read the header of an image without decoding the image.

    Raises:
        ValueError: If it is not an image of a known format with 8 bits per channel. The message names the file.
    """
    with _opened(path) as image:
        _require_eight_bits(image, path)
        # in a PNG the orientation may follow the pixels; for a TIFF, Pillow gives the size after rotation
        turned = image.format in ("JPEG", "MPO", "WEBP") and image.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS
        sideways = None if image.format in ("PNG", "TIFF") else turned
        frames = getattr(image, "n_frames", 1)
        num_bytes = path.stat().st_size if isinstance(path, Path) else len(path.content)
        return Header(image.mode not in GREY, image.size[::-1], sideways, frames, num_bytes)


def read_pixels(path: Path | Content, mode: str | None, size: tuple[int, int] | None = None) -> npt.NDArray[np.uint8]:
    """Return the pixels of an image as a viewer shows it, (H, W) or (H, W, C).

    With a size, the image is scaled (antialiased bilinear interpolation) to just cover height and width, and cropped
    equally on both sides. A JPEG file of at least four times the size is decoded at 1/2, 1/4 or 1/8 of its stored size.

    Args:
        path: The file, or its content.
        mode: L or RGB; None: as stored.
        size: Height and width, or None.

    Raises:
        ValueError: If it cannot be decoded, or has transparent pixels or 16 bits per channel. The message names the
            file.
    """
    with _opened(path) as image:
        _require_eight_bits(image, path)
        if size is not None:
            _draft(image, size)
        if math.prod(image.size) <= LARGE:
            return _seen(image, path, mode, size)
        with _one_large:
            return _seen(image, path, mode, size)


@contextmanager
def _file(path: Path | Content) -> Iterator[BinaryIO]:
    expected = "a PNG, JPEG, WebP, BMP, GIF or TIFF image, got a file that cannot be decoded"
    if isinstance(path, Content):
        with reworded(path.name, expected):
            yield io.BytesIO(path.content)
        return
    with reading(path, expected), path.open("rb") as file:
        yield file


@contextmanager
def _opened(path: Path | Content) -> Iterator[ImageFile.ImageFile]:
    with _file(path) as file:
        start = file.read(16)
        file.seek(0)
        # not with Image.open, whose warning about large images cannot be silenced for a single thread
        known = (name for name in FORMATS if (accepts := Image.OPEN[name][1]) and accepts(start))
        if (name := next(known, None)) is None:
            raise ValueError("none of these formats")
        with FORMATS[name](file) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and math.prod(image.size) > 2 * limit:
                raise ValueError(f"{image.size[0]} x {image.size[1]} pixels, at most {2 * limit} are taken")
            yield image


def _require_eight_bits(image: ImageFile.ImageFile, path: Path | Content) -> None:
    # raw modes of files with 16 bits per channel, of which Pillow keeps 8; in a BMP the 16 bits are for three channels
    raw = [
        str(part)
        for tile in getattr(image, "tile", ())
        for part in (tile[3] if isinstance(tile[3], tuple) else (tile[3],))
    ]
    deep = next((part for part in raw if re.match(r"(?!BGR).*;1[26]", part)), None)
    if deep or image.mode not in GREY | COLOURED:
        got = image.mode if image.mode not in GREY | COLOURED else deep
        raise UnusableFileError(
            f"Expected {path} to have 8 bits per channel, grey or in colour, got mode {got}: convert it first."
        )


def _draft(image: ImageFile.ImageFile, size: tuple[int, int]) -> None:
    # twice the requested size, for the interpolation that follows; landscape or portrait is not known yet
    scale = 2 * max(size) / min(image.size)
    image.draft(None, (math.ceil(scale * image.size[0]), math.ceil(scale * image.size[1])))


def _seen(
    image: ImageFile.ImageFile, path: Path | Content, mode: str | None, size: tuple[int, int] | None
) -> npt.NDArray[np.uint8]:
    ImageOps.exif_transpose(image, in_place=True)
    seen: Image.Image = image
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        if seen.getchannel("A").getextrema() != (255, 255):
            name = path.name if isinstance(path, Path) else "image.png"
            raise UnusableFileError(
                f"Expected {path} to be opaque, got transparent pixels: put it on a background first, for example by "
                f"`magick {name} -background white -flatten {name}`."
            )
    if mode is not None and seen.mode != mode:
        seen = seen.convert(mode)
    if size is not None and size != seen.size[::-1]:
        (height, width), scale = size, min(seen.size[0] / size[1], seen.size[1] / size[0])
        left, top = (seen.size[0] - scale * width) / 2, (seen.size[1] - scale * height) / 2
        box = (
            max(left, 0),
            max(top, 0),
            min(left + scale * width, seen.size[0]),
            min(top + scale * height, seen.size[1]),
        )
        seen = seen.resize((width, height), Image.Resampling.BILINEAR, box)
    return np.asarray(seen)
