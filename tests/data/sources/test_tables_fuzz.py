"""Tables of any content: each is read to the last cell, or refused in one line; nothing in between."""

import csv
import io
import math
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedamm_pl.data.sources import ImageData, ReadOptions, load_images, table_files
from fedamm_pl.data.sources.table_files import is_number
from fedamm_pl.terminal import printable

REPEATABLE = settings(deadline=None, derandomize=True, database=None, max_examples=200)
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


def outcome(folder: Path, content: bytes, name: str = "x.csv") -> ImageData | str:
    """The data, or what is said of the file."""
    (folder / name).write_bytes(content)
    try:
        return load_images(name, folder, ReadOptions(test_fraction=0.5))
    except ValueError as error:
        said = str(error)
    assert printable(said) == said
    assert name in said
    return said


def check(data: ImageData) -> None:
    for images, labels in data.parts.values():
        assert images.dtype == torch.float32
        assert images[:].isfinite().all()
        assert len(images) == len(labels) > 0
        assert 0 <= labels.min() <= labels.max() < len(data.class_names)


@REPEATABLE
@given(st.binary(max_size=200))
@example(b"\xff\xfe")
@example(b"\xef\xbb\xbf")
@example(b"label,\xe9\n")
@example(b'"')
@example(b"label\xc2\x85,x\n1,1\n")
def test_junk(folder: Path, content: bytes) -> None:
    assert isinstance(outcome(folder, content), str)
    started = outcome(folder, b"x,label\n1,a\n2,a\n" + content)
    if not isinstance(started, str):
        check(started)


@REPEATABLE
@given(st.lists(st.sampled_from(["x", "label", *',"\n\r ;\t1a\0\u2028\u00e9', "2.5"]), max_size=40).map("".join))
def test_text_that_is_almost_a_table(folder: Path, text: str) -> None:
    for content in (text, f"x,label\n1,a\n2,a\n{text}", f"x,label\n1,a\n2,a{text}", f"{text}\n1,a\n2,a\n"):
        found = outcome(folder, content.encode())
        if not isinstance(found, str):
            check(found)


def cut(content: bytes) -> st.SearchStrategy[bytes]:
    """A file with some bytes changed, taken out or put in."""
    places = st.integers(0, len(content))
    change = st.tuples(places, st.integers(0, 3), st.binary(max_size=3))

    def apply(changes: list[tuple[int, int, bytes]]) -> bytes:
        changed = content
        for place, gone, new in changes:
            changed = changed[:place] + new + changed[place + gone :]
        return changed

    return st.lists(change, min_size=1, max_size=4).map(apply)


@REPEATABLE
@given(cut(b'x,y,label\n1.5,2,a\n-3,4e2,"b"\n5,6,a\n7,8,"b"\n'))
def test_damaged_tables(folder: Path, content: bytes) -> None:
    found = outcome(folder, content)
    if not isinstance(found, str):
        check(found)
        assert sum(map(len, (found.train_labels, found.test_labels))) <= content.count(b"\n") + content.count(b"\r") + 1


CELLS = st.floats(width=32, allow_nan=False, allow_infinity=False)
TEXT = string.digits + string.ascii_letters + string.punctuation + " \u00e9\u4e2d\U0001f600"
LABELS = st.text(TEXT, min_size=1, max_size=6).filter(str.strip)


@REPEATABLE
@given(
    st.integers(1, 4).flatmap(
        lambda width: st.lists(
            st.tuples(st.lists(CELLS, min_size=width, max_size=width), LABELS), min_size=1, max_size=12
        )
    ),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.integers(1, 9),
)
def test_what_is_written_is_read(
    folder: Path, rows: list[tuple[list[float], str]], quoting: int, end: str, at_once: int
) -> None:
    rows = rows + rows  # so that each class has an example for testing
    text = io.StringIO(newline="")
    writer = csv.writer(text, quoting=quoting, lineterminator=end)  # type: ignore[arg-type]
    writer.writerow([*(f"f{i}" for i in range(len(rows[0][0]))), "label"])
    writer.writerows([*cells, label] for cells, label in rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_files, "CELLS_AT_ONCE", at_once)  # rows lie in different chunks
        found = outcome(folder, text.getvalue().encode())
    assert not isinstance(found, str), found
    names = found.class_names
    read = sorted(
        (*row, names[label])
        for images, labels in found.parts.values()
        for row, label in zip(images[:].tolist(), labels.tolist(), strict=True)
    )
    whole = {label.strip() for _, label in rows}
    assert set(names) == whole
    assert read == sorted((*map(float, np.float32(cells)), label.strip()) for cells, label in rows)


@REPEATABLE
@given(st.text("0123456789.eE+-_ naif\u0663\u00bd", max_size=6))
def test_a_cell_is_a_number_or_refused(folder: Path, cell: str) -> None:
    found = outcome(folder, f"x,label\n1,a\n{cell},a\n".encode())
    assert isinstance(found, str) != is_number(cell)
    if not isinstance(found, str):
        value = float(cell)
        assert not math.isnan(value)
        assert (
            float(np.float32(value))
            in found.train_images[:].flatten().tolist() + found.test_images[:].flatten().tolist()
        )
