"""Parquet files: typed columns become the same features and texts as those of a CSV file."""

import datetime
import decimal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedamm_pl.data.sources import ReadOptions, load_images

COLUMNS = {
    "float": np.arange(8) * 0.5,
    "flag": [True, False] * 4,
    "a.b": np.arange(8)[::-1] + 2**60,
    "a": [decimal.Decimal("1.25")] * 8,
    "label": ["x", "y"] * 4,
}


def save(path: Path, num_rows: int = 8, **replaced: Any) -> None:
    pa = pytest.importorskip("pyarrow")
    pa.parquet = pytest.importorskip("pyarrow.parquet")
    pa.parquet.write_table(pa.table({**COLUMNS, **replaced})[:num_rows], path / "mine.parquet")


def refused(folder: Path) -> str:
    with pytest.raises(ValueError, match="Expected") as caught:
        load_images("mine.parquet", folder)
    return str(caught.value).replace(str(folder), "F")


def test_numbers_of_any_type_are_features(tmp_path: Path) -> None:
    save(tmp_path)
    data = load_images("mine.parquet", tmp_path)
    read = sorted(data.train_images[:].tolist() + data.test_images[:].tolist())
    assert read == [[i / 2, float(i % 2 == 0), float(np.float32(2**60)), 1.25] for i in range(8)]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([10, 9] * 4, ["9", "10"]),
        (np.array([True, False] * 4), ["false", "true"]),
        (["007", "NA"] * 4, ["007", "NA"]),
        ([datetime.date(2024, 1, 2), datetime.date(2024, 1, 1)] * 4, ["2024-01-01", "2024-01-02"]),
    ],
)
def test_labels_are_texts(tmp_path: Path, labels: Any, names: list[str]) -> None:
    save(tmp_path, label=labels, who=np.arange(8))
    data = load_images("mine.parquet", tmp_path, ReadOptions(client_column="who"))
    assert data.class_names == names
    assert data.clients == [f"{2 * value:g}" for value in data.train_images[:, 0].tolist()]


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (
            {"a": [1.0, None] * 4},
            "Expected the column 'a' of F/mine.parquet to hold finite numbers (float32), got an empty cell in row 2",
        ),
        ({"a": [1.0, 2.0, np.nan, 1.0] * 2}, "got 'nan' in row 3"),
        ({"a": [1e300] * 8}, "got '1e+300' in row 1"),
        ({"a": ["1"] * 8}, "Expected the column 'a' of F/mine.parquet to hold finite numbers (float32), got string"),
        ({"a": [[1.0]] * 8}, "got list<"),
        ({"a": [None] * 8}, "got null"),
        ({"a": [datetime.date(2024, 1, 1)] * 8}, "got date32"),
        (
            {"label": [b"\xff"] * 8},
            "Expected the column 'label' of F/mine.parquet to hold texts or whole numbers, got binary",
        ),
        ({"label": [[1]] * 8}, "to hold texts or whole numbers, got list<"),
        ({"label": ["x", None] * 4}, "Expected every label in F/mine.parquet to be given, got none in row 2"),
    ],
)
def test_mistakes_are_named_with_their_place(tmp_path: Path, column: dict[str, Any], said: str) -> None:
    save(tmp_path, **column)
    assert said in refused(tmp_path)


def test_damaged_and_empty_files(tmp_path: Path) -> None:
    save(tmp_path)
    whole = (tmp_path / "mine.parquet").read_bytes()
    for content in (b"", b"PAR1", whole[:-50], whole[50:]):
        (tmp_path / "mine.parquet").write_bytes(content)
        assert refused(tmp_path).startswith(
            "Expected F/mine.parquet to be a whole Parquet file, got one that cannot be read"
        )
    save(tmp_path, num_rows=0)
    assert "to hold rows, got only the names of columns" in refused(tmp_path)


def test_a_table_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path)
    monkeypatch.setattr("fedamm_pl.data.sources.reading.available_memory", lambda: 100)
    assert "the 8 rows of F/mine.parquet to fit into memory" in refused(tmp_path)


def test_without_pyarrow_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in refused(tmp_path)


@pytest.mark.parametrize("role", ["label", "client"])
def test_a_label_that_is_no_number_among_numbers_is_an_empty_cell(tmp_path: Path, role: str) -> None:
    save(tmp_path, **{"who": np.arange(8), {"label": "label", "client": "who"}[role]: np.array([1, 1, np.nan, 2] * 2)})
    with pytest.raises(ValueError, match=rf"Expected every {role}.* to be given, got none in row 3"):
        load_images("mine.parquet", tmp_path, ReadOptions(client_column="who"))


def test_damage_to_values_is_seen_where_the_file_has_checksums(tmp_path: Path) -> None:
    save(tmp_path)
    pq = sys.modules["pyarrow.parquet"]
    pq.write_table(
        pq.read_table(tmp_path / "mine.parquet"),
        tmp_path / "mine.parquet",
        write_page_checksum=True,
        compression="none",
        use_dictionary=False,
    )
    whole, number = (tmp_path / "mine.parquet").read_bytes(), np.float64(3.5).tobytes()
    assert number in whole
    (tmp_path / "mine.parquet").write_bytes(whole.replace(number, np.float64(7.5).tobytes()))
    assert "F/mine.parquet to be a whole Parquet file" in refused(tmp_path)
