"""Features in npz files: floats of any type and order become float32, and what is not finite is named with its place."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedamm_pl.data.sources import load_images

ARRAYS = {
    "x_train": np.array([[0.5, -1e30], [1 / 3, 2.0], [7.0, 0.0]]),
    "y_train": np.array([0, 1, 0]),
    "x_test": np.array([[1.5, 2.5]]),
    "y_test": np.array([[1]]),
}


def refused(folder: Path, **replaced: Any) -> str:
    np.savez(folder / "mine.npz", **{**ARRAYS, **replaced})
    with pytest.raises(ValueError, match="Expected") as caught:
        load_images("mine", folder)
    return str(caught.value).replace(str(folder), "F")


@pytest.mark.parametrize("kind", ["<f4", ">f4", "<f8", ">f8", "<f2", "longdouble"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_floats_of_any_type_and_order(kind: str, order: Any, tmp_path: Path) -> None:
    with np.errstate(over="ignore"):
        train = np.asarray(np.clip(ARRAYS["x_train"], -1e4, 1e4), dtype=kind, order=order)
    np.savez_compressed(tmp_path / "mine.npz", **{**ARRAYS, "x_train": train, "x_test": ARRAYS["x_test"].astype(kind)})
    data = load_images("mine", tmp_path)
    assert torch.equal(data.train_images[:], torch.from_numpy(train.astype(np.float32, order="C")))
    assert data.train_images[:].is_contiguous()
    assert data.test_images[:].tolist() == [[1.5, 2.5]]
    assert (data.train_labels.tolist(), data.test_labels.tolist()) == ([0, 1, 0], [1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])
def test_what_is_not_finite_is_named_with_its_place(bad: float, tmp_path: Path) -> None:
    train = ARRAYS["x_train"].copy()
    train[2, 1] = bad
    assert refused(tmp_path, x_train=train) == (
        "Expected train_images of F/mine.npz to be finite in float32, got NaN or infinity in row 2, column 1 (from 0)."
    )
    assert "test_images of F/mine.npz to be finite" in refused(tmp_path, x_test=np.array([[bad, 1]]))


@pytest.mark.parametrize(
    ("replaced", "said"),
    [
        ({"x_test": np.ones((1, 3))}, "to be of one shape (D,), got (2,) and (3,)"),
        ({"x_test": np.ones((1, 4, 4), np.uint8)}, "to be of one shape (C, H, W), got (2,) and (1, 4, 4)"),
        ({"x_train": np.ones((3, 2), np.int64)}, "or floats of shape (N, D), got int64 of shape (3, 2)"),
        ({"x_train": np.ones((3, 0))}, "or floats of shape (N, D), got float64 of shape (3, 0)"),
        ({"x_train": np.ones((3, 2, 2))}, "or floats of shape (N, D), got float64 of shape (3, 2, 2)"),
        (
            {"y_train": np.array([1, 2, 1])},
            "to have training examples, got none for class 0: leave it out, or number the classes",
        ),
        ({"y_train": np.array([0, 1])}, "y_train of F/mine.npz to be 3 integers"),
    ],
)
def test_mistakes(replaced: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert said in refused(tmp_path, **replaced)
