"""Image folders: what is read, what is passed over, and what is refused, by the name of its file."""

import io
import logging
import os
import socket
import struct
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, PngImagePlugin

from fedamm_pl.data.sources import decoded, load_images, read_image_folder, reading

HIDDEN_FOLDERS = (".ipynb_checkpoints", "__MACOSX", "@eaDir", ".git", "System Volume Information")
HIDDEN_FILES = ("._0.png", ".DS_Store", "Thumbs.db", "desktop.ini", "THUMBS.DB")


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


def save_images(folder: Path, images: dict[str, np.ndarray]) -> Path:
    for name, values in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(folder / name)
    return folder


def test_grey_image_folder_stays_grey(tmp_path: Path) -> None:
    cat, dog, test = pixels(5, 4), pixels(4, 5).T.copy(), pixels(1, 5, 4)[0]
    save_images(
        tmp_path, {"train/dog/0.png": dog, "train/cat/1.png": cat, "train/cat/0.png": dog, "test/dog/0.png": test}
    )
    images = load_images("image_folder", tmp_path)
    assert images.class_names == ["cat", "dog"]
    assert images.train_labels.tolist() == [0, 0, 1]
    assert images.test_labels.tolist() == [1]
    assert np.array_equal(images.train_images, np.stack([dog, cat, dog])[:, None])
    assert np.array_equal(images.test_images, test[None, None])


def test_folder_with_any_colour_image_becomes_rgb(tmp_path: Path) -> None:
    grey, colour = pixels(5, 4), pixels(5, 4, 3)
    save_images(tmp_path / "mine", {"train/a/0.png": grey, "train/b/0.png": colour, "test/a/0.png": grey})
    images = load_images("mine", tmp_path)
    assert np.array_equal(images.train_images[0], np.stack([grey] * 3))
    assert np.array_equal(images.train_images[1], colour.transpose(2, 0, 1))
    assert np.array_equal(images.test_images[0], np.stack([grey] * 3))


@pytest.mark.parametrize("suffix", ["png", "PNG", "bmp", "tif", "jpg", "jpeg", "gif", "webp"])
def test_image_folder_takes_the_usual_formats(tmp_path: Path, suffix: str) -> None:
    flat = np.full((5, 4, 3), 128, dtype=np.uint8)
    save_images(tmp_path, {f"train/a/0.{suffix}": flat, f"test/a/0.{suffix}": flat})
    images = read_image_folder(tmp_path)
    assert images.train_images.shape == (1, 3, 5, 4)
    assert (images.train_images.int() - 128).abs().max() <= 2  # some formats lose a little


def test_other_files_in_an_image_folder_are_passed_over(tmp_path: Path) -> None:
    save_images(tmp_path, {"train/a/0.png": pixels(5, 4), "test/a/0.png": pixels(5, 4)})
    for name in ("train/labels.csv", "train/a/Thumbs.db", "test/.hidden", "test/readme.txt", "test/a/notes.txt"):
        (tmp_path / name).write_text("no image")
    assert len(read_image_folder(tmp_path).train_images) == len(read_image_folder(tmp_path).test_images) == 1


