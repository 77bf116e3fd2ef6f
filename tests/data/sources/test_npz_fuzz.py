"""Damaged, wrong and hostile data files: each is read as valid images, or refused in one line that names the file."""

import base64
import io
import itertools
import os
import pickle
import resource
import shutil
import stat
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from fedamm_pl.data.sources import ImageData, load_images, read_image_folder, read_npz, reading
from fedamm_pl.data.sources.in_memory import DOWNLOADABLE
from fedamm_pl.data.sources.npz import MAX_CLASSES

# numpy and Pillow may warn of odd headers before they read or refuse them: the outcome is what counts here
pytestmark = pytest.mark.filterwarnings("ignore")

# A failure has to come back in the next run, and nothing may depend on what is on the disk.
REPEATABLE = settings(deadline=None, derandomize=True, database=None)
DEFAULT, MANY = settings(REPEATABLE, max_examples=300), settings(REPEATABLE, max_examples=5000)

ARRAYS = {
    "x_train": np.arange(12, dtype=np.uint8).reshape(3, 2, 2),
    "y_train": np.array([0, 1, 2], dtype=np.uint8),
    "x_test": np.arange(8, dtype=np.uint8).reshape(2, 2, 2),
    "y_test": np.array([0, 1], dtype=np.int64),
}
METHODS = {
    "stored": zipfile.ZIP_STORED,
    "deflated": zipfile.ZIP_DEFLATED,
    "bzip2": zipfile.ZIP_BZIP2,
    "lzma": zipfile.ZIP_LZMA,
}


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=True)
    return file.getvalue()


def npy_of(header: str, content: bytes = bytes(12), version: tuple[int, int] = (1, 0)) -> bytes:
    """An npy file of any header, of the true length."""
    text = header.encode("utf-8") + b"\n"
    length = struct.pack("<H" if version[0] == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + length + text + content


MEMBERS = {name: npy(array) for name, array in ARRAYS.items()}


def archive(members: dict[str, bytes] | list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items() if isinstance(members, dict) else members:
            # a date of its own, so that the bytes are the same in every run
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), content, compress_type=method)
    return file.getvalue()


