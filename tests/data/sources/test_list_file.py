"""List files: a path and a label in each line, as ImageNet-LT, Places-LT and iNaturalist are published."""

import logging
import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedamm_pl.data import FederatedDataModule
from fedamm_pl.data.sources import ImageData, ReadOptions, list_file, load_images
from fedamm_pl.data.sources.image_files import ImageFiles

LAZY = ReadOptions(in_memory=False)


def save(root: Path, names: list[str]) -> dict[str, int]:
    """Save an image of one grey level of its own under each name; return the levels."""
    levels = {name: i for i, name in enumerate(names)}
    for name, level in levels.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2), level).save(root / name)
    return levels


def levels_of(data: ImageData, part: str) -> list[int]:
    return [int(image.max()) for image in data.parts[part][0][:]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of 12 images, a to l."""
    save(tmp_path, [f"images/{letter}.png" for letter in "abcdefghijkl"])
    return tmp_path


def write(root: Path, name: str, *lines: str) -> None:
    (root / name).write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("options", [None, LAZY])
@pytest.mark.parametrize(
    ("train", "test", "val"),
    [
        ("train.txt", "test.txt", "val.txt"),
        ("ImageNet_LT_train.txt", "ImageNet_LT_test.txt", "ImageNet_LT_val.txt"),
        ("lists/Training.TXT", "lists/Testing.TXT", "lists/Validation.TXT"),
        ("TRAIN_split.txt", "TEST_split.txt", "VAL_split.txt"),
    ],
)
def test_lists_of_the_other_parts_lie_beside(
    root: Path, train: str, test: str, val: str, options: ReadOptions | None, caplog: pytest.LogCaptureFixture
) -> None:
    (root / "lists").mkdir()
    write(root, train, "images/c.png 1", "images/a.png 0", "images/b.png 1")
    write(root, test, "images/e.png 0", "images/d.png 1")
    write(root, val, "images/f.png 1")
    with caplog.at_level(logging.INFO):
        data = load_images(train, root, options)
    assert (levels_of(data, "train"), data.train_labels.tolist()) == ([2, 0, 1], [1, 0, 1])
    assert (levels_of(data, "test"), data.test_labels.tolist()) == ([4, 3], [0, 1])
    assert data.val_labels is not None
    assert (levels_of(data, "val"), data.val_labels.tolist()) == ([5], [1])
    assert isinstance(data.train_images, ImageFiles) == (options is LAZY)
    names = [Path(name).name for name in (train, val, test)]
    assert (
        f"{root / train}: 2 classes, 3 images in {names[0]}, 1 images in {names[1]}, 2 images in {names[2]}"
        in caplog.messages
    )


def test_strained_is_no_training_list(root: Path) -> None:
    write(root, "strained.txt", *(f"images/{letter}.png x" for letter in "abcde"))
    write(root, "stested.txt", "images/a.png x")
    assert len(load_images("strained.txt", root).test_labels) == 1


def test_without_test_list_a_share_is_held_out(root: Path) -> None:
    write(root, "all.txt", *(f"images/{letter}.png {letter in 'abc'}" for letter in "abcdefghijkl"))
    data = load_images("all.txt", root, ReadOptions(test_fraction=1 / 3))
    assert data.class_names == ["False", "True"]
    assert data.train_labels.bincount().tolist() == [6, 2]
    assert data.test_labels.bincount().tolist() == [3, 1]


@pytest.mark.parametrize(
    "name", ["two words.png", "tab\tname.png", "ünï.png", "#no comment.png", "a 3.png", "x.txt 4.png"]
)
def test_path_may_have_spaces_and_the_label_is_the_last_field(root: Path, name: str) -> None:
    save(root, [f"in here/{name}"])
    write(root, "train.txt", "images/a.png 1", f"  in here/{name}\t 7 ", "images/b.png 1")
    if "\t" in name:
        with pytest.raises(
            ValueError, match=r"Expected line 2 of .* without control characters, got 'in here/tab\\tname"
        ):
            load_images("train.txt", root)
        return
    data = load_images("train.txt", root)
    assert data.class_names == ["1", "7"]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["5", "3", "10"], ["3", "5", "10"]),
        (["-1", "0", "1"], ["-1", "0", "1"]),
        (["n02", "n01", "x"], ["n01", "n02", "x"]),
        (["007", "7", "8"], ["007", "7", "8"]),
    ],
)
def test_labels_are_numbers_from_anywhere_or_names(root: Path, labels: list[str], names: list[str]) -> None:
    write(root, "train.txt", *(f"images/{letter}.png {label}" for letter, label in zip("abc", labels, strict=True)))
    write(root, "test.txt", f"images/d.png {labels[0]}")
    data = load_images("train.txt", root)
    assert data.class_names == names
    assert [names[label] for label in data.train_labels.tolist()] == labels
    assert names[int(data.test_labels)] == labels[0]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_blank_lines_comments_marks_and_line_ends(
    root: Path, encoding: str, end: str, caplog: pytest.LogCaptureFixture
) -> None:
    lines = ["# path label", "", "images/a.png 0", "   ", "#images/b.png 0", "./images//c.png 1", "images/x/../d.png 1"]
    (root / "train.txt").write_bytes((end.join(lines) + end).encode(encoding))
    write(root, "test.txt", "images/e.png 0")
    with caplog.at_level(logging.INFO):
        data = load_images("train.txt", root)
    assert levels_of(data, "train") == [0, 2, 3]
    assert f"{root / 'train.txt'}: lines that begin with #, not used: 2" in caplog.messages


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("/etc/passwd 0", "to begin with a path below the root"),
        ("../up.png 0", "to begin with a path below the root"),
        ("images/../../up.png 0", "to begin with a path below the root"),
        ("images\\a.png 0", "to begin with a path below the root, with /"),
        ("images/\x00a.png 0", "without control characters"),
        ("images/\u202ea.png 0", "without control characters"),
        ("a.png 0\rb.png 0", "without control characters"),
        ("images/b.png", "the path of an image, a space and its label"),
        ("images/b.png,0", "the path of an image, a space and its label"),
        ("0 images/b.png", "the path of an image, a space and its label"),
    ],
)
def test_odd_line_is_refused_by_its_number(root: Path, line: str, expected: str) -> None:
    write(root, "train.txt", "images/a.png 0", "", line)
    with pytest.raises(ValueError, match=rf"^Expected line 3 of {root}/train\.txt to be(gin)? [^\n\u202e]*$") as caught:
        load_images("train.txt", root)
    assert expected in str(caught.value)


@pytest.mark.parametrize("second", ["images/a.png 1", "./images//a.png 0"])
@pytest.mark.parametrize("name", ["train.txt", "test.txt", "val.txt"])
def test_image_is_listed_once(root: Path, name: str, second: str) -> None:
    write(root, "train.txt", "# first", "images/a.png 0", "images/b.png 0", *([second] if name == "train.txt" else []))
    if name != "train.txt":
        write(root, name, "images/c.png 0", "", second)
    line = 4 if name == "train.txt" else 3
    with pytest.raises(
        ValueError, match=rf"once, got 'images/a\.png' in line 2 of .*/train\.txt and in line {line} of .*/{name}\.$"
    ):
        load_images("train.txt", root)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", r"to list images, got none"),
        (b"# nothing\n\n", r"to list images, got none"),
        (b"images/a.png 0\n\xff\xfe 1\n", r"to be UTF-8 text, got other bytes in line 2"),
        ("images/a.png 0\n".encode("utf-16"), r"cannot be read \(it is UTF-16\)"),
        (b"images/gone.png 0\n", r"to be those of files below .*, got no .*/images/gone\.png \(line 1\)"),
        (b"images/a.png 0\nimages/gone.png 0\n", r"images/gone\.png to be a PNG, .* got no such file"),
    ],
)
def test_unusable_list_is_refused_in_one_line(root: Path, content: bytes, expected: str) -> None:
    (root / "train.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^Expected [^\n]*{expected}[^\n]*\.$"):
        load_images("train.txt", root)


def test_list_is_no_pipe_and_no_larger_than_memory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(root / "train.txt")
    with pytest.raises(ValueError, match=r"train\.txt to be a list of images .* \(it is not a regular file\)"):
        load_images("train.txt", root)
    (root / "train.txt").unlink()
    with (root / "train.txt").open("wb") as file:
        file.truncate(2**42)  # takes no room
    with pytest.raises(ValueError, match=r"Expected the list .*train\.txt to fit into memory, got \d+\.\d GB needed"):
        load_images("train.txt", root)


def test_two_lists_of_one_part_are_refused(root: Path) -> None:
    for name in ("train.txt", "val.txt", "validation.txt"):
        write(root, name, "images/a.png 0")
    with pytest.raises(ValueError, match=r"one val list beside .*train\.txt, got val\.txt and validation\.txt\.$"):
        load_images("train.txt", root)


def test_class_of_the_test_list_alone_is_left_out_and_said(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(root, "train.txt", "images/a.png 0")
    write(root, "test.txt", "images/b.png 1", "images/c.png 0")
    assert len(load_images("train.txt", root).test_labels) == 1
    assert "1 of 2 test examples are left out, since their classes have no training examples: 1" in caplog.text


def test_shot_groups_of_a_published_list(tmp_path: Path) -> None:
    # ImageNet-LT (Liu et al., CVPR 2019): more than 100 training images are many, fewer than 20 few
    sizes = {"n01440764": 101, "n01443537": 100, "n01484850": 20, "n01491361": 19, "n01494475": 5}
    names = [f"train/{name}/{i}.png" for name, size in sizes.items() for i in range(size)]
    image = Image.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2))
    numbers = {name: i for i, name in enumerate(sizes)}
    tests = [f"val/{i}.png" for i in range(len(sizes))]
    for name in [*names, *tests]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / name)
    write(tmp_path, "ImageNet_LT_train.txt", *(f"{name} {numbers[name.split('/')[1]]}" for name in names))
    write(tmp_path, "ImageNet_LT_test.txt", *(f"{name} {i}" for i, name in enumerate(tests)))
    data = FederatedDataModule(
        dataset="ImageNet_LT_train.txt",
        root=str(tmp_path),
        partition="iid",
        num_clients=1,
        imbalance_profile="none",
        num_meta_per_class=0,
        shot_rule="counts",
        augmentation="none",
        in_memory=False,
    )
    assert data.info["class_counts"] == [*sizes.values()]
    assert data.info["shot_groups"] == {"many": [0], "medium": [1, 2], "few": [3, 4]}


def test_a_million_lines_take_seconds(tmp_path: Path) -> None:
    number = 200_000
    lines = [f"train/n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG {i % 1000}" for i in range(number)]
    write(tmp_path, "train.txt", *lines)
    start = time.process_time()
    found = list_file._read(tmp_path / "train.txt")
    list_file._require_once({"train": found})
    assert time.process_time() - start < 5e-5 * number  # it takes about 3e-6 a line
    assert (found.images[-1], found.labels[-1], found.lines[-1]) == (*lines[-1].split(), number)


def test_list_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=rf"^Expected `root` to hold the list {tmp_path}/train\.txt, got no such file\.$"
    ):
        load_images("train.txt", tmp_path, ReadOptions(image_size=8))
