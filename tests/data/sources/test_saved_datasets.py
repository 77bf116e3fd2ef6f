"""Data sets of images that Hugging Face's ``datasets`` has saved.

``saved_dataset/`` was written by datasets 5.2.0: ``DatasetDict({...}).save_to_disk(folder, num_shards={"train": 2, ...})`` of grey
images of 3 x 2 pixels, each of one level: training 10 to 13 (zebra, ant, ant, zebra; of the hospitals n, s, n, s), validation 20
(ant), test 30 to 32 (ant, no label, zebra), and a split ``extra``. The other folders here are made in the same form by pyarrow.
"""

import io
import json
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fedamm_pl.data.sources import ImageData, ReadOptions, load_images
from fedamm_pl.data.sources.saved_datasets import SavedImages, read_saved_dataset

SAVED = Path(__file__).parent / "saved_dataset"
LAZY = ReadOptions(in_memory=False)


@pytest.fixture
def pa() -> Any:
    return pytest.importorskip("pyarrow")


def levels(data: ImageData, part: str) -> list[int]:
    return [int(image.max()) for image in data.parts[part][0][:]]


def encoded(level: int = 0, size: tuple[int, int] = (3, 2), image_format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("L", size, level).save(file, image_format)
    return file.getvalue()


def save(
    folder: Path,
    images: list[bytes | None],
    labels: list[Any] | None = None,
    kinds: dict[str, Any] | None = None,
    **columns: list[Any],
) -> Path:
    """Save a split as ``save_to_disk`` does."""
    import pyarrow as pa

    labels = [i % 2 for i in range(len(images))] if labels is None else labels
    stored = pa.array(
        [{"bytes": image, "path": None if image else "elsewhere.png"} for image in images],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    table = pa.table({"image": stored, "label": labels, **columns})
    folder.mkdir(parents=True, exist_ok=True)
    with (
        pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as out,
    ):
        out.write_table(table)
    features = {"image": {"_type": "Image"}, "label": {"dtype": "int64", "_type": "Value"}, **(kinds or {})}
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    return folder


def five() -> list[bytes | None]:
    return [encoded(10 + i) for i in range(5)]


@pytest.mark.usefixtures("pa")
@pytest.mark.parametrize("in_memory", [None, False])
def test_what_datasets_has_saved_is_read(in_memory: bool | None, caplog: pytest.LogCaptureFixture) -> None:
    options = ReadOptions(client_column="hospital", in_memory=in_memory)
    with caplog.at_level(logging.INFO):
        data = load_images(SAVED.name, SAVED.parent, options)
    assert data.class_names == ["zebra", "ant"]
    assert (levels(data, "train"), data.train_labels.tolist()) == ([10, 11, 12, 13], [0, 1, 1, 0])
    assert data.clients == ["n", "s", "n", "s"]
    assert (levels(data, "val"), data.val_labels is not None and data.val_labels.tolist()) == ([20], [1])
    assert (levels(data, "test"), data.test_labels.tolist()) == ([30, 32], [1, 0])
    assert data.rows is not None
    assert data.rows["train"].tolist() == [0, 1, 2, 3]
    assert data.rows["test"].diff().tolist() == [2]  # the row between them has no label
    assert data.train_images.shape == (4, 1, 2, 3)
    assert isinstance(data.train_images, Tensor if in_memory is None else SavedImages)
    assert caplog.messages[:3] == [
        f"{SAVED}: splits that are not used: extra",
        f"{SAVED}: 1 of 8 images have no label (-1) and are left out",
        f"{SAVED}: 2 classes, 4 images in train, 2 images in test, 1 images in val",
    ]


@pytest.mark.usefixtures("pa")
def test_nothing_but_pyarrow_is_loaded() -> None:
    before = set(sys.modules)
    read_saved_dataset(SAVED)
    assert not {name.partition(".")[0] for name in set(sys.modules) - before} & {"datasets", "pandas", "requests"}


@pytest.mark.usefixtures("pa")
def test_one_split_gives_a_share_for_testing(tmp_path: Path) -> None:
    save(tmp_path / "mine", [encoded(i) for i in range(10)], ["a", "b"] * 5, who=list(range(10)))
    data = load_images("mine", tmp_path, ReadOptions(client_column="who", test_fraction=0.4, in_memory=False))
    assert data.class_names == ["a", "b"]
    assert data.test_labels.bincount().tolist() == [2, 2]
    assert data.clients == [str(level) for level in levels(data, "train")]


@pytest.mark.usefixtures("pa")
def test_images_are_brought_to_a_size_as_any_other_files(tmp_path: Path) -> None:
    save(tmp_path, [encoded(10, (9, 4)), encoded(20, (4, 9), "JPEG")], [0, 0])
    with pytest.raises(
        ValueError, match=rf"one size, 9 x 4 like row 0 of {tmp_path}, got 4 x 9 for row 1 of {tmp_path}"
    ):
        read_saved_dataset(tmp_path)
    data = read_saved_dataset(tmp_path, ReadOptions(image_size=5, label_column="label"))
    assert data.train_images.shape[1:] == (1, 5, 5)


@pytest.mark.usefixtures("pa")
def test_fingerprint_is_of_the_images_of_a_source(tmp_path: Path) -> None:
    first = read_saved_dataset(SAVED, LAZY).train_images
    shutil.copytree(SAVED, tmp_path / "copy")
    copied = read_saved_dataset(tmp_path / "copy", LAZY).train_images
    assert isinstance(first, SavedImages)
    assert isinstance(copied, SavedImages)
    assert copied.fingerprint == first.fingerprint
    assert copied.subset(torch.arange(3)).fingerprint != first.fingerprint
    assert torch.equal(copied[1:3], first.subset(torch.tensor([1, 2]))[:])


def test_missing_pyarrow_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ValueError, match=rf"^Expected pyarrow to be installed, which reads {SAVED}: pip install pyarrow, or fedamm_pl"
    ):
        load_images(SAVED.name, SAVED.parent)


@pytest.mark.usefixtures("pa")
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"label_column": "lable"}, r"'lable' to be a column of .*; its columns are .*; did you mean 'label'\?"),
        ({"client_column": "who"}, r"'who' to be a column of "),
        ({"split_column": "label"}, r"split_column to be given only for a table"),
        ({"label_column": "image"}, r"'image' .* to hold whole numbers or texts, got struct"),
    ],
)
def test_wrong_column_is_named(tmp_path: Path, change: dict[str, str], expected: str) -> None:
    save(tmp_path / "mine", five())
    with pytest.raises(ValueError, match=expected):
        load_images("mine", tmp_path, ReadOptions(**change))  # type: ignore[arg-type]