def with_member(name: str, content: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
    return archive({**MEMBERS, name: content}, method)


def assert_valid(data: ImageData) -> None:
    for images, labels in ((data.train_images, data.train_labels), (data.test_images, data.test_labels)):
        assert images.dtype == torch.uint8
        assert images.ndim == 4
        assert images.numel() > 0
        assert images.shape[1] in (1, 3)
        assert images.is_contiguous()
        assert labels.dtype == torch.int64
        assert labels.shape == images.shape[:1]
        assert labels.min() >= 0
        assert labels.max() < len(data.class_names)
    assert data.train_images.shape[1:] == data.test_images.shape[1:]


def read_or_refused(read: Callable[[], ImageData], named: Path, what: object) -> ImageData | None:
    """Read a file: valid images, or None after a ValueError of one line that names it; all else is a failure."""
    refusal = ""
    try:
        data = read()
    except ValueError as error:
        data, refusal = None, str(error)
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    if data is None:
        assert str(named) in refusal, (what, refusal)
        assert len(refusal.splitlines()) == 1, (what, refusal)
    else:
        assert_valid(data)
    return data


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("npz") / "mine.npz"


@pytest.fixture
def no_large_allocation() -> Iterator[None]:
    """Memory in use, in KiB on Linux, must not grow by what a file of a kilobyte claims to hold."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


@pytest.fixture
def check(path: Path, no_large_allocation: None) -> Callable[[bytes, object], ImageData | None]:
    def check(content: bytes, what: object) -> ImageData | None:
        path.write_bytes(content)
        return read_or_refused(lambda: read_npz(path), path, what)

    return check


Check = Callable[[bytes, object], ImageData | None]

# Damage to the archive


def test_undamaged_archive_is_read(check: Check) -> None:
    for method in METHODS.values():
        data = check(archive(MEMBERS, method), method)
        assert data is not None
        assert np.array_equal(data.train_images[:, 0], ARRAYS["x_train"])


@pytest.mark.parametrize("method", METHODS)
def test_archive_truncated_anywhere_is_refused(method: str, check: Check) -> None:
    whole = archive(MEMBERS, METHODS[method])
    for length in range(len(whole)):
        assert check(whole[:length], (method, length)) is None


def damaged_at(content: bytes, place: int) -> Iterator[tuple[str, bytes]]:
    """Single faults at one place: a byte changed, lost or added, and fields of four bytes at their limits."""
    before, byte, after = content[:place], content[place], content[place + 1 :]
    for mask in (0xFF, 0x80, 0x40, 0x01):
        yield f"xor {mask}", before + bytes([byte ^ mask]) + after
    yield "zero", before + b"\0" + after
    yield "lost", before + after
    yield "added", content[:place] + b"\0" + content[place:]
    for field in (b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f"):
        yield f"field {field!r}", content[:place] + field + content[place + 4 :]


@pytest.mark.parametrize("method", METHODS)
def test_archive_with_one_fault_anywhere_is_read_or_refused(method: str, check: Check) -> None:
    whole = archive(MEMBERS, METHODS[method])
    outcomes = [
        check(damaged, (method, place, fault)) is None
        for place in range(0, len(whole), 4)
        for fault, damaged in damaged_at(whole, place)
    ]
    assert any(outcomes)
    assert not all(outcomes)  # a date, for example, may be wrong


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_archive_with_many_a_fault_anywhere_is_read_or_refused(method: str, check: Check) -> None:
    whole = archive(MEMBERS, METHODS[method])
    for place, mask in itertools.product(range(len(whole)), range(1, 256, 5)):
        damaged = whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :]
        check(damaged, (method, place, mask))


@st.composite
def mangled(draw: st.DrawFn) -> bytes:
    """An archive with up to eight faults anywhere, or with parts of itself moved."""
    content = archive(MEMBERS, draw(st.sampled_from(sorted(METHODS.values()))))
    for _ in range(draw(st.integers(1, 8))):
        start, stop = sorted(draw(st.tuples(*[st.integers(0, len(content))] * 2)))
        piece = content[start:stop]
        new = draw(
            st.binary(max_size=8)
            | st.sampled_from([piece * 2, piece[::-1], b"", b"\xff" * len(piece), content[: len(piece)]])
        )
        content = content[:start] + new + content[stop if draw(st.booleans()) else start + len(new) :]
    return content


@pytest.mark.usefixtures("no_large_allocation")
@given(content=mangled())
@DEFAULT
def test_mangled_archive_is_read_or_refused(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    read_or_refused(lambda: read_npz(path), path, content)


@pytest.mark.slow
@given(content=mangled())
@MANY
def test_any_mangled_archive_is_read_or_refused(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    read_or_refused(lambda: read_npz(path), path, content)


# Damage inside a whole archive: checksums are right, what they guard is not

REPLACEMENTS = [b"", b"\0", b"(", b")", b"'", b'"', b"\\", b"#", b"\n", b"9", b"L", b",", b"999999999", b"\xff"]


@pytest.mark.parametrize("name", MEMBERS)
def test_array_truncated_anywhere_is_refused(name: str, check: Check) -> None:
    whole = MEMBERS[name]
    for length in range(len(whole)):
        assert check(with_member(name, whole[:length]), (name, length)) is None


@pytest.mark.parametrize("name", MEMBERS)
def test_array_with_one_fault_anywhere_is_read_or_refused(name: str, check: Check) -> None:
    whole = MEMBERS[name]
    for place, new in itertools.product(range(len(whole)), REPLACEMENTS):
        check(with_member(name, whole[:place] + new + whole[place + 1 :]), (name, place, new))


@pytest.mark.slow
@pytest.mark.parametrize("name", MEMBERS)
def test_array_with_many_a_fault_anywhere_is_read_or_refused(name: str, check: Check) -> None:
    whole = MEMBERS[name]
    for place, value in itertools.product(range(len(whole)), range(0, 256, 3)):
        check(with_member(name, whole[:place] + bytes([value]) + whole[place + 1 :]), (name, place, value))


TYPE_CODES = """
|u1 <u2 |i1 <i8 >i4 |b1 <f2 <f8 <c8 <m8[s] <M8[s] |O |S1 |S0 <U3 |V0 |V2000000000 |V99999999999 u1, , (2)u1 none
"""
DESCRIPTIONS = [
    *(*TYPE_CODES.split(), "", "\n", None, 5, [], {}, [("a", "|u1")], [("a", "|u1"), ("a", "|u1")], [("a", "|O")]),
    *(("|u1", (2,)), ("|u1", (10**12,))),
]
LENGTHS = st.integers(-2, 4) | st.sampled_from([True, 1.5, "3", 10**9, 2**31, 2**40, 2**62, 2**63, 2**64, 10**30])
HEADERS = st.one_of(
    st.fixed_dictionaries(
        {
            "descr": st.sampled_from(DESCRIPTIONS),
            "fortran_order": st.sampled_from([True, False, False, 0, None, "x"]),
            "shape": st.lists(LENGTHS, max_size=5).map(tuple) | st.sampled_from([3, None, [3], (1,) * 70]),
        },
        optional={"more": st.integers()},
    ).map(repr),
    st.text(alphabet="{}()[]',:\"\\#\n\t 0179Ldescrshape=-+*_jé\0", max_size=40),
    st.integers(1, 9000).map(lambda depth: "(" * depth),
    st.integers(1, 4000).map(lambda depth: "{'descr': " * depth),
    st.just(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({'9' * 5000},), }}"),
)
CONTENTS = st.builds(
    npy_of,
    HEADERS,
    st.binary(max_size=24),
    st.sampled_from([(1, 0), (2, 0), (3, 0), (1, 0), (0, 0), (9, 9)]),
) | st.binary(max_size=200)


@pytest.mark.usefixtures("no_large_allocation")
@given(name=st.sampled_from(sorted(MEMBERS)), content=CONTENTS, method=st.sampled_from(sorted(METHODS.values())))
@DEFAULT
def test_array_of_any_header_is_read_or_refused(name: str, content: bytes, method: int, path: Path) -> None:
    path.write_bytes(with_member(name, content, method))
    read_or_refused(lambda: read_npz(path), path, (name, content))


@pytest.mark.slow
@given(name=st.sampled_from(sorted(MEMBERS)), content=CONTENTS, method=st.sampled_from(sorted(METHODS.values())))
@MANY
def test_any_array_of_any_header_is_read_or_refused(name: str, content: bytes, method: int, path: Path) -> None:
    path.write_bytes(with_member(name, content, method))
    read_or_refused(lambda: read_npz(path), path, (name, content))


# What fuzzing found once
FOUND = {
    "bracket that is not closed": with_member("x_train", npy_of("{'descr': '|u1', 'shape': (3")),
    "comma as a type": with_member("y_test", npy_of("{'descr': ',', 'fortran_order': False, 'shape': (2,), }")),
    "images that are no array": with_member("x_train", b"no array at all"),
    "labels that are no array": with_member("y_train", b"no array at all"),
    "nothing where an array should be": with_member("x_test", b""),
    "terabytes": with_member(
        "x_train", npy_of("{'descr': '|u1', 'fortran_order': False, 'shape': (3, 1000000000, 1000000), }")
    ),
    "brackets without end": with_member("x_train", npy_of("(" * 9000)),
    "long header": with_member("x_train", npy_of("{'descr': '|u1', " + " " * 20_000, version=(2, 0))),
    "LZMA data with a fault": archive(MEMBERS, zipfile.ZIP_LZMA)[:45]
    + bytes([archive(MEMBERS, zipfile.ZIP_LZMA)[45] ^ 0xFF])
    + archive(MEMBERS, zipfile.ZIP_LZMA)[46:],
}


@pytest.mark.parametrize("what", FOUND)
def test_damage_of_this_kind_is_refused(what: str, check: Check) -> None:
    assert check(FOUND[what], what) is None


# Other arrays and other members

TYPES = [
    "uint8",
    "int8",
    "int64",
    "uint64",
    "float32",
    "float64",
    "bool",
    "complex64",
    "m8[s]",
    "M8[s]",
    "S3",
    "U2",
    "O",
]
SHAPES = [(), (0,), (3,), (2,), (3, 1), (1, 3), (3, 2), (3, 2, 2), (2, 2, 2), (0, 2, 2), (3, 0, 2), (3, 2, 2, 1)]
SHAPES += [(3, 2, 2, 3), (3, 2, 2, 4), (3, 2, 2, 0), (3, 2, 2, 3, 1)]


@pytest.mark.parametrize("name", ARRAYS)
def test_array_of_another_type_or_shape_is_read_or_refused(name: str, check: Check) -> None:
    for dtype, shape, value in itertools.product(TYPES, SHAPES, (0, 1)):
        content = npy(np.full(shape, value).astype(dtype))
        data = check(with_member(name, content), (name, dtype, shape, value))
        if name.startswith("x") and dtype != "uint8":
            assert data is None


VALUES = [-1, 3, 99_999, 100_000, 2**31, 2**32, 2**63 - 1, -(2**63), 2**63, 2**64 - 1, 0.0, 1.5, -0.0, np.nan, np.inf]


@pytest.mark.parametrize("name", ["y_train", "y_test"])
@pytest.mark.parametrize("value", VALUES)
def test_labels_are_whole_numbers_from_0_on(name: str, value: float, check: Check) -> None:
    labels = np.array([0, value] if name == "y_test" else [0, 1, value])
    data = check(with_member(name, npy(labels)), (name, value))
    assert data is None  # 3 and 99,999, too: the classes below have no image


def test_classes_have_training_images(path: Path) -> None:
    path.write_bytes(with_member("y_test", npy(np.array([0, MAX_CLASSES - 1]))))
    expected = rf"^Expected every class of {path} to have training examples, got none for class 3 and 99996 more of 100000: leave it out"
    with pytest.raises(ValueError, match=expected):
        read_npz(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.5])
def test_pixels_that_are_no_bytes_are_refused(value: float, check: Check) -> None:
    for name in ("x_train", "x_test"):
        assert check(with_member(name, npy(ARRAYS[name] + np.float32(value))), (name, value)) is None


MEMBER_NAMES = st.sampled_from(
    [*MEMBERS, "train_images", "train_labels", "test_images", "test_labels", "X_train"]
) | st.text(alphabet="xy_train/.\n\r\x1b\u2028é ", max_size=8)


@given(members=st.lists(st.tuples(MEMBER_NAMES, st.sampled_from(sorted(MEMBERS.values()))), max_size=8))
@DEFAULT
def test_members_lost_renamed_doubled_or_swapped_are_read_or_refused(
    members: list[tuple[str, bytes]], path: Path
) -> None:
    path.write_bytes(archive(members))
    read_or_refused(lambda: read_npz(path), path, members)


def test_member_with_a_line_break_in_its_name_is_refused_in_one_line(check: Check) -> None:
    assert check(archive([("x\ny", MEMBERS["x_train"])]), "line break") is None


# Hostile files


class Trap:
    """Unpickled, it would create a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.file), "w")


