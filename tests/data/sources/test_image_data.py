"""Images from somebody's own code: converted where it is clear what they are, else one line that names the part."""

import dataclasses
import logging
from typing import Any

import numpy as np
import pytest
import torch

from fedamm_pl.data import FederatedDataModule, ImageData
from fedamm_pl.data.sources import image_data

NUM_TRAIN, NUM_TEST = 12, 4
TRAIN_LABELS, TEST_LABELS = torch.arange(NUM_TRAIN) % 4, torch.arange(NUM_TEST)


def pixels(*shape: int) -> torch.Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(sum(shape)))


GOOD = ImageData(pixels(12, 3, 6, 8), TRAIN_LABELS, pixels(4, 3, 6, 8), TEST_LABELS, ["a", "b", "c", "d"])
FIELDS = [field.name for field in dataclasses.fields(ImageData)][:5]


def with_part(**replaced: Any) -> ImageData:
    return dataclasses.replace(GOOD, **replaced)


def assert_same(first: ImageData, second: ImageData) -> None:
    for name in FIELDS[:4]:
        one, other = getattr(first, name), getattr(second, name)
        assert one.dtype == other.dtype
        assert torch.equal(one, other), name
        assert one.is_contiguous()
    assert first.class_names == second.class_names


def test_what_is_right_is_taken_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    data = image_data(GOOD)
    assert_same(data, GOOD)
    assert data.train_images is GOOD.train_images
    assert caplog.messages == []


@pytest.mark.parametrize(
    "labels",
    [
        TRAIN_LABELS.tolist(),
        tuple(TRAIN_LABELS.tolist()),
        TRAIN_LABELS.numpy(),
        TRAIN_LABELS.numpy().astype(np.uint8),
        TRAIN_LABELS.numpy().astype(np.uint64),
        TRAIN_LABELS.numpy().astype(np.float32),
        TRAIN_LABELS.int(),
        TRAIN_LABELS.double(),
        TRAIN_LABELS[:, None],
        list(TRAIN_LABELS),
        [float(label) for label in TRAIN_LABELS],
    ],
)
def test_labels_may_be_whole_numbers_of_any_kind(labels: Any) -> None:
    assert_same(image_data(with_part(train_labels=labels)), GOOD)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (None, ["0", "1", "2", "3"]),
        ([0, 1, 2, 3], ["0", "1", "2", "3"]),
        (np.arange(4), ["0", "1", "2", "3"]),
        ([np.int64(7), "b", "c", 9], ["7", "b", "c", "9"]),
        (("a", "b", "c", "d"), ["a", "b", "c", "d"]),
        (np.array(["a", "b", "c", "d"]), ["a", "b", "c", "d"]),
    ],
)
def test_names_may_be_numbers_or_nothing(names: Any, expected: list[str]) -> None:
    found = image_data(with_part(class_names=names)).class_names
    assert found == expected
    assert all(type(name) is str for name in found)


def test_images_may_be_arrays() -> None:
    read_only = GOOD.test_images.numpy().copy()
    read_only.flags.writeable = False
    assert_same(image_data(with_part(train_images=GOOD.train_images.numpy(), test_images=read_only)), GOOD)


def test_channels_may_be_last_where_that_is_clear_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    last = {name: getattr(GOOD, name).permute(0, 2, 3, 1) for name in ("train_images", "test_images")}
    with caplog.at_level(logging.INFO):
        assert_same(image_data(with_part(**last)), GOOD)
    assert caplog.messages == ["images of shape (12, 6, 8, 3) are interpreted as (N, H, W, C), channels last"]
    grey = with_part(train_images=GOOD.train_images[:, 0], test_images=GOOD.test_images[:, 0].numpy()[..., None])
    assert image_data(grey).train_images.shape == (12, 1, 6, 8)


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_channels_that_seem_to_be_last_are_refused(channels: int) -> None:
    images = torch.zeros(12, 6, 6, channels, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"to be of shape \(N, C, H, W\), got .* looks like channels last: permute"):
        image_data(with_part(train_images=images))