@pytest.mark.usefixtures("pa")
@pytest.mark.parametrize(
    ("images", "labels", "kinds", "expected"),
    [
        ([*five(), None], None, {}, r"Expected row 5 of .* to hold an image, got none, or a path to one elsewhere\."),
        ([*five(), b"no image"], None, {}, r"Expected row 5 of .* to be a PNG, "),
        ([*five(), encoded(1)[:-30]], None, {}, r"Expected row 5 of .* to be a PNG, "),
        ([*five(), encoded(1, image_format="PPM")], None, {}, r"Expected row 5 of .* to be a PNG, "),
        (five(), [0, 1, None, 0, 1], {}, r"Expected every 'label' in .* to be given, got none in row 2\."),
        (five(), [0.5] * 5, {}, r"'label' of .* to hold whole numbers or texts, got double"),
        (
            five(),
            [0, 1, 2, 0, 1],
            {"label": {"_type": "ClassLabel", "names": ["a", "b"]}},
            r"in 0\.\.1, .* got 2 in row 2",
        ),
        (five(), None, {"label": {"_type": "ClassLabel", "names": "ab"}}, r"class names of .* to be texts"),
        (five(), None, {"label": {"_type": "Image"}}, r"to have one column of images, got image, label"),
        (five(), None, {"image": {"_type": "Value"}}, r"to have one column of images, got none"),
    ],
)
def test_unusable_data_are_refused_by_row(
    tmp_path: Path, images: list[bytes | None], labels: list[Any] | None, kinds: dict[str, Any], expected: str
) -> None:
    save(tmp_path, images, labels, kinds)
    with pytest.raises(ValueError, match=rf"^[^\n]*{expected}[^\n]*$"):
        read_saved_dataset(tmp_path)