@pytest.mark.parametrize("name", MEMBERS)
def test_pickled_objects_are_never_loaded(name: str, check: Check, tmp_path: Path) -> None:
    trap = Trap(tmp_path / "executed")
    objects = np.array([trap, trap, trap], dtype=object)
    fields = np.array([(1, trap)], dtype=[("number", "i4"), ("object", "O")])
    bare = pickle.dumps(trap)
    header = "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    for content in (npy(objects), npy(fields), bare, npy_of(header, bare), npy_of(header.replace("|O", "O"), bare)):
        assert check(with_member(name, content), (name, content)) is None
    for content in (bare, npy(objects), MEMBERS[name]):
        assert check(content, (name, content)) is None
    assert not trap.file.exists()
    pickle.loads(bare).close()  # the trap works
    assert trap.file.exists()


def test_data_beyond_what_a_header_declares_are_not_unpacked(check: Check) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in MEMBERS.items():
            with archive.open(f"{name}.npy", "w") as member:
                member.write(content)
                for _ in range(300 if name == "x_train" else 0):  # MiB
                    member.write(bytes(2**20))
    assert len(file.getvalue()) < 2**20
    assert check(file.getvalue(), "bomb") is None


@pytest.mark.parametrize("declared", [2**31 - 1, 2**32 - 2])
def test_sizes_that_the_directory_only_claims_are_not_allocated(declared: int, check: Check) -> None:
    whole = archive(MEMBERS)
    size = struct.pack("<I", len(MEMBERS["x_train"]))
    assert whole.count(size) >= 4  # compressed and plain size, beside the data and in the directory
    check(whole.replace(size, struct.pack("<I", declared)), declared)


