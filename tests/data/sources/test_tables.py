"""Tables: what a CSV or Parquet file says is read as it stands, and every mistake in one has a line that says where."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedamm_pl.data.sources import ImageData, ReadOptions, load_images
from fedamm_pl.data.sources.table_files import BLOCK

ROWS = [f"{i}.5,{-i},{label}" for i, label in enumerate("aabbccaabbcc")]


def table(folder: Path, *lines: str, name: str = "mine.csv") -> Path:
    (folder / name).write_text("".join(f"{line}\n" for line in lines))
    return folder / name


def read(folder: Path, name: str = "mine.csv", **options: Any) -> ImageData:
    return load_images(name, folder, ReadOptions(**options))


def refused(folder: Path, name: str = "mine.csv", **options: Any) -> str:
    """What is said of a table that cannot be used."""
    with pytest.raises(ValueError, match="Expected") as caught:
        read(folder, name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(folder), "F")


def everything(data: ImageData) -> list[tuple[float, ...]]:
    """All rows, with the names of their classes as numbers of letters, in order."""
    return sorted(
        (*row, label)
        for images, labels in data.parts.values()
        for row, label in zip(images[:].tolist(), labels.tolist(), strict=True)
    )


def test_all_columns_but_the_label_are_features(tmp_path: Path) -> None:
    table(tmp_path, "x,y,label", *ROWS)
    data = read(tmp_path)
    assert data.class_names == ["a", "b", "c"]
    assert data.train_images.dtype == torch.float32
    assert everything(data) == [(i + 0.5, -i, "abcabc".index(ROWS[i][-1])) for i in range(12)]
    assert (len(data.train_labels), len(data.test_labels)) == (9, 3)
    assert data.test_labels.bincount().tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("line", "value"),
    [
        *[
            ("1", 1),
            ("-2.50", -2.5),
            ("+3e-4", 3e-4),
            (".5", 0.5),
            ("5.", 5),
            (" 7 ", 7),
            ('"8"', 8),
            ("007", 7),
            ("1E3", 1000),
        ],
        *[("3.4e38", 3.4e38), ("1e-400", 0), ("16777217", 16777216)],
    ],
)
def test_numbers_as_programs_write_them(tmp_path: Path, line: str, value: float) -> None:
    table(tmp_path, "x,label,y", f"{line},a,1", "0,a,1", "0,b,1", "0,b,2")
    assert np.float32(value) in {row[0] for row in everything(read(tmp_path, seed=1))}


@pytest.mark.parametrize(
    ("cell", "got"),
    [
        *[
            ("", "an empty cell"),
            ("  ", "an empty cell"),
            ("red", "'red'"),
            ("NaN", "'NaN'"),
            ("NA", "'NA'"),
            ("inf", "'inf'"),
        ],
        *[
            ("-Infinity", "'-Infinity'"),
            ("3.5e38", "'3.5e38'"),
            ("1e999", "'1e999'"),
            ("1_000", "'1_000'"),
            ("0x1F", "'0x1F'"),
        ],
        *[
            ('"1,5"', "'1,5'"),
            ("1.000.000", "'1.000.000'"),
            ("٣", "'٣'"),
            ("2024-01-31", "'2024-01-31'"),
            ("True", "'True'"),
        ],
    ],
)
def test_what_is_no_finite_number_is_named_with_its_place(tmp_path: Path, cell: str, got: str) -> None:
    table(tmp_path, "x,label,y", "1,a,1", "", f"2,b,{cell}", "3,b,1")
    assert refused(tmp_path).startswith(
        f"Expected the column 'y' of F/mine.csv to hold finite numbers (float32), got {got} in row 2 (line 4)"
    )


def test_a_bad_number_far_down_is_found(tmp_path: Path) -> None:
    lines = [f"{i},{i},a" for i in range(20_000)]
    lines[17_776] = "1,x,a"
    table(tmp_path, "x,y,label", *lines)
    assert "column 'y'" in refused(tmp_path)
    assert "got 'x' in row 17777 (line 17778)" in refused(tmp_path)


def test_labels_clients_and_paths_are_never_guessed(tmp_path: Path) -> None:
    labels = ["007", "7", "NA", "2024-01-31", "1,000", "1e3", "True", " a b "]
    table(tmp_path, "x,label,who", *[f'{i},"{label}","00{i}"' for i, label in enumerate(labels * 2)])
    data = read(tmp_path, client_column="who")
    assert data.class_names == sorted(label.strip() for label in labels)
    assert data.clients is not None
    assert [int(name) for name in data.clients] == data.train_images[:, 0].tolist()
    assert {name[:2] for name in data.clients} == {"00"}


def test_classes_that_are_whole_numbers_are_in_their_order(tmp_path: Path) -> None:
    table(tmp_path, "label,x", *[f"{label},{label}" for label in (10, 9, -1, 9, 10, -1)])
    data = read(tmp_path, test_fraction=0.5)
    assert data.class_names == ["-1", "9", "10"]
    assert everything(data) == [(-1, 0), (-1, 0), (9, 1), (9, 1), (10, 2), (10, 2)]


@pytest.mark.parametrize(
    "text",
    ["\ufeffx,label\r\n1,a\r\n2,a\r\n", "x,label\r1,a\r2,a\r", "x,label\n\n1,a\n\n2,a", "x, label\n1, a\n2, a\n"],
)
def test_marks_line_ends_and_spaces_that_programs_leave(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.csv").write_bytes(text.encode())
    assert everything(read(tmp_path)) == [(1, 0), (2, 0)]


def test_tabs_in_a_tsv_file(tmp_path: Path) -> None:
    table(tmp_path, "x\tlabel", "1\ta,b", "2\ta,b", name="mine.TSV")
    assert read(tmp_path, "mine.TSV").class_names == ["a,b"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "to hold a table, got nothing in it"),
        ("\n\n", "to hold a table, got nothing in it"),
        ("x,label\n", "to hold rows, got names of columns alone"),
        ("x;label\n1,5;a\n", "to have commas between its cells, got semicolons: save it with commas"),
        ("x\tlabel\n1\ta\n", "to have commas between its cells, got tabs"),
        ("x,label\n1,a\n2,b,3\n", "to have 2 cells, as its first line has, got 3 in row 2 (line 3)"),
        ("x,label\n1,a\n2\n", "to have 2 cells, as its first line has, got 1 in row 2 (line 3)"),
        ("x,x,label\n1,2,a\n", "to have a name of its own, got x twice"),
        (
            "x,Label\n1,a\n",
            "`label_column` to be a column of F/mine.csv, got 'label'; its columns are x, Label; did you mean 'Label'?",
        ),
        ("x,y\n1,a\n", "`label_column` to be a column of F/mine.csv, got 'label'; its columns are x, y."),
        (
            "5.1,3.5,setosa\n4.9,3,setosa\n",
            "its columns are 5.1, 3.5, setosa: the first line of a table must name its columns.",
        ),
        ("label\na\nb\n", "to have columns of features, or a `path_column`, got label alone"),
        ('x,label\n1,"a\n2,b\n', "line 3 of another form (unexpected end of data)"),
        ('x,label\n1,"a"b\n', "line 2 of another form"),
        ("x,label\n1,a\n2,\n", "every label in F/mine.csv to be given, got none in row 2 (line 3)"),
        ("x,label\n1,a\0\n", "got null characters in it"),
        ("x,label\n1," + "a" * 200_000 + "\n", "line 2 of another form (field larger than field limit (131072))"),
        ("x,label\n1,a\x1b[2J\n2,b\n", "names without line breaks and control characters"),
    ],
)
def test_mistakes_in_the_form_of_a_file(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "mine.csv").write_text(content)
    assert said in refused(tmp_path)


def test_a_column_called_by_a_number_is_no_missing_header(tmp_path: Path) -> None:
    table(tmp_path, "0,1,2", "5,6,7", "5,6,7")
    assert read(tmp_path, label_column="2").class_names == ["7"]
    table(tmp_path, "5,6,7", "5,6,7", "5,6,7")
    assert "to name its columns in its first line, got numbers: 5, 6, 7" in refused(tmp_path, label_column="7")


@pytest.mark.parametrize(("encoding", "byte", "line"), [("latin-1", "0xe9", 3), ("utf-16", "0xff", 1)])
def test_other_encodings(tmp_path: Path, encoding: str, byte: str, line: int) -> None:
    text = "x,label\n1,a\n2,caf\u00e9\n"
    (tmp_path / "mine.csv").write_bytes(text.encode(encoding))
    said = refused(tmp_path)
    assert f"to be in UTF-8, got the byte {byte} in line {line}" in said or "null characters" in said


def test_a_line_without_end(tmp_path: Path) -> None:
    with (tmp_path / "mine.csv").open("wb") as file:
        file.write(b"x,label\n" + b"1" * (3 * BLOCK))
    assert "to be shorter than" in refused(tmp_path)


def test_a_table_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table(tmp_path, "x,label", *["1,a"] * 1000)
    monkeypatch.setattr("fedamm_pl.data.sources.reading.available_memory", lambda: 10_000)
    assert "the 1001 rows of F/mine.csv to fit into memory" in refused(tmp_path)


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    assert "it is not a regular file" in refused(tmp_path, "folder.csv")
    assert refused(tmp_path, "none.csv") == "Expected `root` to hold the table F/none.csv, got no such file."
    table(tmp_path, "x,label", "1,a")
    assert refused(tmp_path, "mine").endswith("no such file; did you mean mine.csv?")


def test_columns_are_said_of_tables_alone(tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", a=1)
    assert refused(tmp_path, "mine", client_column="who").startswith(
        "Expected client_column to be given for a table alone"
    )
    assert "label_column" in refused(tmp_path, "fashion_mnist_mini", label_column="y")


def test_one_column_cannot_be_two_things(tmp_path: Path) -> None:
    table(tmp_path, "x,label", "1,a")
    assert "to be other columns" in refused(tmp_path, client_column="label")
    assert "label_column to be given" in refused(tmp_path, label_column="")


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
    ("train", "test", "val"), [("train", "test", "val"), ("x", "x_test", "x_val"), ("x_train", "x_test", "x_val")]
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
    table(tmp_path, "x,y,label", "1,2,a", "1,2,", name="test.csv")
    assert "got none in row 2 (line 3) of test.csv" in refused(tmp_path, "train.csv")


def test_examples_that_nobody_holds(tmp_path: Path) -> None:
    table(tmp_path, "x,label,who,part", "1,a,k,train", "2,a,,test", "3,a,,train")
    assert "every client of a training example in F/mine.csv to be given, got none in row 3 (line 4)" in refused(
        tmp_path, client_column="who", split_column="part"
    )


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["id,x,label", "0,1,a", "1,1,a", "2,1,b", "3,1,b"], "the feature 'id' counts the rows"),
        ([",x,label", "1,1,a", "2,1,a", "3,1,b", "4,1,b"], "the feature '' counts the rows"),
        (
            ["client,x,label", "0,1,a", "0,1,a", "1,1,b", "2,1,b"],
            "the column 'client' is a feature; if it is not, say --data.client_column client",
        ),
        (["x,label", *(f"1,{i / 7}" for i in range(12))], "12 classes for 12 training examples: are these labels?"),
    ],
)
def test_warnings_of_likely_mistakes(
    tmp_path: Path, lines: list[str], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    table(tmp_path, *lines)
    try:
        assert read(tmp_path).train_images.shape[1] == 2  # it is a feature all the same
    except ValueError:  # no class has an example for testing
        assert "are these labels" in said
    assert said in caplog.text
    assert len(caplog.records) == 1


def test_usual_features_are_read_without_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table(tmp_path, "constant,binary,x,label", *[f"3,{i % 2},{i * 2},a" for i in range(5)])
    read(tmp_path)
    assert caplog.text == ""


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
