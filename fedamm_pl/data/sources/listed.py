"""``Listed``: examples listed in a file, and their conversion to a data set with classes, parts and clients."""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedamm_pl.data.sources.image_data import ImageData, check_images, check_names
from fedamm_pl.data.sources.options import say_unused_share
from fedamm_pl.data.sources.reading import UnusableFileError, some
from fedamm_pl.data.sources.source import Source, subset
from fedamm_pl.seeding import numpy_generator
from fedamm_pl.terminal import printable

Texts = npt.NDArray[np.str_]
PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Common name of a part of a data set, in lower case -> its name here."""
WHOLE = re.compile(r"0|-?[1-9][0-9]{0,17}")
"""A whole number in the usual notation."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Listed:
    """Examples in the order of a file.

    Attributes:
        images: All examples, N images or rows of features.
        labels: The label of each in the file: integers or texts.
        parts: train, val or test for each, see :data:`PARTS`; None: not in the file.
        clients: The client of each; None: not in the file.
        where: The file, for messages.
        place: Number of an example, from 0 -> its name in messages, for example "row 3".
    """

    images: Source
    labels: Sequence[int | str]
    parts: Sequence[str] | None
    clients: Sequence[str] | None
    where: str
    place: Callable[[int], str]


def data_set(listed: Listed, test_fraction: float, seed: int) -> ImageData:
    """Number the classes and divide the examples into training, validation and test parts.

    The classes are the different labels of the training examples, integers sorted by value and texts alphabetically;
    integers may start at any number. If there are no test examples, a share of each class is drawn for testing with the
    seed. Validation and test examples of a class without training examples are left out, which is logged.

    Args:
        listed: The examples.
        test_fraction: The share, in (0, 1). The number is rounded, but each class keeps at least one example, and gives
            at least one if it has two or more. 0: test examples are not required.
        seed: Seed of the draw.

    Raises:
        ValueError: If a label, part or client is empty or unknown, or there are no training or no test examples.
    """
    if not len(listed.labels):
        raise UnusableFileError(f"Expected {listed.where} to hold examples, got none.")
    parts = _parts(listed)
    _require_filled("label", listed.labels, np.arange(len(parts)), listed)
    if listed.clients is not None:
        _require_filled("client of a training example", listed.clients, np.flatnonzero(parts == "train"), listed)
    labels, known = _as_numbers(listed.labels, np.flatnonzero(parts == "train").tolist())
    number = {label: position for position, label in enumerate(known)}
    names = [str(label) for label in known]
    check_names(names, f" of {listed.where}")
    if 2 * len(names) > (parts == "train").sum() > 10:
        log.warning(
            "%s: %d classes for %d training examples: are these labels?",
            listed.where,
            len(names),
            (parts == "train").sum(),
        )
    classes = np.array([number.get(label, -1) for label in labels])
    _say_left_out(classes, parts, labels, listed)
    if "test" in parts:
        say_unused_share(test_fraction, listed.where)
    elif test_fraction:
        parts = _with_test_part(classes, parts, names, test_fraction, seed, listed.clients)
    chosen = {part: torch.from_numpy(np.flatnonzero((parts == part) & (classes >= 0))) for part in np.unique(parts)}
    if empty := [part for part in ("train", "test")[: 2 if test_fraction else 1] if not len(chosen.get(part, ()))]:
        known_none = " of a class that has training examples" if empty[0] in parts else ""
        raise UnusableFileError(f"Expected {listed.where} to hold {empty[0]} examples, got none{known_none}.")
    numbers = torch.from_numpy(classes)

    def part(name: str) -> tuple[Source, Tensor]:
        mine = chosen.get(name, torch.empty(0, dtype=torch.int64))
        return subset(listed.images, mine), numbers[mine]

    clients = listed.clients and [listed.clients[i] for i in chosen["train"].tolist()]
    chosen = {name: rows for name, rows in chosen.items() if len(rows)}
    val = part("val") if "val" in chosen else (None, None)
    data = ImageData(*part("train"), *part("test"), names, clients, val[0], val[1], chosen)
    check_images(data, f" of {listed.where}")
    return data