def blank(num_images: int, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """An archive whose training images are true zeros, a thousandth of their size; labels as many as there should be."""
    file = io.BytesIO()
    shape = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({num_images}, 1024, 1024), }}"
    members = {**MEMBERS, "y_train": npy(np.zeros(num_images, dtype=np.uint8))}
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items():
            with archive.open(f"{name}.npy", "w") as member:
                member.write(npy_of(shape, b"") if name == "x_train" else content)
                for _ in range(num_images if name == "x_train" else 0):
                    member.write(bytes(2**20))
    return file.getvalue()


@pytest.mark.usefixtures("no_large_allocation")
def test_archive_that_unpacks_to_a_thousand_times_its_size_is_refused(path: Path) -> None:
    path.write_bytes(blank(300))
    expected = rf"Expected {path} to hold examples, got a file of 0\.3 MB that unpacks to 314\.6 MB, more than 500 times as much"
    with pytest.raises(ValueError, match=expected):
        read_npz(path)


@pytest.mark.usefixtures("no_large_allocation")
def test_archive_is_compared_with_the_memory_before_it_is_unpacked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "available_memory", lambda: 10**7)
    path.write_bytes(blank(10, zipfile.ZIP_STORED))
    expected = rf"Expected the examples of {path} to fit into memory, got 10\.5 MB needed and 10\.0 MB available\."
    with pytest.raises(ValueError, match=expected):
        read_npz(path)