@pytest.mark.usefixtures("pa")
@pytest.mark.parametrize("cut", [0, 10, 300, -30])
def test_damaged_file_is_named(tmp_path: Path, cut: int) -> None:
    path = save(tmp_path, five()) / "data-00000-of-00001.arrow"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(
        ValueError, match=r"^Expected [^\n]*data-00000[^\n]* a whole Arrow file, got one that cannot be read"
    ):
        read_saved_dataset(tmp_path)


@pytest.mark.usefixtures("pa")
def test_no_damage_crashes_the_process(tmp_path: Path) -> None:
    path = save(tmp_path, five()) / "data-00000-of-00001.arrow"
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    refused = []
    for _ in range(150):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), rng.integers(1, 9)):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            read_saved_dataset(tmp_path)
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 50
    assert [text for text in refused if len(text.splitlines()) > 1] == []


@pytest.mark.usefixtures("pa")
@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("state.json", {"_data_files": [{"filename": "../elsewhere.arrow"}]}),
        ("state.json", {"_data_files": [{"filename": "/etc/passwd"}]}),
        ("state.json", {"_data_files": []}),
        ("state.json", {"_data_files": [{"filename": "gone.arrow"}]}),
        ("state.json", {"_data_files": 3}),
        ("state.json", [1]),
        ("dataset_info.json", {"features": 3}),
        ("dataset_dict.json", {"splits": ["../train"]}),
        ("dataset_dict.json", {"splits": ["train", "training"]}),
        ("dataset_dict.json", {"splits": ["test"]}),
        ("dataset_dict.json", {"splits": "train"}),
        ("dataset_dict.json", {}),
    ],
)
def test_forged_description_is_refused_in_one_line(tmp_path: Path, file: str, content: Any) -> None:
    save(tmp_path, five())
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"^Expected [^\n]*$"):
        read_saved_dataset(tmp_path)


@pytest.mark.usefixtures("pa")
def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    save(tmp_path, five())
    (tmp_path / "data-00000-of-00001.arrow").unlink()
    os.mkfifo(tmp_path / "data-00000-of-00001.arrow")
    with pytest.raises(ValueError, match="it is not a regular file"):
        read_saved_dataset(tmp_path)


@pytest.mark.usefixtures("pa")
def test_splits_have_the_same_classes(tmp_path: Path) -> None:
    for split, names in (("train", ["a", "b"]), ("test", ["b", "a"])):
        save(tmp_path / split, five(), kinds={"label": {"_type": "ClassLabel", "names": names}})
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    with pytest.raises(ValueError, match=r"test to have the same classes as the others"):
        read_saved_dataset(tmp_path)


@pytest.mark.usefixtures("pa")
def test_without_any_known_label_there_are_no_examples(tmp_path: Path) -> None:
    kinds = {"label": {"_type": "ClassLabel", "names": ["a", "b"]}}
    save(tmp_path / "mine", five(), [-1] * 5, kinds)
    with pytest.raises(ValueError, match=r"Expected .*mine to hold examples, got none"):
        load_images("mine", tmp_path)


@pytest.mark.usefixtures("pa")
def test_a_file_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "mine", five())
    twice = [{"filename": "data-00000-of-00001.arrow"}] * 2
    (tmp_path / "mine" / "state.json").write_text(json.dumps({"_data_files": twice}))
    with pytest.raises(ValueError, match=r"`_data_files` of .*state\.json to name the files beside it, each once"):
        load_images("mine", tmp_path)


@pytest.mark.usefixtures("pa")
@pytest.mark.parametrize("name", [b"bytes", b"image", b"label"])
def test_a_damaged_name_of_a_column_is_said_with_the_folder(tmp_path: Path, name: bytes) -> None:
    path = save(tmp_path / "mine", five()) / "data-00000-of-00001.arrow"
    path.write_bytes(path.read_bytes().replace(name, b"\xff" * len(name)))
    with pytest.raises(ValueError, match=rf"^Expected .*{tmp_path / 'mine'}"):
        load_images("mine", tmp_path)
