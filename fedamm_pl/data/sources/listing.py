"""Find the images in an image folder, and record the files and folders that are skipped."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fedamm_pl.data.sources.reading import UnusableFileError, some
from fedamm_pl.terminal import printable

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
SYSTEM_NAMES = {
    *("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__pycache__", "lost+found"),
    *("@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "system volume information"),
}
"""Files of operating systems and storage devices, in lower case; names that begin with a dot are skipped, too."""
log = logging.getLogger(__name__)


@dataclass
class PassedOver:
    """Entries of an image folder that are reported, most of them because they are not used.

    Attributes:
        root: The folder.
        found: Kind -> paths below ``root``.
    """

    root: Path
    found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, path: Path) -> None:
        """Record a path."""
        self.found.setdefault(kind, []).append(printable(str(path.relative_to(self.root))))

    def extend(self, others: "PassedOver") -> None:
        """Add the entries of another list for the same folder."""
        for kind, places in others.found.items():
            self.found.setdefault(kind, []).extend(places)

    def log(self) -> None:
        """Log one line with counts and some names; a warning unless there are only system files and outside links."""
        kinds = "; ".join(f"{kind}: {len(places)} ({some(places)})" for kind, places in self.found.items())
        if kinds:
            level = logging.WARNING if set(self.found) - {HIDDEN, LINKS} else logging.INFO
            log.log(level, "%s: %s", self.root, kinds)


HIDDEN = "hidden or system names, not used"
LINKS = "links to other places, followed"
INSIDE = "links to places in this folder, followed, so that images may be there twice"
OTHERS = "files without the suffix of an image, not used"
LOOSE = "files outside the class folders, not used"
NESTED = "folders inside class folders, not used"
EMPTY = "folders without images, not used"
BESIDE = "folders beside train and test, not used"
FRAMES = "files with further frames or pages, the first used"


def class_folders(folder: Path, passed: PassedOver) -> list[str]:
    """Return the names of the class folders in a part (train or test) in alphabetical order."""
    names = []
    for entry in entries(folder, passed):
        if os.path.isdir(entry):
            names.append(entry.name)
        else:
            passed.add(LOOSE, folder / entry.name)
    return names


@dataclass(frozen=True)
class ImageFolder:
    """A folder that holds images.

    Attributes:
        path: The folder.
        names: The folders on the way to it, its own name last.
        images: Names of the files in it with the suffix of an image, in alphabetical order.
    """

    path: Path
    names: tuple[str, ...]
    images: list[str]


def image_folders(
    folder: Path, names: tuple[str, ...], depth: int, passed: PassedOver, top: bool = True
) -> Iterator[ImageFolder]:
    """Find the folders that hold images, in alphabetical order; folders inside them are not searched.

    Args:
        folder: The folder to search.
        names: The folders on the way to it.
        depth: How many levels below it to search.
        passed: Records the entries that are skipped.
        top: Whether images in the folder itself are skipped.

    Raises:
        ValueError: If a folder cannot be read, or contains a broken link.
    """
    found = entries(folder, passed)
    folders = [entry.name for entry in found if os.path.isdir(entry)]
    images = [entry.name for entry in found if Path(entry.name).suffix.lower() in SUFFIXES]
    inside = bool(set(images) - set(folders)) and not top  # anything with such a suffix is expected to be an image
    if inside:
        yield ImageFolder(folder, names, images)
    elif not top and not folders:
        passed.add(EMPTY, folder)
    for entry in found:
        path = folder / entry.name
        if inside and entry.name in images:
            continue
        if not os.path.isdir(entry):
            passed.add(LOOSE if top else OTHERS, path)
        elif inside or not depth:
            passed.add(NESTED, path)
        else:
            yield from image_folders(path, (*names, entry.name), depth - 1, passed, top=False)


def entries(folder: Path, passed: PassedOver) -> list["os.DirEntry[str]"]:
    """Return the entries of a folder in alphabetical order, without hidden and system names.

    Raises:
        ValueError: If the folder cannot be read, or contains a broken link.
    """
    found = visible(folder, passed)
    for path in (folder / entry.name for entry in found if entry.is_symlink()):
        try:
            inside = path.resolve(strict=True).is_relative_to(passed.root.resolve())
        except (OSError, RuntimeError) as error:  # the target does not exist, or the links form a circle
            raise UnusableFileError(f"Expected {path} to be a file or folder, got a broken link.") from error
        passed.add(INSIDE if inside else LINKS, path)
    return found


def visible(folder: Path, passed: PassedOver) -> list["os.DirEntry[str]"]:
    """Return the entries of a folder in alphabetical order, without hidden and system names and without checking links.

    Raises:
        ValueError: If the folder cannot be read.
    """
    try:
        with os.scandir(folder) as found:
            listed = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise UnusableFileError(f"Expected {folder} to be a folder that can be read, got {error.strerror}.") from error
    kept = []
    for entry in listed:
        if entry.name.startswith(".") or entry.name.lower() in SYSTEM_NAMES:
            passed.add(HIDDEN, folder / entry.name)
        else:
            kept.append(entry)
    return kept
