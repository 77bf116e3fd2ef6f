"""Parts and clients of a table, and tables of the paths of images."""

import logging
from pathlib import Path

import pytest
from PIL import Image

from tests.data.sources.tables import read, refused, table


def test_the_split_column(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    splits = ["train", "Training", "dev", "TEST", "train", "test"]
    table(tmp_path, "x,label,part", *[f"{i},{'abaaac'[i]},{split}" for i, split in enumerate(splits)])
    table(tmp_path, "x,label,part", "1,a,test", name="mine_test.csv")
    data = read(tmp_path, split_column="part")
    assert [data.parts[part][0].flatten().tolist() for part in ("train", "val", "test")] == [[0, 1, 4], [2], [3]]
    assert "1 of 2 test examples are left out, since their classes have no training examples: c" in caplog.text
    assert f"mine.csv has its own split; {tmp_path / 'mine_test.csv'} are not read" in caplog.text
    table(tmp_path, "x,label,part", "1,a,train", "2,a,tests")
    assert "to be train, val or test, got 'tests' in row 2 (line 3)" in refused(tmp_path, split_column="part")


@pytest.mark.parametrize(
    ("train", "test", "val"),
    [
        ("train", "test", "val"),
        ("x", "x_test", "x_val"),
        ("x_train", "x_test", "x_val"),
        ("Train", "Test", "Val"),
        ("X_TRAIN", "X_TEST", "X_VAL"),
    ],
)
def test_files_beside_a_table_are_its_other_parts(
    tmp_path: Path, train: str, test: str, val: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    table(tmp_path, "x,y,who,label", "1,2,k,a", "3,4,l,b", name=f"{train}.csv")
    table(tmp_path, "label,y,x", "b,6,5", name=f"{test}.csv")  # other order, and nobody holds it
    table(tmp_path, "y,x,who,label", "8,7,m,a", name=f"{val}.csv")
    data = read(tmp_path, f"{train}.csv", client_column="who")
    assert {name: images.tolist() for name, (images, _) in data.parts.items()} == {
        "train": [[1, 2], [3, 4]],
        "test": [[5, 6]],
        "val": [[7, 8]],
    }
    assert data.clients == ["k", "l"]
    assert f"{test}.csv is its test part; {val}.csv is its val part" in caplog.text


def test_files_beside_a_table_have_its_columns(tmp_path: Path) -> None:
    table(tmp_path, "x,y,label", "1,2,a", name="train.csv")
    table(tmp_path, "x,z,label", "1,2,a", name="test.csv")
    assert "F/test.csv to have the columns of the training table, got none called y" in refused(tmp_path, "train.csv")
    table(tmp_path, "x,y,z,label", "1,2,3,a", name="test.csv")
    assert "F/test.csv to have the columns of the training table, got z too" in refused(tmp_path, "train.csv")
    table(tmp_path, "x,x,y,label", "1,9,2,a", name="test.csv")
    assert "each column of F/test.csv to have a name of its own, got x twice" in refused(tmp_path, "train.csv")
    table(tmp_path, "x,y,label", "1,2,a", "1,2,", name="test.csv")
    assert "got none in row 2 (line 3) of test.csv" in refused(tmp_path, "train.csv")


def test_examples_that_nobody_holds(tmp_path: Path) -> None:
    table(tmp_path, "x,label,who,part", "1,a,k,train", "2,a,,test", "3,a,,train")
    assert "every client of a training example in F/mine.csv to be given, got none in row 3 (line 4)" in refused(
        tmp_path, client_column="who", split_column="part"
    )


def images(folder: Path) -> Path:
    (folder / "deep").mkdir()
    for i in range(6):
        Image.new("L", (8, 8), 10 * i).save(folder / "deep" / f"{i}.png")
    return folder


def test_images_by_their_paths(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    table(
        images(tmp_path),
        "file,label,age,part,note",
        *[f"deep/{i}.png,{'ab'[i % 2]},x,{'train' if i < 4 else 'test'}," for i in range(6)],
    )
    data = read(tmp_path, path_column="file", split_column="part")
    assert data.train_images.shape == (4, 1, 8, 8)
    assert (data.train_images[:, 0, 0, 0].tolist(), data.test_images[:, 0, 0, 0].tolist()) == (
        [0, 10, 20, 30],
        [40, 50],
    )
    assert data.train_labels.tolist() == [0, 1, 0, 1]
    assert "images by the column file; 2 other columns are not used: age, note" in caplog.text


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("../other.png", "paths in F/mine.csv to lie below F, got '../other.png' in row 2 (line 3)"),
        ("deep/../../other.png", "to lie below F, got 'deep/../../other.png' in row 2 (line 3)"),
        ("/etc/passwd", "to lie below F, got '/etc/passwd' in row 2 (line 3)"),
        ("", "to lie below F, got '' in row 2 (line 3)"),
        ("deep/none.png", "F/deep/none.png"),
    ],
)
def test_paths_that_lead_elsewhere(tmp_path: Path, path: str, said: str) -> None:
    table(images(tmp_path), "file,label", "deep/0.png,a", f"{path},a")
    assert said in refused(tmp_path, path_column="file")


def test_an_image_has_one_row(tmp_path: Path) -> None:
    table(images(tmp_path), "file,label", "deep/0.png,a", "deep/1.png,b", "deep/./0.png,a")
    assert refused(tmp_path, path_column="file") == (
        "Expected each image to be in F/mine.csv once, got 'deep/./0.png' in row 1 (line 2) and in row 3 (line 4)."
    )


def test_images_that_are_left_out_are_not_decoded(tmp_path: Path) -> None:
    rows = [f"deep/{i}.png,{'ababac'[i]},{'train' if i < 4 else 'test'}" for i in range(6)]
    table(images(tmp_path), "file,label,part", *rows)
    damaged = tmp_path / "deep" / "5.png"
    damaged.write_bytes(damaged.read_bytes()[:50])
    data = read(tmp_path, path_column="file", split_column="part")
    assert data.test_images[:, 0, 0, 0].tolist() == [40]


def test_a_link_that_leads_nowhere_is_no_missing_test_set(tmp_path: Path) -> None:
    table(tmp_path, "x,label", "1,a", "2,a", "3,b", "4,b")
    (tmp_path / "mine_test.csv").symlink_to("nowhere.csv")
    assert "F/mine_test.csv to be a table as text, got no such file" in refused(tmp_path)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (["1700000000", "1700000001", "1700000002", "1700000003"], True),  # all the same in float32
        (["1700000000", "1700000300", "1700000600", "1700000900"], True),
        (["1700000000", "1700086400", "1700172800", "1700259200"], False),
        (["5", "5", "5", "5"], False),
        (["0.1", "0.1", "0.2", "0.1"], False),
        (["1e30", "0", "1", "2"], False),
    ],
)
def test_a_feature_that_float32_cannot_resolve_is_said(
    tmp_path: Path, values: list[str], said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    table(tmp_path, "time,label", *[f"{value},{'ab'[i % 2]}" for i, value in enumerate(values)])
    read(tmp_path)
    assert ("the feature 'time' varies so little relative to its size" in caplog.text) is said