def test_memory_that_runs_out_is_not_called_damage(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> NoReturn:
        raise np._core._exceptions._ArrayMemoryError((10**9,), np.dtype(np.uint8))

    path.write_bytes(archive(MEMBERS))
    monkeypatch.setattr(np.lib.format, "read_array", fails)
    with pytest.raises(
        ValueError, match=rf"^Expected {path} to fit into memory, got more needed than the .* available\.$"
    ):
        read_npz(path)


LIMITED = """
import resource, sys
import torch
from fedamm_pl.data.sources import read_npz
from pathlib import Path
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**26,) * 2)
read_npz(Path(sys.argv[1]))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_limit_of_the_process_is_respected(path: Path) -> None:
    path.write_bytes(blank(100, zipfile.ZIP_STORED))
    ended = subprocess.run([sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    line = ended.stderr.splitlines()[-1]
    assert f"Expected the examples of {path} to fit into memory, got 104.9 MB needed and 6" in line


def test_available_memory_is_known_here() -> None:
    free = reading.available_memory()
    assert free is None or 0 < free < 2**60


def test_doubled_array_is_refused(path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        path.write_bytes(archive([*MEMBERS.items(), ("x_train", MEMBERS["x_train"])]))
    with pytest.raises(ValueError, match=rf"Expected {path} to hold x_train once, got it several times\."):
        read_npz(path)


def test_other_arrays_are_counted_and_named(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.write_bytes(archive({**MEMBERS, "val_images": MEMBERS["x_test"], "val\nlabels": MEMBERS["y_test"]}))
    read_npz(path)
    assert caplog.messages == [f"{path}: 2 other arrays are not used: val_images, val\\nlabels"]


@pytest.mark.parametrize(
    "content",
    [
        npy(np.array([{}, {}, {}], dtype=object)),
        npy_of("{'descr': '|u1', " + " " * 20_000, version=(2, 0)),
    ],
)
def test_advice_of_numpy_is_not_passed_on(content: bytes, path: Path) -> None:
    for damaged in (with_member("y_train", content), content, pickle.dumps([1])):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"^Expected {path} to be a") as caught:
            read_npz(path)
        assert "allow_pickle" not in str(caught.value)
        assert "max_header_size" not in str(caught.value)


# By name


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with an archive, and no data set that could be downloaded."""

    def offline(root: Path, train: bool, download: bool) -> NoReturn:
        raise RuntimeError("no network in this test")

    root = tmp_path_factory.mktemp("root")
    (root / "mine.npz").write_bytes(archive(MEMBERS))
    (root / "folder.npz").mkdir()
    (root / "file").touch()
    with pytest.MonkeyPatch.context() as patch:
        for name in DOWNLOADABLE:
            patch.setitem(DOWNLOADABLE, name, offline)
        yield root


NAMES = st.text(max_size=20) | st.sampled_from(
    [
        "mine",
        "folder",
        "file",
        "image_folder",
        "cifar10",
        "",
        ".",
        "..",
        "/",
        "mine.npz",
        "a" * 300,
        "a/" * 3000,
        "\0",
        "~",
    ]
)


# longer than a file's name may be: the system refuses even to look for it
@example(name="a" * 300, below="")
@example(name="image_folder", below="a" * 300)
@given(name=NAMES, below=st.sampled_from(["", "file", "mine.npz", "nowhere", "a" * 300, "\0"]))
@DEFAULT
def test_data_set_of_any_name_is_read_or_refused(name: str, below: str, root: Path) -> None:
    folder = str(root / below) if below else str(root)
    refusal = ""
    try:
        data = load_images(name, folder)
    except ValueError as error:
        data, refusal = None, str(error)
    if data is not None:
        assert_valid(data)
    else:
        assert refusal.startswith("Expected ")


# Image folders

PIXELS = np.arange(36, dtype=np.uint8).reshape(3, 4, 3) * 7
FORMATS = {"png": "png", "gif": "gif", "bmp": "bmp", "tif": "tiff", "webp": "webp", "jpg": "jpeg"}


def encoded(suffix: str, pixels: np.ndarray = PIXELS) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, FORMATS[suffix])
    return file.getvalue()