def _require_filled(what: str, values: Sequence[int | str], where: npt.NDArray[np.intp], listed: Listed) -> None:
    blank = {value for value in set(values) if not str(value).strip()}
    bad = next((i for i in where.tolist() if values[i] in blank), None) if blank else None
    if bad is not None:
        raise UnusableFileError(
            f"Expected every {what} in {listed.where} to be given, got none in {listed.place(bad)}."
        )


def _parts(listed: Listed) -> Texts:
    if listed.parts is None:
        return np.full(len(listed.labels), "train")
    names = {value: PARTS.get(str(value).strip().lower(), "") for value in set(listed.parts)}
    parts = [names[value] for value in listed.parts]
    if "" in parts:
        bad = parts.index("")
        raise UnusableFileError(
            f"Expected every split in {listed.where} to be train, val or test, got {str(listed.parts[bad])!r:.40} in "
            f"{listed.place(bad)}."
        )
    return np.array(parts)


def _as_numbers(labels: Sequence[int | str], train: list[int]) -> tuple[list[int | str], list[int | str]]:
    """Return all labels and the distinct ones of the training examples, sorted: integers if all of these are, else texts."""
    names: dict[int | str, int | str] = {label: str(label).strip() for label in set(labels)}
    known = {str(names[labels[i]]) for i in train}
    if all(map(WHOLE.fullmatch, known)):  # 007 is a name, not the number 7
        names = {label: int(name) if WHOLE.fullmatch(str(name)) else name for label, name in names.items()}
        return [names[label] for label in labels], sorted(map(int, known))
    return [names[label] for label in labels], sorted(known)


def _say_left_out(
    classes: npt.NDArray[np.int64],
    parts: Texts,
    labels: Sequence[int | str],
    listed: Listed,
) -> None:
    for part in ("val", "test"):
        gone = np.flatnonzero((classes < 0) & (parts == part))
        if len(gone):
            names = sorted({labels[i] for i in gone.tolist()}, key=lambda name: (isinstance(name, str), name))
            log.warning(
                "%s: %d of %d %s examples are left out, since their classes have no training examples: %s",
                *(
                    listed.where,
                    len(gone),
                    int((parts == part).sum()),
                    part,
                    some([printable(str(name)) for name in names]),
                ),
            )


def _with_test_part(
    classes: npt.NDArray[np.int64],
    parts: Texts,
    names: list[str],
    test_fraction: float,
    seed: int,
    clients: Sequence[str] | None,
) -> Texts:
    rng, given = numpy_generator(seed, "test part"), parts
    parts = parts.copy()
    single, before = [], int((parts == "train").sum())
    mine_of = _indices_by_class(np.where(parts == "train", classes, -1), len(names))
    for name, indices in zip(names, mine_of, strict=True):
        mine = rng.permutation(indices)
        if len(mine) < 2:
            single.append(name)
            continue
        parts[mine[: min(max(round(test_fraction * len(mine)), 1), len(mine) - 1)]] = "test"
    if clients is not None:
        _warn_of_lost_clients(clients, given, parts)
    more = f"; classes of one example have none for testing: {some(single)}" if single else ""
    log.info(
        "no test set: %d of %d examples, %s of each class, are held out for testing%s",
        (parts == "test").sum(),
        before,
        f"{100 * test_fraction:g} %",
        more,
    )
    return parts


def _warn_of_lost_clients(clients: Sequence[str], before: Texts, after: Texts) -> None:
    """Warn of clients with training examples, all of which are drawn for testing: the number of clients depends on the seed."""
    training, kept = ({clients[i] for i in np.flatnonzero(parts == "train").tolist()} for parts in (before, after))
    if lost := sorted(training - kept):
        log.warning(
            "%d of %d clients take no part, since all their examples are held out for testing: %s",
            len(lost),
            len(training),
            some([printable(name) for name in lost]),
        )


def _indices_by_class(classes: npt.NDArray[np.int64], num_classes: int) -> list[npt.NDArray[np.intp]]:
    """Return the indices of each class, in order; negative classes are ignored."""
    order = np.argsort(classes, kind="stable")
    return np.split(order, np.searchsorted(classes[order], np.arange(num_classes + 1)))[1:-1]
