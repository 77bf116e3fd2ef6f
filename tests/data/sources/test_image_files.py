"""Image folders: what is read, what is passed over, and what is refused, by the name of its file."""

import io
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from fedamm_pl.data.sources import load_images, read_image_folder


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
    with pytest.raises(ValueError, match=rf"one size, 4 x 5 as first\.png, got 6 x 5 for .*{bad}: resize them first"):
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
    expected = rf"Expected .*{part}/a/1\.png to be a PNG, .* \(it is no regular file\)\.$"
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir):
        make(path)
        with pytest.raises(ValueError, match=expected):
            read_image_folder(folder)
        path.rmdir() if path.is_dir() else path.unlink()


def test_link_to_an_image_is_followed(folder: Path) -> None:
    (folder / "train/a/1.png").symlink_to(folder / "test/a/0.png")
    assert len(read_image_folder(folder).train_images) == 2