@pytest.fixture
def check_image(tmp_path: Path) -> Callable[[bytes, str, object], ImageData | None]:
    """Read a folder of which one training image is the one given; the test image is a good one."""
    for folder in ("train/a", "test/a"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "test/a/good.png").write_bytes(encoded("png"))

    def check(content: bytes, suffix: str, what: object) -> ImageData | None:
        image = tmp_path / f"train/a/image.{suffix}"
        image.write_bytes(content)
        return read_or_refused(lambda: read_image_folder(tmp_path), tmp_path, what)

    return check


CheckImage = Callable[[bytes, str, object], ImageData | None]


@pytest.mark.parametrize("suffix", FORMATS)
def test_image_truncated_anywhere_is_read_or_refused(suffix: str, check_image: CheckImage) -> None:
    whole = encoded(suffix)
    assert check_image(whole, suffix, suffix) is not None
    for length in range(0, len(whole), 4 if suffix == "jpg" else 1):
        check_image(whole[:length], suffix, (suffix, length))


@pytest.mark.parametrize("suffix", FORMATS)
def test_image_with_one_fault_anywhere_is_read_or_refused(suffix: str, check_image: CheckImage) -> None:
    whole = encoded(suffix)
    for place in range(0, len(whole), 16 if suffix == "jpg" else 3):
        for fault, damaged in damaged_at(whole, place):
            check_image(damaged, suffix, (suffix, place, fault))


@pytest.mark.slow
@pytest.mark.parametrize("suffix", FORMATS)
def test_image_with_many_a_fault_anywhere_is_read_or_refused(suffix: str, check_image: CheckImage) -> None:
    whole = encoded(suffix)
    for place, mask in itertools.product(range(0, len(whole), 4 if suffix == "jpg" else 1), range(1, 256, 5)):
        damaged = whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :]
        check_image(damaged, suffix, (suffix, place, mask))


# What fuzzing found once: a decoder may raise other errors than those of files, and errors that name none
FOUND_IMAGES = {
    "BMP of an unknown compression": ("bmp", encoded("bmp")[:30] + b"\1" + encoded("bmp")[31:]),
    "PNG with a short header": ("png", encoded("png")[:11] + b"\x0c" + encoded("png")[12:]),
    "GIF with a frame outside of it": (
        "gif",
        "M@dFFH(>+-0|0{n0O#)Y(%Im>#LK9!wv(Eneua!_aCcN&Vn0SrDls?}93ub+4gdfE000000000004x9i00aO7000OO02e4ofZ%|E0t5yK2ml};06P",
    ),
    "TIFF of an unknown number of dimensions": (
        "tif",
        "Nl7XI2mk;83IG5B1pom6000C4000321ONd500093000630{{a6004#n000940{{U400031000I70{{U400062000pI1ONd5004{t000#M0{{U40009"
        "3000&N1ONd500093000*O1ONd5001Na000~T0{{U40003100000000O82mlBG00#~g93v_*I6p>BR9j+caCd%%jFXz7sIRuY#LLpz;OFl3",
    ),
    "TIFF with a fraction for a whole number": (
        "tif",
        "Nl7XI2mk;83IG5B1ONd5000C4000321ONd500093000630{{a6004#n000940{{U400031000I70{{U400062000pI1pom6004{t000#M0{{U40009"
        "3000&N1ONd500093000*O1ONd5001Na000~T0{{U40003100000000O82mlBG00#~g93v_*I6p>BR9j+caCd%%jFXz7sIRuY#LLpz;OFl3",
    ),
}


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("what", FOUND_IMAGES)
def test_image_with_damage_of_this_kind_is_refused(
    what: str, part: str, check_image: CheckImage, tmp_path: Path
) -> None:
    suffix, content = FOUND_IMAGES[what]
    damaged = content if isinstance(content, bytes) else base64.b85decode(content)
    if part == "test":
        (tmp_path / f"test/a/damaged.{suffix}").write_bytes(damaged)
        damaged, suffix = encoded("png"), "png"
    assert check_image(damaged, suffix, what) is None


