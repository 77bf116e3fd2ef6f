"""Arrays: every npz file and torchvision data set that can be read, and the message for every one that cannot."""

import errno
import os
import pickle
import struct
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch

from fedamm_pl.data.sources import load_images, read_npz
from fedamm_pl.data.sources.in_memory import DOWNLOADABLE

KERAS = ("x_train", "y_train", "x_test", "y_test")
MEDMNIST = ("train_images", "train_labels", "test_images", "test_labels")
TRAIN_LABELS, TEST_LABELS = np.arange(6) % 3, np.arange(3)


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


def arrays(keys: tuple[str, ...] = KERAS, **replaced: Any) -> dict[str, Any]:
    """Six training and three test images of 5 x 4 grey pixels in three classes, with some arrays replaced."""
    return {**dict(zip(keys, (pixels(6, 5, 4), TRAIN_LABELS, pixels(3, 5, 4), TEST_LABELS), strict=True)), **replaced}


def ten_classes(**replaced: Any) -> dict[str, Any]:
    """A training image of each of ten classes."""
    return arrays(**{"x_train": pixels(10, 5, 4), "y_train": np.arange(10), **replaced})


def save_npz(folder: Path, content: dict[str, Any], name: str = "mine") -> Path:
    np.savez(folder / f"{name}.npz", **content)
    return folder / f"{name}.npz"


def save_idx(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    path.write_bytes(header + values.astype(np.uint8).tobytes())


def save_fashion_mnist(root: Path) -> Path:
    raw = root / "FashionMNIST" / "raw"
    save_idx(raw / "train-images-idx3-ubyte", pixels(6, 28, 28))
    save_idx(raw / "train-labels-idx1-ubyte", TRAIN_LABELS)
    save_idx(raw / "t10k-images-idx3-ubyte", pixels(3, 28, 28))
    save_idx(raw / "t10k-labels-idx1-ubyte", TEST_LABELS)
    return raw


class FakeDownload:
    """Stands in for a torchvision data set: not on the disk; whether the network has it is up to the class."""

    calls: list[bool]
    reachable = True
    classes = ("ant", "bee", "cat")

    def __init__(self, root: Path, train: bool, download: bool) -> None:
        self.calls.append(download)
        if not download:
            raise RuntimeError("Dataset not found or corrupted.")
        if not self.reachable:
            raise URLError("no network in this test")
        self.data = pixels(6, 5, 4, 3) if train else pixels(3, 5, 4, 3)
        self.targets = (TRAIN_LABELS if train else TEST_LABELS).tolist()


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> type[FakeDownload]:
    """Replaces every downloadable data set, so that no test can touch a network."""

    class Network(FakeDownload):
        calls: list[bool] = []  # noqa: RUF012

    for name in DOWNLOADABLE:
        monkeypatch.setitem(DOWNLOADABLE, name, Network)
    return Network


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("keys", [KERAS, MEDMNIST])
def test_npz_is_read_with_keras_and_medmnist_keys(tmp_path: Path, keys: tuple[str, ...], compressed: bool) -> None:
    (np.savez_compressed if compressed else np.savez)(tmp_path / "mine.npz", **arrays(keys))
    images = load_images("mine", tmp_path)
    assert np.array_equal(images.train_images, pixels(6, 5, 4)[:, None])
    assert np.array_equal(images.test_images, pixels(3, 5, 4)[:, None])
    assert images.train_labels.tolist() == TRAIN_LABELS.tolist()
    assert images.test_labels.tolist() == TEST_LABELS.tolist()
    assert (images.train_images.dtype, images.train_labels.dtype) == (torch.uint8, torch.int64)
    assert images.class_names == ["0", "1", "2"]


def test_npz_may_hold_more_than_the_four_arrays(tmp_path: Path) -> None:
    path = save_npz(tmp_path, arrays(MEDMNIST, val_images=pixels(2, 5, 4), val_labels=np.arange(2)))
    assert len(read_npz(path).train_images) == 6


def test_colour_images_become_channels_first(tmp_path: Path) -> None:
    train, test = pixels(6, 5, 4, 3), pixels(3, 5, 4, 3)
    images = read_npz(save_npz(tmp_path, arrays(x_train=train, x_test=test)))
    assert images.train_images.shape == (6, 3, 5, 4)
    assert all(np.array_equal(images.train_images[:, channel], train[..., channel]) for channel in range(3))
    assert images.train_images.is_contiguous()


def test_grey_images_may_have_a_channel_axis(tmp_path: Path) -> None:
    content = arrays(x_train=pixels(6, 5, 4)[..., None], x_test=pixels(3, 5, 4)[..., None])
    assert np.array_equal(read_npz(save_npz(tmp_path, content)).train_images, pixels(6, 5, 4)[:, None])


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_labels_may_be_a_column_of_any_integers(tmp_path: Path, dtype: type) -> None:
    content = arrays(y_train=TRAIN_LABELS.astype(dtype)[:, None], y_test=TEST_LABELS.astype(dtype)[:, None])
    images = read_npz(save_npz(tmp_path, content))
    assert images.train_labels.tolist() == TRAIN_LABELS.tolist()
    assert images.train_labels.dtype == torch.int64


def test_a_class_of_the_test_set_alone_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="to have training examples, got none for class 3: leave it out"):
        read_npz(save_npz(tmp_path, arrays(y_test=np.array([0, 1, 3]))))


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion_mnist"])
def test_npz_stands_in_for_the_download(tmp_path: Path, network: type[FakeDownload], name: str) -> None:
    save_npz(tmp_path, ten_classes(), name)
    images = load_images(name, str(tmp_path))
    assert len(images.train_images) == 10
    assert network.calls == []


