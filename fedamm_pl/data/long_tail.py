"""Long-tailed class profiles, balanced meta and validation sets (Cui et al., CVPR 2019; Qian et al., FedAMM)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Profile = Literal["exponential", "step", "none"]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LongTailSplit:
    """Indices of the examples for training, of the server's meta set, and of the validation set.

    Attributes:
        train: Sorted indices of the long-tailed training set.
        meta: Indices of the balanced meta set, grouped by class.
        class_counts: Training images per class, by class index.
        validation: Indices of the balanced validation set, grouped by class.
    """

    train: Indices
    meta: Indices
    class_counts: list[int]
    validation: Indices


def long_tail_counts(num_classes: int, largest: float, imbalance_factor: float, profile: Profile) -> list[int]:
    """Return the number of examples that the class at each rank keeps.

    ``exponential``: ``int(largest * imbalance_factor ** (rank / (num_classes - 1)))``. ``step``: the first half of the
    ranks keep ``int(largest)``, the others ``int(largest * imbalance_factor)``. ``none``: no bound.

    Args:
        num_classes: Number of classes C.
        largest: Examples of the class of rank 0, ``(N - (m + v) * C) / C`` for a balanced set of N with m meta and v
            validation images per class.
        imbalance_factor: Size of the smallest class divided by that of the largest, in (0, 1]; papers give its
            reciprocal as IF.
        profile: The shape of the tail.

    Returns:
        Counts by rank, largest first.

    Raises:
        ValueError: If ``imbalance_factor`` is outside (0, 1] or the profile is unknown.

    Example:
        >>> long_tail_counts(10, 4990, 0.01, "exponential")
        [4990, 2991, 1793, 1075, 644, 386, 231, 138, 83, 49]
    """
    if not 0 < imbalance_factor <= 1:
        raise ValueError(f"Expected `imbalance_factor` to be in (0, 1], got {imbalance_factor}.")
    match profile:
        case "exponential":
            steps = max(num_classes - 1, 1)
            return [int(largest * imbalance_factor ** (rank / steps)) for rank in range(num_classes)]
        case "step":
            head = num_classes // 2
            return [int(largest)] * head + [int(largest * imbalance_factor)] * (num_classes - head)
        case "none":
            return [np.iinfo(np.int64).max] * num_classes
    raise ValueError(f"Expected `imbalance_profile` to be exponential, step or none, got {profile!r}.")


def long_tail_split(
    labels: npt.NDArray[np.integer],
    num_classes: int,
    rng: np.random.Generator,
    *,
    num_meta_per_class: int = 10,
    num_val_per_class: int = 0,
    imbalance_factor: float = 0.01,
    profile: Profile = "exponential",
    shuffle_ranks: bool = False,
    ranks_by_size: bool = False,
    largest_class: int | None = None,
    class_names: Sequence[str] | None = None,
) -> LongTailSplit:
    """Take the meta set and the validation set out of a training set, and cut the rest to a long tail.

    Args:
        labels: Labels of the whole training set, shape (N,), in ``0..num_classes - 1``.
        num_classes: Number of classes C.
        rng: Source of all draws.
        num_meta_per_class: Images m per class that the server keeps; 0 for none.
        num_val_per_class: Images v per class for validation; 0 for none.
        imbalance_factor: Size of the smallest class divided by that of the largest, in (0, 1].
        profile: The shape of the tail, see :func:`long_tail_counts`.
        shuffle_ranks: Assign ranks to classes at random; otherwise rank = class index.
        ranks_by_size: Rank classes by their sizes in the data, largest first (ties by index).
        largest_class: Examples of the class of rank 0; None: (N - (m + v) * C) / C.
        class_names: Names for error messages.

    Returns:
        Disjoint training, meta and validation indices with the class counts of the training set.

    Raises:
        ValueError: If a class has fewer than m + v + 1 examples, or an option is out of range.
    """
    for option, value in (("num_meta_per_class", num_meta_per_class), ("num_val_per_class", num_val_per_class)):
        if value < 0:
            raise ValueError(f"Expected `{option}` to be 0 or more, got {value}.")
    if shuffle_ranks and ranks_by_size:
        raise ValueError("Expected `shuffle_ranks` and `ranks_by_size` not to be given both, got true for both.")
    available, taken = np.bincount(labels, minlength=num_classes), num_meta_per_class + num_val_per_class
    smallest = int(available.argmin())
    if available[smallest] < taken + 1:
        name = class_names[smallest] if class_names else smallest
        names = ["num_meta_per_class", "num_val_per_class"][: 1 + (num_val_per_class > 0)]
        raise ValueError(
            f"Expected every class to have at least {' + '.join(names)} + 1 = {taken + 1} training examples, got "
            f"{available[smallest]} for class {name}: lower {' or '.join(f'`{name}`' for name in names)} or leave the class out."
        )
    largest = (len(labels) - taken * num_classes) / num_classes
    if largest_class is not None:
        if profile == "none" or not 1 <= largest_class <= available.max() - taken:
            raise ValueError(
                f"Expected `largest_class` to be null, or with a tail from 1 to the {available.max() - taken} examples that a "
                f"class has left, got {largest_class} with imbalance_profile {profile}."
            )
        largest = largest_class
    counts = long_tail_counts(num_classes, largest, imbalance_factor, profile)
    if min(counts) < 1:
        raise ValueError(
            f"Expected `imbalance_factor` to leave every class at least 1 training example, got {imbalance_factor} with "
            f"{int(largest)} examples in the largest class; `imbalance_profile` none cuts no tail."
        )
    ranks = rng.permutation(num_classes) if shuffle_ranks else np.arange(num_classes)
    if ranks_by_size:
        ranks[np.argsort(-available, kind="stable")] = np.arange(num_classes)
    meta, validation, train = [], [], []
    for label in range(num_classes):
        order = rng.permutation(np.flatnonzero(labels == label))
        meta.append(order[:num_meta_per_class])
        validation.append(order[num_meta_per_class:taken])
        train.append(order[taken:][: counts[ranks[label]]])
    class_counts = [len(kept) for kept in train]
    return LongTailSplit(np.sort(np.concatenate(train)), np.concatenate(meta), class_counts, np.concatenate(validation))