@pytest.mark.parametrize(
    "content", [b"", b"no image", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"RIFF", b"\xff\xd8"]
)
@pytest.mark.parametrize("suffix", FORMATS)
def test_file_that_is_no_image_is_refused(suffix: str, content: bytes, check_image: CheckImage) -> None:
    assert check_image(content, suffix, (suffix, content)) is None


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_image_of_sixteen_bits_is_refused(suffix: str, check_image: CheckImage) -> None:
    assert check_image(encoded(suffix, np.full((3, 4), 40_000, dtype=np.uint16)), suffix, suffix) is None


def test_picture_that_would_fill_the_memory_is_refused(check_image: CheckImage) -> None:
    whole = encoded("png")
    # width and height follow the signature, the length and the name of the first chunk; its checksum is left as it is
    sizes = struct.pack(">II", 2**31 - 1, 2**31 - 1)
    assert check_image(whole[:16] + sizes + whole[24:], "png", "huge") is None


# Folders of junk

JUNK_NAMES = st.sampled_from(
    [
        *("0.png", "1.PNG", "2.gif", "3.jpg", "4.tif", "5.webp", "notes.txt", "no_suffix", ".hidden.png", "Thumbs.db"),
        *(
            "__MACOSX",
            "@eaDir",
            "two\nlines.png",
            "\x1b[31m.png",
            "\u202egnp.png",
            "\udcff.png",
            "a" * 200 + ".png",
            "-rf.png",
        ),
    ]
)
JUNK_KINDS = st.sampled_from(
    [
        *("good", "good", "good", "empty", "text", "truncated", "huge", "alpha", "deep", "other size"),
        *("pipe", "socket", "folder", "loop", "broken link", "link", "device"),
    ]
)


def put(path: Path, kind: str, good: bytes) -> None:
    """Put something that is called like an image, and may be one."""
    huge = good[:16] + struct.pack(">II", 30_000, 5_000) + good[24:]
    contents = {"good": good, "empty": b"", "text": b"no image", "truncated": good[: len(good) // 2], "huge": huge}
    match kind:
        case "alpha":
            Image.new("RGBA", (3, 3), (0, 0, 0, 9)).save(path, "PNG")
        case "deep":
            path.write_bytes(encoded("png", np.full((3, 4), 40_000, dtype=np.uint16)))
        case "other size":
            path.write_bytes(encoded("png", PIXELS[:2]))
        case "pipe":
            os.mkfifo(path)
        case "socket":
            os.mknod(path, stat.S_IFSOCK | 0o600)
        case "folder":
            path.mkdir()
        case "loop":
            path.symlink_to(path)
        case "broken link":
            path.symlink_to(path.parent / "nowhere")
        case "link":
            path.symlink_to("/etc/hostname")
        case "device":
            path.symlink_to("/dev/zero")
        case _:
            path.write_bytes(contents[kind])


@pytest.mark.usefixtures("no_large_allocation")
@given(
    junk=st.dictionaries(
        st.tuples(st.sampled_from(["train", "train/a", "train/b", "test", "test/a", "."]), JUNK_NAMES),
        JUNK_KINDS,
        max_size=6,
    )
)
@settings(DEFAULT, max_examples=150)
def test_folder_of_junk_is_read_or_refused_and_left_as_it_is(
    junk: dict[tuple[str, str], str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, good = tmp_path_factory.mktemp("junk"), encoded("png")
    for place in ("train/a", "train/b", "test/a"):
        (folder / place).mkdir(parents=True)
        (folder / place / "good.png").write_bytes(good)
    for (place, name), kind in junk.items():
        put(folder / place / name, kind, good)
    before = sorted(map(str, folder.rglob("*")))
    read_or_refused(lambda: read_image_folder(folder), folder, junk)
    assert sorted(map(str, folder.rglob("*"))) == before
    shutil.rmtree(folder)