def test_hidden_and_system_folders_are_nobodys_class(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [f"{part}/{name}/0.png" for part in ("train", "test") for name in ("a", "b", *HIDDEN_FOLDERS)]
    save_images(tmp_path, dict.fromkeys(names, pixels(5, 4)))
    (tmp_path / "train/.empty").mkdir()
    (tmp_path / "__MACOSX").mkdir()
    for name in HIDDEN_FILES:
        (tmp_path / "train/a" / name).write_bytes(b"no image")
        (tmp_path / "train" / name).write_bytes(b"no image")
    with caplog.at_level(logging.INFO):
        images = read_image_folder(tmp_path)
    assert images.class_names == ["a", "b"]
    assert (len(images.train_images), len(images.test_images)) == (2, 2)
    (record,) = caplog.records
    count = 2 * len(HIDDEN_FOLDERS) + 2 * len(HIDDEN_FILES) + 2
    assert record.levelno == logging.INFO
    assert f"{tmp_path}: hidden or system names, not used: {count} (train/" in record.getMessage()


def test_what_is_left_out_is_counted_and_named_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    inside = ["train/a/0.png", "test/a/0.png"]
    outside = ["train/loose.png", "test/loose.png", "train/a/more/0.png", "old/a/0.png"]
    save_images(tmp_path, dict.fromkeys(inside + outside, pixels(5, 4)))
    for name in ("0.npy", "1.npy", "2.npy", "3.npy"):
        (tmp_path / "train/a" / name).write_bytes(b"no image")
    first, second = (Image.fromarray(pixels(5, 4)) for _ in range(2))
    first.save(tmp_path / "train/a/moving.gif", save_all=True, append_images=[second.rotate(180)])
    images = read_image_folder(tmp_path)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert len(record.getMessage().splitlines()) == 1
    for part in (
        "files outside the class folders, not used: 2 (train/loose.png, test/loose.png)",
        "files without the suffix of an image, not used: 4 (train/a/0.npy, train/a/1.npy, train/a/2.npy, ...)",
        "folders inside class folders, not used: 1 (train/a/more)",
        "folders beside train and test, not used: 1 (old)",
        "files with further frames or pages, the first used: 1 (train/a/moving.gif)",
    ):
        assert part in record.getMessage()
    assert len(images.train_images) == 2
    assert np.array_equal(images.train_images[1, 0], images.train_images[0, 0])  # the first frame


def test_whole_folder_is_read_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_images(tmp_path, {"train/a/0.png": pixels(5, 4), "test/a/0.png": pixels(5, 4)})
    with caplog.at_level(logging.DEBUG, "fedamm_pl"):
        read_image_folder(tmp_path)
    assert caplog.messages == []


@pytest.mark.parametrize("suffix", ["tif", "webp", "png"])
def test_further_pages_are_said(tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture) -> None:
    save_images(tmp_path, {"test/a/0.png": pixels(5, 4, 3)})
    (tmp_path / "train/a").mkdir(parents=True)
    first, second = Image.fromarray(pixels(5, 4, 3)), Image.fromarray(255 - pixels(5, 4, 3))
    options = {"lossless": True} if suffix == "webp" else {}
    first.save(tmp_path / f"train/a/0.{suffix}", save_all=True, append_images=[second], **options)
    images = read_image_folder(tmp_path)
    assert "files with further frames or pages, the first used: 1 " in caplog.text
    assert np.array_equal(images.train_images[0], pixels(5, 4, 3).transpose(2, 0, 1))


def test_npz_file_goes_before_a_folder_of_the_same_name_which_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_images(tmp_path / "mine", {"train/a/0.png": pixels(5, 4), "test/a/0.png": pixels(5, 4)})
    np.savez(tmp_path / "mine.npz", x_train=pixels(2, 5, 4), y_train=[0, 1], x_test=pixels(1, 5, 4), y_test=[0])
    assert len(load_images("mine", tmp_path).train_images) == 2
    assert caplog.messages == [f"{tmp_path / 'mine.npz'} is read; the folder {tmp_path / 'mine'} is not"]


def test_class_folder_without_images_is_refused_by_name(tmp_path: Path) -> None:
    save_images(tmp_path, {"train/a/0.png": pixels(5, 4), "test/a/0.png": pixels(5, 4)})
    (tmp_path / "train/b").mkdir()
    with pytest.raises(ValueError, match=r"train/b to hold images, got none: leave the class out"):
        read_image_folder(tmp_path)


@pytest.mark.parametrize("name", ["two\nlines", "bell\a", "\udcff", "\u202egnp", " "])
def test_class_whose_name_cannot_be_printed_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    save_images(tmp_path, {"train/a/0.png": pixels(5, 4), "test/a/0.png": pixels(5, 4)})
    (tmp_path / "train" / name).mkdir()
    with pytest.raises(
        ValueError, match=r"^Expected class_names in .* without line breaks and control .*, got '[ -~]*'\.$"
    ):
        read_image_folder(tmp_path)


def test_file_with_a_line_break_in_its_name_is_named_in_one_line(tmp_path: Path) -> None:
    save_images(tmp_path, {"train/a/0.png": pixels(5, 4), "test/a/0.png": pixels(5, 4)})
    (tmp_path / "train/a/two\nlines.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"^Expected .*train/a/two\\nlines\.png to be a PNG, [^\n]*$"):
        read_image_folder(tmp_path)


# Upright, opaque, eight bits

ORIENTATIONS = {  # EXIF orientation -> what a viewer does to the stored pixels
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: stored.swapaxes(0, 1)[:, ::-1],
    7: lambda stored: stored.swapaxes(0, 1)[::-1, ::-1],
    8: lambda stored: stored.swapaxes(0, 1)[::-1],
}


def save_turned(path: Path, stored: np.ndarray, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = (
        {"lossless": True}
        if path.suffix == ".webp"
        else {"quality": 100, "subsampling": 0}
        if path.suffix == ".jpg"
        else {}
    )
    Image.fromarray(stored).save(path, exif=exif, **options)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("part", ["train", "test"])
def test_image_is_turned_as_it_is_seen(tmp_path: Path, suffix: str, orientation: int, part: str) -> None:
    steps = np.linspace(0, 224, 6 * 4, dtype=np.uint8).reshape(6, 4)
    stored = np.stack([steps, steps, 255 - steps], axis=2)
    seen = ORIENTATIONS[orientation](stored)
    save_images(tmp_path, {"train/a/0.png": seen.copy(), "test/a/0.png": seen.copy()})
    save_turned(tmp_path / part / f"a/1.{suffix}", stored, orientation)
    data = read_image_folder(tmp_path)
    images = data.train_images if part == "train" else data.test_images
    difference = (images[1].int() - torch.from_numpy(seen.transpose(2, 0, 1).copy()).int()).abs().max()
    assert difference <= (4 if suffix == "jpg" else 0)


def test_sizes_are_compared_upright(tmp_path: Path) -> None:
    save_images(tmp_path, {"train/a/0.png": pixels(5, 4, 3), "test/a/0.png": pixels(5, 4, 3)})
    save_turned(tmp_path / "train/a/1.png", pixels(5, 4, 3), 6)
    with pytest.raises(
        ValueError, match=r"one size, 4 x 5 like 0\.png, got 5 x 4 for .*1\.png: --data\.image_size brings them to one"
    ):
        read_image_folder(tmp_path)


def with_alpha(mode: str, alpha: np.ndarray) -> Image.Image:
    """A grey or coloured image of this mode with this alpha."""
    image = Image.new(mode, alpha.shape[::-1])
    image.putalpha(Image.fromarray(alpha))
    return image


OPAQUE, HOLE = np.full((5, 4), 255, dtype=np.uint8), np.full((5, 4), 255, dtype=np.uint8)
HOLE[2, 1] = 254
TRANSPARENT = r"Expected .*{0} to be opaque, got transparent pixels: put it on a background first, .* `magick [^\n]*$"


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize(("mode", "suffix"), [("RGBA", "png"), ("LA", "png"), ("RGBA", "webp"), ("RGBA", "tif")])
def test_alpha_is_dropped_where_it_is_opaque_and_refused_where_not(
    tmp_path: Path, mode: str, suffix: str, part: str
) -> None:
    save_images(tmp_path, dict.fromkeys(["train/a/0.png", "test/a/0.png"], pixels(5, 4)))
    path = tmp_path / part / f"a/1.{suffix}"
    with_alpha(mode, OPAQUE).save(path, lossless=True)
    data = read_image_folder(tmp_path)
    assert data.train_images.shape[1] == (1 if mode == "LA" else 3)
    assert (data.train_images if part == "train" else data.test_images)[1].max() == 0
    with_alpha(mode, HOLE).save(path, lossless=True)
    with pytest.raises(ValueError, match=TRANSPARENT.format(rf"{part}/a/1\.{suffix}")):
        read_image_folder(tmp_path)


@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_one_transparent_colour_is_refused_where_a_pixel_has_it(folder: Path, mode: str) -> None:
    path, image = folder / "train/a/0.png", Image.new(mode, (16, 16), 0)
    for colour, used in ((9, False), (0, True)):
        image.save(path, transparency=(colour,) * 3 if mode == "RGB" else colour)
        if used:
            with pytest.raises(ValueError, match=TRANSPARENT.format(r"0\.png")):
                read_image_folder(folder)
        else:
            assert read_image_folder(folder).train_images.max() == 0


def test_palette_with_a_transparency_for_each_colour(folder: Path) -> None:
    path, image = folder / "train/a/0.png", Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(path, transparency=bytes([0, 255]))  # the colour that no pixel has
    assert read_image_folder(folder).train_images[0, :, 0, 0].tolist() == [10, 20, 30]
    image.save(path, transparency=bytes([255, 128]))
    with pytest.raises(ValueError, match=TRANSPARENT.format(r"0\.png")):
        read_image_folder(folder)


def test_gif_with_a_hole_is_refused(folder: Path) -> None:
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(folder / "test/a/1.gif", transparency=1)
    with pytest.raises(ValueError, match=TRANSPARENT.format(r"1\.gif")):
        read_image_folder(folder)


def test_coloured_test_image_keeps_its_colours_beside_grey_training_images(tmp_path: Path) -> None:
    grey, colour = pixels(5, 4), pixels(5, 4, 3)
    save_images(tmp_path, {"train/a/0.png": grey, "test/a/0.png": colour})
    images = read_image_folder(tmp_path)
    assert np.array_equal(images.train_images[0], np.stack([grey] * 3))
    assert np.array_equal(images.test_images[0], colour.transpose(2, 0, 1))


def test_cmyk_is_converted_by_the_plain_formula(folder: Path) -> None:
    inks = [(0, 0, 0, 0), (0, 0, 0, 255), (255, 0, 0, 0), (0, 255, 255, 0), (0, 0, 0, 128)]
    seen = [(255, 255, 255), (0, 0, 0), (0, 255, 255), (255, 0, 0), (127, 127, 127)]
    for suffix, error in (("jpg", 2), ("tif", 0)):
        for ink, colour in zip(inks, seen, strict=True):
            Image.new("CMYK", (16, 16), ink).save(folder / f"train/a/1.{suffix}", quality=100)
            got = read_image_folder(folder).train_images[1, :, 8, 8]
            assert (got.int() - torch.tensor(colour)).abs().max() <= error
        (folder / f"train/a/1.{suffix}").unlink()


def test_one_bit_is_black_and_white(folder: Path) -> None:
    board = np.indices((16, 16)).sum(0) % 2
    for part in ("train", "test"):
        Image.fromarray(board.astype(bool)).save(folder / part / "a/0.png")
    assert np.array_equal(read_image_folder(folder).train_images[0, 0], 255 * board)


def deep_png(colour_type: int, channels: int) -> bytes:
    """A PNG with 16 bits a channel, which Pillow cannot write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = zlib.compress(b"".join(b"\0" + bytes(range(1, 2 * 16 * channels + 1)) for _ in range(16)))
    header = struct.pack(">IIBBBBB", 16, 16, 16, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_of_any_colour_are_refused_rather_than_halved(
    folder: Path, part: str, colour_type: int, channels: int
) -> None:
    (folder / part / "a/1.png").write_bytes(deep_png(colour_type, channels))
    with pytest.raises(
        ValueError, match=r"1\.png to have 8 bits per channel, grey or in colour, got mode .*: convert it first"
    ):
        read_image_folder(folder)


@pytest.mark.parametrize("mode", ["F", "I", "LAB"])
def test_other_kinds_of_pixels_are_refused(folder: Path, mode: str) -> None:
    Image.new(mode, (16, 16)).save(folder / "train/a/0.tif")
    with pytest.raises(ValueError, match=rf"0\.tif to have 8 bits per channel, grey or in colour, got mode {mode}"):
        read_image_folder(folder)


# Memory


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header says that it is so large; nothing follows."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + content + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


@pytest.mark.parametrize("name", ["0.png", "1.png"])
def test_picture_is_compared_with_the_memory_before_it_is_decoded(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "available_memory", lambda: 10**9)
    for part in ("train", "test"):
        (folder / part / "a" / name).write_bytes(png_of(13_000, 13_000))
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("it was decoded"))
    expected = r"13000 x 13000 pixels to fit into memory, got 2\.7 GB needed and 1\.0 GB available|one size, 16 x 16"
    with pytest.raises(ValueError, match=expected):
        read_image_folder(folder)


def test_sum_of_all_images_is_compared_with_the_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoded, "num_threads", lambda: 1)
    monkeypatch.setattr(reading, "available_memory", lambda: 16 * 16 * 16 + 3 * 16 * 16 * 2)
    read_image_folder(folder)
    (folder / "train/a/1.png").write_bytes((folder / "train/a/0.png").read_bytes())
    with pytest.raises(
        ValueError, match=r"Expected 3 images of 16 x 16 pixels in .* to fit into memory, got 0\.0 MB needed"
    ):
        read_image_folder(folder)


def test_memory_that_runs_out_is_called_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "load", fails)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fails)
    with pytest.raises(
        ValueError, match=r"^Expected .*0\.png to fit into memory, got more needed than the .* available\.$"
    ):
        read_image_folder(folder)


# Links


def test_class_missing_from_the_test_folder_keeps_its_label(tmp_path: Path) -> None:
    save_images(tmp_path, {"train/a/0.png": pixels(5, 4), "train/b/0.png": pixels(5, 4), "test/b/0.png": pixels(5, 4)})
    assert read_image_folder(tmp_path).test_labels.tolist() == [1]


def test_class_of_the_test_folder_alone_is_refused(tmp_path: Path) -> None:
    save_images(tmp_path, {"train/a/0.png": pixels(5, 4), "test/a/0.png": pixels(5, 4), "test/z/0.png": pixels(5, 4)})
    with pytest.raises(ValueError, match=r"Expected classes of .*test to be in .*train too, got \['z'\]"):
        read_image_folder(tmp_path)


def test_train_folder_without_classes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="train to hold one folder of images for each class, got none"):
        read_image_folder(tmp_path)


def test_folder_without_test_images_is_refused(tmp_path: Path) -> None:
    save_images(tmp_path, {"train/a/0.png": pixels(5, 4)})
    with pytest.raises(ValueError, match=r"test to hold images as <class>/\*\.png, got none"):
        read_image_folder(tmp_path)


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("damage", ["text", "empty", "truncated"])
def test_undecodable_image_is_named(tmp_path: Path, part: str, damage: str) -> None:
    names = [f"{part}/a/0.png" for part in ("train", "test")] + [f"{part}/a/1.png" for part in ("train", "test")]
    save_images(tmp_path, dict.fromkeys(names, pixels(32, 32)))
    bad = tmp_path / part / "a" / "1.png"
    content = bad.read_bytes()
    bad.write_bytes({"text": b"no image", "empty": b"", "truncated": content[: len(content) // 2]}[damage])
    with pytest.raises(
        ValueError, match=rf"{part}/a/1\.png to be a PNG, .* or TIFF image, got a file that cannot be decoded"
    ):
        read_image_folder(tmp_path)


@pytest.mark.parametrize("part", ["train", "test"])
def test_image_of_another_size_is_named(tmp_path: Path, part: str) -> None:
    names = ["train/a/first.png", "train/a/second.png", "test/a/third.png", "test/a/fourth.png"]
    save_images(tmp_path, dict.fromkeys(names, pixels(5, 4)))
    bad = "train/a/second.png" if part == "train" else "test/a/fourth.png"
    save_images(tmp_path, {bad: pixels(5, 6)})
    with pytest.raises(ValueError, match=rf"one size, 4 x 5 like first\.png, got 6 x 5 for .*{bad}"):
        read_image_folder(tmp_path)


def test_sixteen_bit_image_is_refused_rather_than_clipped(tmp_path: Path) -> None:
    deep = pixels(5, 4).astype(np.uint16) * 257
    save_images(tmp_path, {"train/a/deep.png": deep, "test/a/0.png": deep})
    with pytest.raises(ValueError, match=r"deep\.png"):
        read_image_folder(tmp_path)


# A file is what its content says, and nothing but the formats that are named


def encoded(image_format: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), 128, dtype=np.uint8)).save(file, image_format)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image folder of one training and one test image."""
    return save_images(tmp_path / "images", dict.fromkeys(("train/a/0.png", "test/a/0.png"), pixels(16, 16, 3)))


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("image_format", ["ICO", "PPM", "PCX", "TGA", "EPS", "PDF"])
def test_other_format_under_the_suffix_of_a_known_one_is_refused(folder: Path, part: str, image_format: str) -> None:
    (folder / part / "a/1.png").write_bytes(encoded(image_format))
    expected = rf"Expected .*{part}/a/1\.png to be a PNG, JPEG, WebP, BMP, GIF or TIFF image, got [^\n]*$"
    with pytest.raises(ValueError, match=expected):
        read_image_folder(folder)


@pytest.mark.parametrize("image_format", ["JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_content_counts_not_the_suffix(folder: Path, image_format: str) -> None:
    (folder / "train/a/0.png").write_bytes(encoded(image_format))
    images = read_image_folder(folder).train_images
    assert (images.int() - 128).abs().max() <= 2  # some formats lose a little


@pytest.mark.parametrize("part", ["train", "test"])
def test_no_program_is_started_to_read_an_image(folder: Path, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mark, programs, path = folder / "started", folder / "bin", folder / part / "a/1.png"
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {mark}\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # looked for anew
    path.write_bytes(encoded("EPS"))
    with pytest.raises(ValueError, match=r"a/1\.png to be a PNG"):
        read_image_folder(folder)
    assert not mark.exists()
    with Image.open(path) as image, suppress(OSError):  # the file that it was to make is missing
        image.load()
    assert mark.exists()  # the trap works


@pytest.mark.parametrize("part", ["train", "test"])
def test_pipe_or_device_named_as_an_image_is_refused_and_not_waited_for(folder: Path, part: str) -> None:
    path = folder / part / "a/1.png"
    expected = rf"Expected .*{part}/a/1\.png to be a PNG, .* \(it is not a regular file\)\.$"
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir):
        make(path)
        with pytest.raises(ValueError, match=expected):
            read_image_folder(folder)
        path.rmdir() if path.is_dir() else path.unlink()


def test_link_to_an_image_is_followed_and_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "train/a/1.png").symlink_to(folder / "test/a/0.png")
    with caplog.at_level(logging.INFO):
        assert len(read_image_folder(folder).train_images) == 2
    said = "links to places in this folder, followed, so that images may be there twice: 1 (train/a/1.png)"
    assert caplog.messages == [f"{folder}: {said}"]


def test_link_out_of_the_folder_is_followed_and_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    elsewhere = save_images(folder.parent / "elsewhere", {"0.png": pixels(16, 16, 3)})
    (folder / "train/a/1.png").symlink_to(elsewhere / "0.png")
    (folder / "train/b").symlink_to(elsewhere)
    with caplog.at_level(logging.INFO):
        assert read_image_folder(folder).train_labels.tolist() == [0, 0, 1]
    assert caplog.messages == [f"{folder}: links to other places, followed: 2 (train/b, train/a/1.png)"]


@pytest.mark.parametrize("place", ["train/b", "test/b", "train/a/1.png", "train/a/notes.txt"])
@pytest.mark.parametrize("target", ["nowhere", "itself"])
def test_link_that_leads_nowhere_is_refused(folder: Path, place: str, target: str) -> None:
    (folder / place).symlink_to(folder / place if target == "itself" else folder / "nowhere")
    with pytest.raises(ValueError, match=rf"Expected .*{place} to be a file or folder, got a broken link\.$"):
        read_image_folder(folder)


@pytest.mark.parametrize("target", ["nowhere", "old"])
def test_link_beside_train_and_test_is_nobodys_business(
    folder: Path, target: str, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "old").symlink_to(folder / target)
    read_image_folder(folder)
    assert caplog.messages == []


def test_class_folder_that_holds_itself_is_not_gone_down(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "train/a/deeper").symlink_to(folder / "train/a")
    assert len(read_image_folder(folder).train_images) == 1
    assert "folders inside class folders, not used: 1 (train/a/deeper)" in caplog.text


def test_folder_that_cannot_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def refusing(path: Path) -> object:
        if Path(path).name == "a":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(ValueError, match=r"train/a to be a folder that can be read, got Permission denied\.$"):
        read_image_folder(folder)


def test_socket_named_as_an_image_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder / "train/a")  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("1.png")
        with pytest.raises(ValueError, match=r"train/a/1\.png to be a PNG, .* \(it is not a regular file\)\.$"):
            read_image_folder(folder)
