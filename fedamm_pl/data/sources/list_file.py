"""List files with the path of an image and its label in each line, a common format of long-tailed data sets."""

import logging
import os
import posixpath
import re
import sys
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from fedamm_pl.data.sources.decoded import kept_parts
from fedamm_pl.data.sources.image_data import ImageData
from fedamm_pl.data.sources.image_files import open_images
from fedamm_pl.data.sources.listed import PARTS, Listed, data_set
from fedamm_pl.data.sources.listing import SUFFIXES, PassedOver
from fedamm_pl.data.sources.options import ReadOptions
from fedamm_pl.data.sources.reading import UnusableFileError, reading, require_memory

TRAIN = re.compile(r"(?<![a-z])train(ing)?(?![a-z])", re.IGNORECASE)
"""The part of a list's name that marks it as the training list."""
BYTES_PER_BYTE = 20
"""Memory per byte of a list while it is read: text, lines, paths and labels as objects."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ListFile:
    """A list of images.

    Attributes:
        path: The file.
        images: Paths of the images below the root.
        labels: Their labels.
        lines: The line number of each, from 1.
    """

    path: Path
    images: list[str]
    labels: list[str]
    lines: list[int]


def read_list(path: Path, root: Path, options: ReadOptions | None = None) -> ImageData:
    """Read a list file with ``<path> <label>`` in each line.

    The path is below ``root``; the label is a number, or a name without spaces. Blank lines and lines that begin with #
    are skipped. If the name of the file contains ``train`` as a separate word, the files with ``test`` and ``val`` (or
    another usual name) in its place are the other parts, for example ``test.txt`` beside ``train.txt``, or
    ``ImageNet_LT_test.txt`` beside ``ImageNet_LT_train.txt``. Without a test list, a share of each class is held out;
    see :func:`~fedamm_pl.data.sources.listed.data_set`, which also numbers the classes.

    Args:
        path: The list of training images.
        root: The folder of the images.
        options: Options for reading the images, see :func:`~fedamm_pl.data.sources.image_files.read_images`.

    Raises:
        ValueError: If a list is damaged, a line has another form, a path leads out of ``root`` or is listed twice (in
            one list or in two), or if an image cannot be used. The message names the file and the line.
    """
    options = options or ReadOptions()
    lists = {part: _read(file) for part, file in _files(path).items()}
    _require_once(lists)
    train = lists["train"]
    if train.images and not os.path.lexists(first := os.path.join(root, train.images[0])):
        raise UnusableFileError(
            f"Expected the paths in {path} to be those of files below {root}, got no {first} (line {train.lines[0]})."
        )
    passed = PassedOver(root)
    # all parts in one list, so that a list of a million paths exists only once
    images = open_images(
        [os.path.join(root, name) for each in lists.values() for name in each.images],
        root=root,
        options=options,
        passed=passed,
    )
    passed.log()
    counts = [len(each.images) for each in lists.values()]
    starts = [0, *accumulate(counts)]

    def place(i: int) -> str:
        which = bisect_right(starts, i) - 1
        each = [*lists.values()][which]
        return f"line {each.lines[i - starts[which]]} of {each.path.name}"

    listed = Listed(
        images,
        labels=[label for each in lists.values() for label in each.labels],
        parts=[part for part, each in lists.items() for _ in each.labels] if len(lists) > 1 else None,
        clients=None,
        where=str(path),
        place=place,
    )
    data = data_set(listed, options.test_fraction, options.seed)
    log.info(
        "%s: %d classes, %s",
        path,
        len(data.class_names),
        ", ".join(f"{count} images in {each.path.name}" for count, each in zip(counts, lists.values(), strict=True)),
    )
    return kept_parts(data, options)


def _files(path: Path) -> dict[str, Path]:
    """Return the file of each part: train, and val and test if there are such lists."""
    files, places = {"train": path}, [*TRAIN.finditer(path.name)]
    for part in ("val", "test") if places else ():
        start, end = places[-1].span()
        written = path.name[start:end]
        case = str.upper if written.isupper() else str.capitalize if written[0].isupper() else str
        names = [f"{path.name[:start]}{case(name)}{path.name[end:]}" for name in PARTS if PARTS[name] == part]
        there = [path.with_name(name) for name in names if os.path.lexists(path.with_name(name))]
        if len(there) > 1:
            raise UnusableFileError(f"Expected one {part} list beside {path}, got {there[0].name} and {there[1].name}.")
        if there:
            files[part] = there[0]
    return files


def _read(path: Path) -> ListFile:
    found = ListFile(path, [], [], [])
    comments = 0
    for number, line in _lines(path):
        if line.startswith("#"):
            comments += 1
            continue
        name, *label = line.rsplit(None, 1)
        if not label or ("." in label[0] and Path(label[0]).suffix.lower() in SUFFIXES):
            raise UnusableFileError(
                f"Expected line {number} of {path} to be the path of an image, a space and its label, got {line!r:.80}."
            )
        if "./" in name or "//" in name:
            name = posixpath.normpath(name)
        if name.startswith(("/", "../")) or "\\" in name or not name.isprintable():
            raise UnusableFileError(
                f"Expected line {number} of {path} to begin with a path below the root, with / and without control characters, "
                f"got {name!r:.80}."
            )
        found.images.append(name)
        found.labels.append(sys.intern(label[0]))
        found.lines.append(number)
    if not found.images:
        raise UnusableFileError(f"Expected {path} to list images, got none.")
    if comments:
        log.info("%s: lines that begin with #, not used: %d", path, comments)
    return found


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the number (from 1) and the stripped text of each line that is not blank."""
    with reading(path, "a list of images as UTF-8 text, got one that cannot be read"):
        require_memory(BYTES_PER_BYTE * path.stat().st_size, f"the list {path}")
        content = path.read_bytes()
        if content.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ValueError("it is UTF-16")
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            number = content.count(b"\n", 0, error.start) + 1
            raise UnusableFileError(f"Expected {path} to be UTF-8 text, got other bytes in line {number}.") from error
    del content
    for number, line in enumerate(text.split("\n"), 1):
        if stripped := line.strip():
            yield number, stripped


def _require_once(lists: dict[str, ListFile]) -> None:
    """Check that no image is listed twice; an image in two parts could be used for training and testing."""
    names = [name for each in lists.values() for name in each.images]
    if len(set(names)) == len(names):
        return
    places: dict[str, str] = {}
    for each in lists.values():
        for name, number in zip(each.images, each.lines, strict=True):
            place = f"line {number} of {each.path}"
            if name in places:
                raise UnusableFileError(
                    f"Expected each image to be listed once, got {name!r} in {places[name]} and in {place}."
                )
            places[name] = place
