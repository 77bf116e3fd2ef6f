"""Which files of an image folder are its images, and what is skipped."""

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
"""What operating systems and storage devices leave in folders, in lower case; hidden names, with a dot, are left out too."""
log = logging.getLogger(__name__)


@dataclass
class PassedOver:
    """What an image folder holds and nobody uses.

    Attributes:
        root: The folder.
        found: Kind -> the places below ``root``.
    """

    root: Path
    found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, path: Path) -> None:
        """Note a place."""
        self.found.setdefault(kind, []).append(printable(str(path.relative_to(self.root))))

    def extend(self, others: "PassedOver") -> None:
        """Take over what another list of the same folder has."""
        for kind, places in others.found.items():
            self.found.setdefault(kind, []).extend(places)

    def log(self) -> None:
        """Log one line that counts all of them and names some; a warning where it may be more than what systems leave."""
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
        images: Names of the files in it whose suffix says that they are images, in alphabetical order.
    """

    path: Path
    names: tuple[str, ...]
    images: list[str]


def image_folders(
    folder: Path, names: tuple[str, ...], depth: int, passed: PassedOver, top: bool = True
) -> Iterator[ImageFolder]:
    """Find the folders that hold images, in alphabetical order, and none inside of these.

    Args:
        folder: Where to look.
        names: The folders on the way to it.
        depth: How many levels below it to look.
        passed: Records what is skipped.
        top: Whether images in the folder itself are skipped.

    Raises:
        ValueError: If a folder cannot be read, or a link in it leads nowhere.
    """
    found = entries(folder, passed)
    folders = [entry.name for entry in found if os.path.isdir(entry)]
    images = [entry.name for entry in found if Path(entry.name).suffix.lower() in SUFFIXES]
    inside = bool(set(images) - set(folders)) and not top  # what ends so wants to be an image, whatever it is
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
    """Return what is in a folder, in alphabetical order, without hidden and system names.

    Raises:
        ValueError: If the folder cannot be read, or a link in it leads nowhere.
    """
    found = visible(folder, passed)
    for path in (folder / entry.name for entry in found if entry.is_symlink()):
        try:
            inside = path.resolve(strict=True).is_relative_to(passed.root.resolve())
        except (OSError, RuntimeError) as error:  # it leads nowhere, or in a circle
            raise UnusableFileError(f"Expected {path} to be a file or folder, got a broken link.") from error
        passed.add(INSIDE if inside else LINKS, path)
    return found


def visible(folder: Path, passed: PassedOver) -> list["os.DirEntry[str]"]:
    """Return what is in a folder, in alphabetical order, without hidden and system names, links unseen.

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
