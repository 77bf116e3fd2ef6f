"""What an image file may be but should not, where images are decoded when they are needed and brought to a size."""

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedamm_pl.data.sources import ReadOptions, decoded, decoding, read_image_folder, reading
from tests.data.sources.test_image_files import (
    HOLE,
    TRANSPARENT,
    deep_png,
    encoded,
    pixels,
    png_of,
    save_images,
    with_alpha,
)

WAYS = [ReadOptions(in_memory=False), ReadOptions(in_memory=False, image_size=8), ReadOptions(image_size=8)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image folder of one training and one test image."""
    return save_images(tmp_path / "images", dict.fromkeys(("train/a/0.png", "test/a/0.png"), pixels(16, 16, 3)))


def link_to_zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


def named(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


NO_IMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, r"\(it is not a regular file\)"),
    "device": (link_to_zero, r"\(it is not a regular file\)"),
    "folder": (Path.mkdir, r"\(it is not a regular file\)"),
    "empty": (named(b""), r"\(none of these formats\)"),
    "text": (named(b"no image"), r"\(none of these formats\)"),
    "EPS": (named(encoded("EPS")), r"\(none of these formats\)"),
    "ICO": (named(encoded("ICO")), r"\(none of these formats\)"),
    "half a header": (named(encoded("PNG")[:20]), r"\("),
    "more pixels than are taken": (named(png_of(60_000, 60_000)), r"\(60000 x 60000 pixels, at most \d+ are taken\)"),
}


@pytest.mark.parametrize("options", WAYS)
@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("kind", NO_IMAGES)
def test_no_image_is_refused_before_anything_is_decoded(
    folder: Path, part: str, kind: str, options: ReadOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, reason = NO_IMAGES[kind]
    make(folder / part / "a/1.png")
    monkeypatch.setattr(decoded.DecodedImages, "_decode", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match=rf"^Expected .*{part}/a/1\.png to be a PNG, [^\n]*{reason}[^\n]*\.$"):
        read_image_folder(folder, options)


@pytest.mark.parametrize("options", WAYS)
def test_sixteen_bits_are_refused_before_anything_is_decoded(
    folder: Path, options: ReadOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "test/a/1.png").write_bytes(deep_png(2, 3))
    monkeypatch.setattr(decoded.DecodedImages, "_decode", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match=r"1\.png to have 8 bits per channel, grey or in colour, got mode "):
        read_image_folder(folder, options)


@pytest.mark.parametrize("options", WAYS)
def test_transparent_pixels_are_refused_when_they_are_seen(folder: Path, options: ReadOptions) -> None:
    alpha = np.pad(HOLE, ((0, 11), (0, 12)), constant_values=255)
    with_alpha("RGBA", np.full_like(alpha, 255)).save(folder / "train/a/1.png")
    assert len(read_image_folder(folder, options).train_images[:]) == 2
    with_alpha("RGBA", alpha).save(folder / "train/a/1.png")
    with pytest.raises(ValueError, match=TRANSPARENT.format(r"train/a/1\.png")):
        read_image_folder(folder, options).train_images[:]


@pytest.mark.parametrize("options", WAYS)
def test_large_picture_is_compared_with_the_memory_before_it_is_decoded(
    folder: Path, options: ReadOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "available_memory", lambda: 10**9)
    for part in ("train", "test"):
        for name in ("0.png", "1.png"):
            (folder / part / "a" / name).write_bytes(png_of(13_000, 13_000))
    monkeypatch.setattr(decoding, "_seen", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match=r"pixels.* to fit into memory, got \d\.\d GB needed and 1\.0 GB available\.$"):
        read_image_folder(folder, options)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("options", WAYS[1:])
def test_large_picture_that_fits_is_read_without_a_warning(
    folder: Path, options: ReadOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16 * 16 - 1)  # Image.open would warn of more
    assert read_image_folder(folder, options).train_images[:].shape == (1, 3, 8, 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16 * 16 // 2 - 1)
    with pytest.raises(ValueError, match=r"0\.png to be .* \(16 x 16 pixels, at most 254 are taken\)"):
        read_image_folder(folder, options)


@pytest.mark.parametrize("options", WAYS)
def test_pixels_that_unpack_to_more_than_the_header_says_are_not_kept(folder: Path, options: ReadOptions) -> None:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 8, 0, 0, 0, 0))
    bomb = chunk(b"IDAT", zlib.compress(bytes(2**24), 9)) + chunk(b"IEND", b"")
    (folder / "train/a/1.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + bomb)
    assert read_image_folder(folder, options).train_images[:][1].max() == 0


@pytest.mark.parametrize("options", WAYS)
def test_link_out_of_the_folder_is_followed_and_said(
    folder: Path, options: ReadOptions, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = save_images(folder.parent / "elsewhere", {"0.png": pixels(16, 16, 3)})
    (folder / "train/a/1.png").symlink_to(elsewhere / "0.png")
    with caplog.at_level("INFO"):
        assert len(read_image_folder(folder, options).train_images[:]) == 2
    assert f"{folder}: links to other places, followed: 1 (train/a/1.png)" in caplog.messages