def test_npz_of_a_known_data_set_has_its_class_names(tmp_path: Path) -> None:
    save_npz(tmp_path, ten_classes(), "cifar10")
    assert load_images("cifar10", tmp_path).class_names[:3] == ["airplane", "automobile", "bird"]
    save_npz(tmp_path, ten_classes(y_test=np.array([0, 1, 10])), "cifar10")
    with pytest.raises(ValueError, match=r"Expected test_labels of .*cifar10\.npz to be in 0..9, got 0 to 10"):
        load_images("cifar10", tmp_path)


def test_shipped_images_are_balanced_and_need_no_root(network: type[FakeDownload]) -> None:
    images = load_images("fashion_mnist_mini", "no/such/folder")
    assert torch.bincount(images.train_labels).tolist() == [350] * 10
    assert torch.bincount(images.test_labels).tolist() == [100] * 10
    assert images.train_images.shape == (3500, 1, 28, 28)
    assert images.test_images.shape == (1000, 1, 28, 28)
    assert images.train_images.float().std() > 50  # photographs, neither blank nor scaled to 0..1
    assert images.class_names[-1] == "Ankle_boot"
    assert network.calls == []


def test_the_shipped_table(network: type[FakeDownload], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = load_images("digits", tmp_path)
    assert (data.train_images.shape, data.test_images.shape) == ((1442, 64), (355, 64))
    assert torch.bincount(data.train_labels).tolist() == [143, 146, 142, 147, 145, 146, 145, 144, 140, 144]
    assert torch.bincount(data.test_labels).tolist() == [35, 36, 35, 36, 36, 36, 36, 35, 34, 36]
    assert data.train_images[0, :8].tolist() == [0, 0, 5, 13, 9, 1, 0, 0]  # the first line of optdigits.tes
    assert data.class_names == [str(digit) for digit in range(10)]
    assert (network.calls, caplog.text) == ([], "")
    save_npz(tmp_path, arrays(), "digits")
    assert len(load_images("digits", tmp_path).train_labels) == 1442
    assert "digits of the package is read" in caplog.text


def test_torchvision_files_of_fashion_mnist_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DOWNLOADABLE["fashion_mnist"], "download", lambda self: pytest.fail("a download"))
    save_fashion_mnist(tmp_path)
    images = load_images("fashion_mnist", tmp_path)
    assert np.array_equal(images.train_images, pixels(6, 28, 28)[:, None])
    assert np.array_equal(images.test_images, pixels(3, 28, 28)[:, None])
    assert images.train_labels.tolist() == TRAIN_LABELS.tolist()
    assert images.test_labels.tolist() == TEST_LABELS.tolist()
    assert images.class_names[:2] == ["T-shirt/top", "Trouser"]