def test_rows_are_one_an_example() -> None:
    rows = {"train": torch.arange(12), "test": torch.arange(12, 16)}
    assert image_data(with_part(rows=rows)).rows == rows
    with pytest.raises(ValueError, match=r"Expected rows to be those of the examples, .*'test': 4.* got .*'test': 3"):
        image_data(with_part(rows={**rows, "test": torch.arange(3)}))


@pytest.mark.parametrize("shape", [(3, 32, 3), (64, 1, 1), (1, 1, 64), (2, 6, 6), (4, 6, 1)])
def test_channels_are_first_wherever_they_may_be(shape: tuple[int, int, int], caplog: pytest.LogCaptureFixture) -> None:
    images = with_part(train_images=pixels(12, *shape), test_images=pixels(4, *shape))
    assert image_data(images).train_images.shape == (12, *shape)
    assert caplog.messages == []


@pytest.mark.parametrize(
    "loaded",
    [
        tuple(getattr(GOOD, name) for name in FIELDS),
        [getattr(GOOD, name) for name in FIELDS],
        ((GOOD.train_images, TRAIN_LABELS), (GOOD.test_images, TEST_LABELS)),
        (GOOD.train_images.numpy(), TRAIN_LABELS.numpy(), GOOD.test_images.numpy(), TEST_LABELS.numpy()),
    ],
)
def test_parts_may_come_as_a_tuple(loaded: Any) -> None:
    data = image_data(loaded)
    assert torch.equal(data.train_images, GOOD.train_images)
    assert torch.equal(data.test_labels, TEST_LABELS)
    assert data.class_names in (["0", "1", "2", "3"], ["a", "b", "c", "d"])


@pytest.mark.parametrize(
    ("loaded", "got"),
    [(None, "NoneType"), ({"x_train": 1}, "dict"), ((1, 2, 3), "a tuple of 3 int"), ("abcd", "str"), ([], "list")],
)
def test_anything_else_is_refused(loaded: Any, got: str) -> None:
    expected = rf"^Expected `load_images` to return ImageData\(train_images, .*, class_names\), got {got}\.$"
    with pytest.raises(ValueError, match=expected):
        image_data(loaded)


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        (
            {"train_images": GOOD.train_images / 255},
            r"train_images to be .* uint8 .*, got torch.float32 of shape \(12, 3",
        ),
        ({"test_images": GOOD.test_images.long()}, "test_images to be .* got torch.int64 of shape"),
        ({"train_images": GOOD.train_images.numpy() / 255}, "train_images to be .* got float64 of shape"),
        ({"train_images": GOOD.train_images.flatten(1)}, r"train_images to be .* got torch.uint8 of shape \(12, 144\)"),
        ({"train_images": [1, 2]}, "train_images to be .* got a list of 2 int: pixels are whole numbers"),
        ({"train_images": None}, "train_images to be .* got NoneType"),
        (
            {"train_labels": TRAIN_LABELS + 0.5},
            "train_labels to be one whole number per image, got torch.float32 of shape",
        ),
        ({"train_labels": TRAIN_LABELS * float("nan")}, "train_labels to be one whole number per image"),
        ({"test_labels": [0, 1, 2, 2**70]}, "test_labels to be one whole number per image, got a list of 4 int"),
        ({"test_labels": np.array([0, 1, 2, 2**64 - 1], np.uint64)}, "test_labels to be one whole number"),
        ({"test_labels": ["a", "b", "c", "d"]}, "test_labels to be one whole number per image, got a list of 4 str"),
        ({"test_labels": [[0], [1, 2]]}, "test_labels to be one whole number per image, got a list of 2 list"),
        (
            {"test_labels": torch.eye(4)},
            r"test_labels to be one whole number per image, got torch.float32 of shape \(4, 4\)",
        ),
        ({"test_labels": None}, "test_labels to be one whole number per image, got NoneType"),
        ({"test_labels": [0, 1, 2]}, r"test_labels to be 4 of int64, got torch.int64 of shape \(3,\)"),
        ({"train_labels": TRAIN_LABELS - 1}, r"train_labels to be in 0\.\.3, got -1 to 2"),
        ({"class_names": ["a", "b", "c"]}, r"train_labels to be in 0\.\.2, got 0 to 3"),
        ({"class_names": "abcd"}, "class_names to be a list of texts, one per class, got str"),
        ({"class_names": {0: "a"}}, "class_names to be a list of texts, one per class, got dict"),
        (
            {"class_names": [0.0, 1.0, 2.0, 3.0]},
            "class_names to be a list of texts, one per class, got a list of 4 float",
        ),
        ({"class_names": ["a", None, "c", "d"]}, "got a list of 4 NoneType and str"),
        ({"class_names": ["a", "b", "c" * 1001, "d"]}, "class_names to have at most 1,000 characters, got 1,001"),
        ({"class_names": ["a", "b", "a", "d"]}, "class_names to differ, got 'a' twice"),
        ({"class_names": ["a", "b", "\u00e9", "e\u0301"]}, "class_names to differ, got 'e\u0301' twice"),
        ({"class_names": ["a", "", "c", "d"]}, "class_names to be names without .* got ''"),
        ({"class_names": ["a", " ", "c", "d"]}, "class_names to be names without .* got ' '"),
        ({"class_names": ["a", "b\n", "c", "d"]}, r"class_names to be names without .* got 'b\\n'"),
        ({"class_names": ["a", "b\0", "c", "d"]}, r"class_names to be names without .* got 'b\\x00'"),
        ({"class_names": ["a", "b\udc80", "c", "d"]}, r"class_names to be names without .* got 'b\\udc80'"),
        ({"class_names": list("abcde")}, "every class to have training examples, got none for class e: leave it out"),
        ({"train_labels": TRAIN_LABELS % 2, "class_names": None}, "got none for class 2 and 1 more of 4"),
    ],
)
def test_part_that_is_wrong_is_named_in_one_line(replaced: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        image_data(with_part(**replaced))
    assert str(caught.value).startswith("Expected ")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["Käse", "カタカナ", "a/b", "🦜 👩‍🔬", "-", "$x$", "<b>"])
