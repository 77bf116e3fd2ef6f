"""Tables: what a CSV or Parquet file says is read as it stands, and every mistake in one has a line that says where."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fedamm_pl.data.sources import ImageData
from fedamm_pl.data.sources.table_files import BLOCK
from tests.data.sources.tables import read, refused, table

ROWS = [f"{i}.5,{-i},{label}" for i, label in enumerate("aabbccaabbcc")]


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
        ("", "to hold a table, got an empty file"),
        ("\n\n", "to hold a table, got an empty file"),
        ("x,label\n", "to hold rows, got only the names of columns"),
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
            f"{','.join(f'f{i}' for i in range(12))},diagnosis\n{'1,' * 12}a\n",
            "its columns are f0, f1, f2, ..., diagnosis.",
        ),
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
        "Expected client_column to be given only for a table"
    )
    assert "label_column" in refused(tmp_path, "fashion_mnist_mini", label_column="y")


def test_one_column_cannot_be_two_things(tmp_path: Path) -> None:
    table(tmp_path, "x,label", "1,a")
    assert "to be other columns" in refused(tmp_path, client_column="label")
    assert "label_column to be given" in refused(tmp_path, label_column="")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["id,x,label", "0,1,a", "1,1,a", "2,1,b", "3,1,b"], "the feature 'id' counts the rows"),
        (["id,x,label", "3,1,a", "7,1,a", "8,1,b", "20,1,b"], "the feature 'id' rises from each row to the next"),
        (
            ["client,x,label", "0,1,a", "0,1,a", "1,1,b", "2,1,b"],
            "the column 'client' is a feature; if it is not, set --data.client_column client",
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


@pytest.mark.parametrize("name", ["", "Unnamed: 0", "__index_level_0__"])
def test_the_index_that_pandas_writes_is_no_feature(tmp_path: Path, name: str) -> None:
    table(tmp_path, f"{name},x,label", "4,1,a", "2,2,a", "9,1,b", "8,2,b")
    assert "Expected each feature of F/mine.csv to have a name, got a column" in (said := refused(tmp_path))
    assert "save the table with index=False" in said
    if name:
        assert repr(name) in said
        table(tmp_path, f"{name},x,label", "4,1,a", "4,2,a", "9,1,b", "9,2,b")
        assert read(tmp_path, client_column=name).clients is not None


def test_usual_features_are_read_without_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table(tmp_path, "constant,binary,x,label", *[f"3,{i % 2},{i * 2 % 7},a" for i in range(5)])
    read(tmp_path)
    assert caplog.text == ""


def test_many_columns(tmp_path: Path) -> None:
    names, values = ",".join(f"gene{i}" for i in range(30_000)), ",".join(["1.5"] * 30_000)
    table(tmp_path, f"{names},label", *[f"{values},a"] * 3)
    assert read(tmp_path).train_images.shape == (2, 30_000)