@pytest.mark.parametrize("content", [b"", b"\0\0\x08\x03", b"\0\0\x08\x03\0\0\0\x06\0\0\0\x1c\0\0\0\x1c" + b"\7" * 99])
def test_damaged_torchvision_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(DOWNLOADABLE["fashion_mnist"], "download", lambda self: None)  # finds its files there
    (save_fashion_mnist(tmp_path) / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match="Expected fashion_mnist under `root`"):
        load_images("fashion_mnist", tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion_mnist"])
def test_incomplete_files_of_torchvision_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def offline(self: object) -> None:
        raise URLError("no network in this test")

    kind = DOWNLOADABLE[name]
    monkeypatch.setattr(kind, "download", offline)
    folder = save_fashion_mnist(tmp_path).parent if name == "fashion_mnist" else tmp_path / kind.base_folder
    if name == "fashion_mnist":
        (folder / "raw" / "t10k-labels-idx1-ubyte").unlink()
    else:
        folder.mkdir()
        (folder / "data_batch_1").write_bytes(b"half of it")
    expected = (
        rf"^Expected {name} under `root` = .*, got files of it that are damaged or not complete: remove {folder} \("
    )
    with pytest.raises(ValueError, match=expected) as caught:
        load_images(name, tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_old_files_of_torchvision_that_are_no_tensors_are_refused_and_not_executed(tmp_path: Path) -> None:
    folder, marker = tmp_path / "FashionMNIST" / "processed", tmp_path / "executed"
    folder.mkdir(parents=True)
    for name in ("training.pt", "test.pt"):
        (folder / name).write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(
        ValueError, match=r"^Expected fashion_mnist under `root` = [^\n]*damaged or not complete[^\n]*$"
    ):
        load_images("fashion_mnist", tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize("error", [errno.EACCES, errno.EROFS])
def test_root_that_may_not_be_written_is_said(tmp_path: Path, network: type[FakeDownload], error: int) -> None:
    class ReadOnly(network):  # type: ignore[misc, valid-type]
        def __init__(self, root: Path, train: bool, download: bool) -> None:
            super().__init__(root, train, False) if not download else None
            raise OSError(error, os.strerror(error))

    DOWNLOADABLE["cifar10"] = ReadOnly  # the fixture puts the true one back
    with pytest.raises(ValueError, match=r"got a folder that may not be read or written \(.*\)\. Three ways"):
        load_images("cifar10", tmp_path)


def test_root_may_begin_with_the_home_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "sub").mkdir()
    save_npz(tmp_path / "sub", arrays())
    for root in ("~/sub", Path("~/sub")):
        assert len(load_images("mine", root).train_images) == 6
    with pytest.raises(ValueError, match=rf"`root` to hold {tmp_path}/none/mine\.npz"):
        load_images("mine", "~/none")


def test_name_may_have_its_suffix(tmp_path: Path) -> None:
    save_npz(tmp_path, arrays())
    assert len(load_images("mine.npz", tmp_path).train_images) == 6


def test_home_of_an_unknown_user_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"to be names of files, got 'mine' in '~nobody_of_that_name/x' \("):
        load_images("mine", "~nobody_of_that_name/x")


def test_environment_variables_are_left_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such file \(variables such as \$HOME are not replaced\)\.$"):
        load_images("mine", "$HOME/x")
    (tmp_path / "$HOME").mkdir()
    save_npz(tmp_path / "$HOME", arrays())
    assert len(load_images("mine", tmp_path / "$HOME").train_images) == 6


@pytest.mark.parametrize(("dataset", "root"), [("", "data"), ("mine", "")])
def test_empty_name_is_refused(dataset: str, root: str) -> None:
    with pytest.raises(ValueError, match=rf"Expected `dataset` and `root` to be names, got '{dataset}' and '{root}'\."):
        load_images(dataset, root)


@pytest.mark.parametrize("root", ["a\0b", "a" * 5000, "~" + "a" * 5000])
def test_root_that_no_file_can_have_is_refused_in_one_line(root: str) -> None:
    with pytest.raises(ValueError, match=r"^Expected `dataset` and `root` to be [^\n]*$") as caught:
        load_images("mine", root)
    assert len(str(caught.value)) < 400 or "\0" not in root


def test_missing_images_are_downloaded_once_asked_for(tmp_path: Path, network: type[FakeDownload]) -> None:
    images = load_images("cifar100", tmp_path)
    assert network.calls == [False, True, True]  # looked for, then training and test part
    assert np.array_equal(images.train_images, pixels(6, 5, 4, 3).transpose(0, 3, 1, 2))
    assert images.train_labels.tolist() == TRAIN_LABELS.tolist()
    assert images.test_images.shape == (3, 3, 5, 4)
    assert images.class_names == ["ant", "bee", "cat"]


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion_mnist"])
def test_no_data_and_no_network_names_three_ways(tmp_path: Path, network: type[FakeDownload], name: str) -> None:
    network.reachable = False
    with pytest.raises(ValueError, match=r"got neither .*no network in this test.* Three ways") as caught:
        load_images(name, tmp_path)
    assert str(tmp_path / f"{name}.npz") in str(caught.value)
    assert "fashion_mnist_mini and digits need none" in str(caught.value)


def test_unknown_name_lists_what_is_known(tmp_path: Path, network: type[FakeDownload]) -> None:
    with pytest.raises(ValueError, match=r"one of cifar10, cifar100, .*mnist\.npz .*got 'mnist' and no such file"):
        load_images("mnist", tmp_path)
    with pytest.raises(ValueError, match="got 'image_folder' and no such file"):
        load_images("image_folder", tmp_path / "missing")


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"x_train": pixels(6, 5, 4) / 255.0}, "x_train of .* to be uint8 .* got float64 of shape"),
        ({"x_test": pixels(3, 5, 4).astype(np.int64)}, "x_test of .* to be uint8 .* got int64"),
        ({"x_train": pixels(6, 20)}, r"x_train of .* to be uint8 of shape \(N, H, W\) .* got uint8 of shape \(6, 20\)"),
        ({"x_test": pixels(0, 5, 4)}, r"x_test of .* got uint8 of shape \(0, 5, 4\)"),
        ({"y_train": TRAIN_LABELS - 1}, "y_train of .* to be in 0..99999, got -1"),
        ({"y_train": TRAIN_LABELS[:5]}, r"y_train of .* to be 6 integers, got int64 of shape \(5,\)"),
        ({"y_test": np.eye(3, dtype=np.int64)}, r"y_test of .* to be 3 integers, got int64 of shape \(3, 3\)"),
        ({"y_train": TRAIN_LABELS.astype(np.float32)}, "y_train of .* to be 6 integers, got float32"),
        ({"y_test": np.array(["a", "b", "c"])}, "y_test of .* to be 3 integers, got <U1"),
        ({"x_test": pixels(3, 4, 5)}, r"to be of one shape \(C, H, W\), got \(1, 5, 4\) and \(1, 4, 5\)"),
        ({"x_test": pixels(3, 5, 4, 3)}, r"to be of one shape \(C, H, W\), got \(1, 5, 4\) and \(3, 5, 4\)"),
    ],
)
def test_npz_with_a_wrong_array_is_refused(tmp_path: Path, replaced: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_npz(save_npz(tmp_path, arrays(**replaced)))


@pytest.mark.parametrize("missing", KERAS)
def test_npz_without_one_of_its_arrays_is_refused(tmp_path: Path, missing: str) -> None:
    content = arrays()
    del content[missing]
    with pytest.raises(ValueError, match=r"mine\.npz to hold x_train, y_train, .* or train_images, .*, got ") as caught:
        read_npz(save_npz(tmp_path, content))
    assert str(caught.value).endswith(f"got {', '.join(content)}.")


def test_empty_npz_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got nothing"):
        read_npz(save_npz(tmp_path, {}))


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def test_pickled_objects_are_refused_and_not_executed(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    path = save_npz(tmp_path, arrays(y_train=np.array([Bomb(marker)] * 6, dtype=object)))
    with pytest.raises(ValueError, match=r"Expected .*mine\.npz to be an npz file of plain arrays"):
        read_npz(path)
    assert not marker.exists()
    with np.load(path, allow_pickle=True) as archive:
        archive["y_train"]
    assert marker.exists()  # the bomb works


def test_pickle_named_npz_is_refused_and_not_executed(tmp_path: Path) -> None:
    marker, path = tmp_path / "executed", tmp_path / "mine.npz"
    path.write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(ValueError, match=r"Expected .*mine\.npz to be"):
        read_npz(path)
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\3\4", b"\x93NUMPY", b"\0" * 500])
def test_file_that_is_no_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"Expected .*mine\.npz to be"):
        read_npz(path)


def test_single_array_named_npz_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    with path.open("wb") as file:
        np.save(file, pixels(6, 5, 4))
    with pytest.raises(ValueError, match=r"Expected .*mine\.npz to be a whole npz file"):
        read_npz(path)


def test_pipe_or_device_named_npz_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "device.npz").symlink_to("/dev/zero")
    (tmp_path / "folder.npz").mkdir()
    for name in ("pipe", "device", "folder"):
        for read in (lambda name: read_npz(tmp_path / f"{name}.npz"), lambda name: load_images(name, tmp_path)):
            with pytest.raises(ValueError, match=rf"Expected .*{name}\.npz to be a whole npz .*not a regular file"):
                read(name)


def test_link_to_an_npz_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link.npz").symlink_to(save_npz(tmp_path, arrays()))
    assert len(read_npz(tmp_path / "link.npz").train_images) == 6


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.999])
def test_truncated_npz_is_refused(tmp_path: Path, share: float) -> None:
    path = save_npz(tmp_path, arrays())
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"Expected .*mine\.npz to be"):
        read_npz(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_one_damaged_byte_gives_the_same_images_or_one_clear_error(tmp_path: Path, save: Any) -> None:
    path = tmp_path / "mine.npz"
    save(path, **arrays())
    content, refused = path.read_bytes(), 0
    for position in range(0, len(content), 3):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :])
        try:
            images = read_npz(path)
        except ValueError as error:
            assert str(error).startswith("Expected ")  # noqa: PT017
            assert str(path) in str(error)  # noqa: PT017
            refused += 1
        else:
            assert np.array_equal(images.train_images, pixels(6, 5, 4)[:, None])
            assert images.train_labels.tolist() == TRAIN_LABELS.tolist()
    assert refused > 50