def test_names_of_any_language_are_taken(name: str) -> None:
    assert image_data(with_part(class_names=[name, "b", "c", "d"])).class_names[0] == name


def test_wrong_part_is_refused_before_anything_is_done_with_it(caplog: pytest.LogCaptureFixture) -> None:
    class Mine(FederatedDataModule):
        def load_images(self) -> Any:
            return with_part(class_names={"a"})

    with (
        caplog.at_level(logging.DEBUG),
        pytest.raises(ValueError, match=r"class_names to be a list of texts, .* got set"),
    ):
        Mine(num_clients=2, num_meta_per_class=1).setup()
    assert caplog.messages == []


def test_own_images_of_other_kinds_are_trained_on() -> None:
    class Mine(FederatedDataModule):
        def load_images(self) -> Any:
            return (
                GOOD.train_images.permute(0, 2, 3, 1).numpy(),
                TRAIN_LABELS.tolist(),
                GOOD.test_images.permute(0, 2, 3, 1).numpy(),
                TEST_LABELS.numpy().astype(np.int32),
                range(4),
            )

    data = Mine(num_clients=2, num_meta_per_class=1, imbalance_factor=1)
    assert data.info["class_names"] == ["0", "1", "2", "3"]
    assert data.info["class_counts"] == [2, 2, 2, 2]
    assert torch.equal(data.images.train_images, GOOD.train_images)


@pytest.mark.parametrize(
    ("clients", "got"),
    [("abababab", "str"), (dict.fromkeys(range(12), "a"), "dict"), (3, "int"), ([1.0] * 12, "1.0 for example 0")],
)
def test_clients_that_are_no_names_one_an_example(clients: Any, got: str) -> None:
    with pytest.raises(ValueError, match=f"^Expected clients to be names, one per training example, got {got}"):
        image_data(with_part(clients=clients))


def features(**changed: Any) -> Any:
    values = torch.arange(24.0).view(12, 2)
    return (changed.get("train", values), TRAIN_LABELS, values[:4], TEST_LABELS)


def test_features_that_have_gradients_are_values_all_the_same() -> None:
    data = image_data(features(train=torch.ones(12, 2, requires_grad=True)))
    assert isinstance(data.train_images, torch.Tensor)
    assert not data.train_images.requires_grad
