"""How the folders on the way to an image are read: classes, parts, clients."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch import Tensor

from fedamm_pl.data import FederatedDataModule, read_image_files
from fedamm_pl.data.sources import ImageData, ReadOptions, load_images, read_image_folder
from fedamm_pl.data.sources.image_files import ImageFiles

LAZY = ReadOptions(in_memory=False)


def save(root: Path, *names: str) -> dict[str, int]:
    """Save an image of one grey level of its own under each name; return the levels."""
    levels = {name: 10 + i for i, name in enumerate(names)}
    for name, level in levels.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), level).save(root / name)
    return levels


def contents(data: ImageData, part: str) -> list[tuple[int, str]]:
    """Grey level and class of each image of a part."""
    images, labels = data.parts[part]
    return [
        (int(image.max()), data.class_names[label]) for image, label in zip(images[:], labels.tolist(), strict=True)
    ]


def several(*folders: str, count: int = 5) -> list[str]:
    return [f"{folder}/{i}.png" for folder in folders for i in range(count)]


@pytest.mark.parametrize("options", [None, LAZY])
@pytest.mark.parametrize("val", ["val", "Validation"])
def test_val_beside_train_holds_validation_images(tmp_path: Path, val: str, options: ReadOptions | None) -> None:
    levels = save(tmp_path, "train/a/0.png", "train/b/0.png", "test/b/0.png", f"{val}/b/0.png", f"{val}/a/0.png")
    data = read_image_folder(tmp_path, options)
    assert contents(data, "train") == [(levels["train/a/0.png"], "a"), (levels["train/b/0.png"], "b")]
    assert contents(data, "val") == [(levels[f"{val}/a/0.png"], "a"), (levels[f"{val}/b/0.png"], "b")]
    assert contents(data, "test") == [(levels["test/b/0.png"], "b")]
    assert data.clients is None
    assert isinstance(data.val_images, Tensor if options is None else ImageFiles)


def test_without_val_there_are_no_validation_images(tmp_path: Path) -> None:
    save(tmp_path, "train/a/0.png", "test/a/0.png")
    data = read_image_folder(tmp_path)
    assert data.val_images is data.val_labels is None


@pytest.mark.parametrize(("part", "names"), [("val", "got none"), ("val/z", r"got \['z'\]")])
def test_val_must_be_as_test_must_be(tmp_path: Path, part: str, names: str) -> None:
    save(tmp_path, "train/a/0.png", "test/a/0.png")
    (tmp_path / part).mkdir(parents=True)
    with pytest.raises(ValueError, match=names):
        read_image_folder(tmp_path)


def test_other_usual_names_of_parts_are_parts_and_not_clients(tmp_path: Path) -> None:
    save(tmp_path, "Training/a/0.png", "Training/b/0.png", "Testing/a/0.png")
    data = read_image_folder(tmp_path)
    assert (data.class_names, data.clients, len(data.test_labels)) == (["a", "b"], None, 1)
    save(tmp_path, "train/a/0.png")
    with pytest.raises(ValueError, match=r"one folder of train images, got Training and train\.$"):
        read_image_folder(tmp_path)


def test_flat_classes_give_a_share_for_testing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, *several("cat", "dog", count=10))
    with caplog.at_level(logging.INFO):
        data = read_image_folder(tmp_path, ReadOptions(test_fraction=0.3))
    assert data.class_names == ["cat", "dog"]
    assert data.train_labels.bincount().tolist() == [7, 7]
    assert data.test_labels.bincount().tolist() == [3, 3]
    assert data.clients is None
    assert caplog.messages == [
        "no test set: 6 of 20 examples, 30 % of each class, are held out for testing",
        f"{tmp_path}: read as <class>/*.png: 2 classes, 20 images",
    ]


HOSPITALS = {
    "<client>/<class>/*.png": ("north/cat", "north/dog", "south/dog", "south/emu"),
    "{train,test}/<client>/<class>/*.png": (
        *("train/north/cat", "train/north/dog", "train/south/dog", "train/south/emu"),
        *("test/north/cat", "test/south/emu", "val/south/dog"),
    ),
    "<client>/{train,test}/<class>/*.png": (
        *("north/train/cat", "north/train/dog", "south/train/dog", "south/train/emu"),
        *("north/test/cat", "south/test/emu", "south/val/dog"),
    ),
}


@pytest.mark.parametrize("options", [None, LAZY])
@pytest.mark.parametrize("layout", HOSPITALS)
def test_folders_of_clients(
    tmp_path: Path, layout: str, options: ReadOptions | None, caplog: pytest.LogCaptureFixture
) -> None:
    levels = save(tmp_path, *several(*HOSPITALS[layout]))
    with caplog.at_level(logging.INFO):
        data = read_image_folder(tmp_path, options)
    assert data.class_names == ["cat", "dog", "emu"]
    number = len(levels)
    read = layout.replace("train,test", "train,val,test")  # what there is
    assert f"{tmp_path}: read as {read}: 2 clients, 3 classes, {number} images" in caplog.messages
    assert data.clients is not None
    by_level = {level: name for name, level in levels.items()}
    for (level, class_name), client in zip(contents(data, "train"), data.clients, strict=True):
        names = by_level[level].split("/")
        assert client in names
        assert names[-2] == class_name
        assert "test" not in names
        assert "val" not in names
    seen = [level for part in data.parts for level, _ in contents(data, part)]
    assert sorted(seen) == sorted(levels.values())
    if layout.startswith("<client>/<class>"):
        assert data.test_labels.bincount().tolist() == [1, 2, 1]
        assert data.val_images is None
    else:
        assert [by_level[level].split("/")[-2] for level, _ in contents(data, "test")] == ["cat"] * 5 + ["emu"] * 5
        assert data.val_labels is not None
        assert data.val_labels.tolist() == [1] * 5


def test_client_without_test_images_is_a_client(tmp_path: Path) -> None:
    save(tmp_path, "north/train/a/0.png", "south/train/a/0.png", "south/test/a/0.png")
    data = read_image_folder(tmp_path)
    assert data.clients == ["north", "south"]
    assert len(data.test_labels) == 1


def test_folder_of_clients_is_partitioned_as_any_other_data(tmp_path: Path) -> None:
    save(tmp_path, *several("north/cat", "north/dog", "south/cat", "south/dog", count=20))
    data = FederatedDataModule(
        dataset="image_folder",
        root=str(tmp_path),
        num_clients=3,
        num_meta_per_class=2,
        imbalance_profile="none",
        partition="iid",
        augmentation="none",
        in_memory=False,
    )
    assert data.info["class_counts"] == [30, 30]
    assert [data.client_size(client) for client in range(3)] == [20, 20, 20]
    assert isinstance(data.images.train_images, ImageFiles)


@pytest.mark.parametrize(
    ("names", "places"),
    [
        (["train/0.png", "test/0.png"], ""),
        (["0.png"], r"0\.png without a folder of its class\.$"),
        (["a/0.png", "b/c/0.png"], r"in .*/a and in .*/b/c: all must follow one layout\.$"),
        (["train/a/0.png", "train/b/c/0.png", "test/a/0.png"], "in .*/train/a and in .*/train/b/c"),
        (["train/a/0.png", "test/north/a/0.png"], "in .*/train/a and in .*/test/north/a"),
        (["north/train/a/0.png", "south/a/0.png"], "in .*/north/train/a and in .*/south/a"),
        (["north/train/0.png", "north/test/0.png"], "in .*/north/test"),
        (["north/train/0.png", "south/a/0.png"], "in .*/north/train and in .*/south/a"),
        (["test/a/0.png", "b/a/0.png"], "in .*/b/a and in .*/test/a"),
        (["valid/0.png", "other/0.png"], "in .*/other and in .*/valid"),
        (["x/y/z/0.png"], "in .*/x/y/z"),
        (["x/y/train/0.png"], "in .*/x/y/train"),
    ],
)
def test_other_layouts_are_refused_and_not_guessed(tmp_path: Path, names: list[str], places: str) -> None:
    save(tmp_path, *names)
    ways = (
        r"<class>/\*\.png, <client>/<class>/\*\.png, \{train,test\}/<class>/\*\.png, "
        r"\{train,test\}/<client>/<class>/\*\.png, <client>/\{train,test\}/<class>/\*\.png"
    )
    expected = rf"^Expected {tmp_path} to hold images in one of the layouts {ways}, got (them )?{places}"
    if names[0].startswith("train/0"):
        expected = r"train to hold one folder of images for each class, got none\.$"
    with pytest.raises(ValueError, match=expected):
        read_image_folder(tmp_path)


def test_test_images_alone_are_refused(tmp_path: Path) -> None:
    save(tmp_path, "test/a/0.png")
    with pytest.raises(ValueError, match=rf"^Expected {tmp_path} to hold train examples, got none\.$"):
        read_image_folder(tmp_path)


def test_what_a_folder_of_clients_holds_beside_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, *several("north/a", "south/a"), "loose.png", "north/a/more/0.png", ".hidden/a/0.png")
    (tmp_path / "south/b").mkdir()
    (tmp_path / "readme.txt").write_text("north and south")
    (tmp_path / "north/notes.txt").write_text("no image")
    data = read_image_folder(tmp_path)
    (said,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    for part in (
        "hidden or system names, not used: 1 (.hidden)",
        "files outside the class folders, not used: 2 (loose.png, readme.txt)",
        "files without the suffix of an image, not used: 1 (north/notes.txt)",
        "folders inside class folders, not used: 1 (north/a/more)",
        "folders without images, not used: 1 (south/b)",
    ):
        assert part in said.getMessage()
    assert len(data.train_labels) + len(data.test_labels) == 10


@pytest.mark.parametrize("name", ["two\nlines", "\u202egnp"])
def test_client_whose_name_cannot_be_printed_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    save(tmp_path, *several(f"{name}/a", "south/a"))
    with pytest.raises(ValueError, match=r"^Expected names of clients without line breaks [^\n\u202e]*$"):
        read_image_folder(tmp_path)


def test_folder_that_leads_back_to_the_top_is_gone_down_three_times_at_most(tmp_path: Path) -> None:
    save(tmp_path, *several("north/a"))
    (tmp_path / "south").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"in .*/north/a and in .*/south/north/a"):
        read_image_folder(tmp_path)


@pytest.mark.parametrize("dataset", ["image_folder", "hospitals"])
def test_folder_by_name(tmp_path: Path, dataset: str) -> None:
    root = tmp_path if dataset == "image_folder" else tmp_path / dataset
    save(root, *several("north/a", "south/b"))
    assert load_images(dataset, tmp_path).class_names == ["a", "b"]


def test_folder_in_the_place_of_a_download_needs_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "cifar10", *several("cifar-10-batches-py/a", "b/a"))
    monkeypatch.setattr("fedamm_pl.data.sources.read_torchvision", lambda *_: "torchvision")
    assert load_images("cifar10", tmp_path) == "torchvision"
    save(tmp_path / "cifar10", "train/a/0.png", "test/a/0.png")
    assert len(load_images("cifar10", tmp_path).train_labels) == 1


def test_sizes_differ_unless_one_is_asked_for(tmp_path: Path) -> None:
    save(tmp_path, *several("a", "b"))
    Image.fromarray(np.zeros((9, 5), dtype=np.uint8)).save(tmp_path / "b/4.png")
    with pytest.raises(
        ValueError, match=r"4 x 4 like 0\.png, got 5 x 9 for .*b/4\.png: --data\.image_size brings them"
    ):
        read_image_folder(tmp_path)
    data = read_image_folder(tmp_path, ReadOptions(image_size=6))
    assert data.train_images.shape[1:] == torch.Size((1, 6, 6))


@pytest.mark.parametrize(
    ("options", "names"),
    [({"image_size": 8}, "image_size"), ({"in_memory": False, "image_size": 8}, "image_size, in_memory")],
)
@pytest.mark.parametrize("dataset", ["fashion_mnist_mini", "mine"])
def test_options_of_files_are_refused_for_other_data(
    tmp_path: Path, dataset: str, options: dict[str, int], names: str
) -> None:
    with pytest.raises(ValueError, match=r"no such file\.$"):  # not that nothing has a use for the option
        load_images("photos", tmp_path, ReadOptions(**options))  # type: ignore[arg-type]
    images = np.zeros((4, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "mine.npz", x_train=images, y_train=[0, 0, 1, 1], x_test=images, y_test=[0, 0, 1, 1])
    expected = rf"^Expected {names} to be given only for images in files, got '{dataset}'\.$"
    with pytest.raises(ValueError, match=expected):
        load_images(dataset, tmp_path, ReadOptions(**options))  # type: ignore[arg-type]
    assert len(load_images(dataset, tmp_path, ReadOptions(in_memory=True)).test_labels) >= 4


@pytest.mark.parametrize("column", ["client_column", "label_column", "path_column"])
@pytest.mark.parametrize("dataset", ["photos", "train.txt"])
def test_columns_are_refused_for_what_is_no_table(tmp_path: Path, dataset: str, column: str) -> None:
    save(tmp_path / "photos", *several("a"))
    (tmp_path / "train.txt").write_text("photos/a/0.png 0")
    with pytest.raises(ValueError, match=rf"^Expected {column} to be given only for a table"):
        load_images(dataset, tmp_path, ReadOptions(**{column: "who"}))  # type: ignore[arg-type]


def test_root_that_is_the_folder_itself_gets_a_hint(tmp_path: Path) -> None:
    save(tmp_path / "photos", *several("a", "b"))
    with pytest.raises(ValueError, match=rf"no such file; did you mean `root` {tmp_path}\?$"):
        load_images("photos", tmp_path / "photos")


def test_share_for_testing_is_of_the_training_examples(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, *several("train/a", "train/b"), *several("val/a", count=3))
    (tmp_path / "north").mkdir()
    (tmp_path / "train").rename(tmp_path / "north/train")
    (tmp_path / "val").rename(tmp_path / "north/val")
    with caplog.at_level(logging.INFO):
        read_image_folder(tmp_path)
    assert "no test set: 2 of 10 examples, 20 % of each class, are held out for testing" in caplog.messages
    assert (
        f"{tmp_path}: read as <client>/{{train,val}}/<class>/*.png: 1 clients, 2 classes, 13 images" in caplog.messages
    )


@pytest.mark.parametrize(("mode", "in_channels"), [("L", 1), ("RGB", 3)])
def test_image_files_are_read_as_the_training_reads_them(tmp_path: Path, mode: str, in_channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 40, 30, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for i, each in enumerate(pixels):
        path = tmp_path / f"{'ab'[i % 2]}/{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(each).convert(mode).save(path, exif=exif if i < 2 else Image.Exif())
    data = read_image_folder(tmp_path, ReadOptions(image_size=(8, 6), test_fraction=0.5))
    images = read_image_files([str(path) for path in sorted(tmp_path.glob("*/*"))], [8, 6], in_channels)
    known = {each.numpy().tobytes() for part in data.parts for each in data.parts[part][0][:]}
    assert {each.numpy().tobytes() for each in images} == known
    assert images.shape == (4, in_channels, 8, 6)


@pytest.mark.parametrize(
    ("paths", "image_size", "in_channels"), [([], [8, 8], 3), ("a.png", [8, 8], 3), (["a.png"], [], 64)]
)
def test_image_files_are_refused_where_a_model_takes_none(
    paths: list[str], image_size: list[int], in_channels: int
) -> None:
    with pytest.raises(ValueError, match=r"^Expected a list of paths"):
        read_image_files(paths, image_size, in_channels)
    with pytest.raises(ValueError, match=r"^Expected nowhere\.png to "):
        read_image_files(["nowhere.png"], [8, 8], 3)


@pytest.mark.parametrize("dataset", ["digits", "photos", "train.txt", "mine.csv", "mine"])
def test_share_for_testing_is_not_used_where_there_is_a_test_set(
    tmp_path: Path, dataset: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path / "photos", "train/a/0.png", "train/a/1.png", "test/a/0.png")
    for part in ("train", "test"):
        (tmp_path / f"{part}.txt").write_text(f"photos/{part}/a/0.png 0")
    (tmp_path / "mine.csv").write_text("x,label\n1,a\n2,a\n")
    (tmp_path / "mine_test.csv").write_text("x,label\n3,a\n")
    images = np.zeros((4, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "mine.npz", x_train=images, y_train=[0, 0, 1, 1], x_test=images, y_test=[0, 0, 1, 1])
    load_images(dataset, tmp_path, ReadOptions())
    assert "test_fraction" not in caplog.text
    data = load_images(dataset, tmp_path, ReadOptions(test_fraction=0.5))
    assert len(data.test_labels) == {"digits": 355, "mine": 4}.get(dataset, 1)
    assert f"{dataset}: test_fraction 0.5 is not used, since these data have a test set" in caplog.text


def test_links_inside_a_folder_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, *several("north/a", "south/a"))
    (tmp_path / "west").symlink_to(tmp_path / "north")
    assert len(read_image_folder(tmp_path).clients or ()) == 12
    assert "links to places in this folder, followed, so that images may be there twice: 1 (west)" in caplog.text
