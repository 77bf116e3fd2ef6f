"""Image folders: one file per image, one folder per class, and optionally one folder per client."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from fedamm_pl.data.sources.decoded import kept_parts
from fedamm_pl.data.sources.image_data import ImageData, check_images, check_names
from fedamm_pl.data.sources.image_files import open_images, read_images
from fedamm_pl.data.sources.listed import PARTS, Listed, data_set
from fedamm_pl.data.sources.listing import (
    BESIDE,
    LOOSE,
    SUFFIXES,
    ImageFolder,
    PassedOver,
    class_folders,
    image_folders,
    visible,
)
from fedamm_pl.data.sources.options import ReadOptions, say_unused_share
from fedamm_pl.data.sources.reading import UnusableFileError, some
from fedamm_pl.terminal import printable

LAYOUTS = {  # folders on the way to an image -> positions of the client, the part and the class
    "<class>/*.png": (None, None, 0),
    "<client>/<class>/*.png": (0, None, 1),
    "{train,test}/<class>/*.png": (None, 0, 1),
    "{train,test}/<client>/<class>/*.png": (1, 0, 2),
    "<client>/{train,test}/<class>/*.png": (0, 1, 2),
}
log = logging.getLogger(__name__)


def read_image_folder(folder: Path, options: ReadOptions | None = None) -> ImageData:
    """Read a folder of images (.png, .jpg, .bmp, .gif, .tif or .webp) whose subfolders are classes, parts and clients.

    The layouts are ``{train,test}/<class>/*.png``, ``<class>/*.png``, and with clients ``<client>/<class>/*.png``,
    ``{train,test}/<client>/<class>/*.png`` and ``<client>/{train,test}/<class>/*.png``. In layouts without ``test``, a
    share of each class is held out for testing. A folder ``val`` beside ``train`` holds validation images. The layout
    is found from the names of the folders and the depth of the images; all images must follow the same layout. Clients
    may lack classes; the test images of all clients form one test set.

    Files are recognised as images by their suffix; their content determines the format. Images are rotated according to
    their EXIF orientation. Palette, 1-bit and CMYK images are converted to grey or RGB (CMYK with the simple formula,
    without a colour profile). If there are several frames or pages, the first is used. Hidden and system names, other
    files and further folders are skipped, which is logged in one line. Links are followed, even out of the folder,
    which is also logged.

    Args:
        folder: The folder. If the images of all parts are grey they stay grey, else all become RGB.
        options: Options for reading the images, see :func:`~fedamm_pl.data.sources.image_files.read_images`.

    Returns:
        The images, with classes in alphabetical order of their folders. If all class names are integers and the layout
        is not ``{train,test}/<class>``, they are sorted by value.

    Raises:
        ValueError: If the images have another layout, a folder is empty or missing, a file is not an image of these
            formats, is transparent or has 16 bits per channel, sizes differ, or the images do not fit into memory. The
            message names the file.
    """
    options, passed, beside = options or ReadOptions(), PassedOver(folder), PassedOver(folder)
    parts = _part_folders(folder, beside)
    if "train" in parts:
        found = [each for name in parts.values() for each in image_folders(folder / name, (name,), 2, passed)]
        passed.extend(beside)
        if all(len(each.names) == 2 for each in found):
            return _read_parts(folder, parts, found, options, passed)
    else:
        found = [*image_folders(folder, (), 3, passed)]
    layout = _layout(folder, found, passed)
    client, part, label = LAYOUTS[layout]
    names = [each.names for each in found for _ in each.images]
    paths = [os.path.join(each.path, name) for each in found for name in each.images]
    if odd := next((each for each in found if printable(each.names[client or 0]) != each.names[client or 0]), None):
        raise UnusableFileError(
            f"Expected names of clients without line breaks and control characters, got {odd.path}."
        )
    images = open_images(paths, root=folder, options=options, passed=passed)
    passed.log()
    listed = Listed(
        images,
        labels=[each[label] for each in names],
        parts=None if part is None else [each[part] for each in names],
        clients=None if client is None else [each[client] for each in names],
        where=str(folder),
        place=lambda i: paths[i],
    )
    data = data_set(listed, options.test_fraction, options.seed)
    holders = "" if client is None else f"{len(set(data.clients or ()))} clients, "
    kinds = {PARTS[each[part].lower()] for each in names} if part is not None else ()
    way = layout.replace("train,test", ",".join(kind for kind in ("train", "val", "test") if kind in kinds))
    log.info("%s: read as %s: %s%d classes, %d images", folder, way, holders, len(data.class_names), len(paths))
    return kept_parts(data, options)


def _part_folders(folder: Path, beside: PassedOver) -> dict[str, str]:
    """Return the folder of each part (train, val, test), and record other folders in ``beside``."""
    found: dict[str, str] = {}
    for name in (entry.name for entry in visible(folder, beside) if os.path.isdir(entry)):
        if (part := PARTS.get(name.lower())) is None:
            beside.add(BESIDE, folder / name)
        elif found.setdefault(part, name) != name:
            raise UnusableFileError(
                f"Expected {folder} to have one folder of {part} images, got {found[part]} and {name}."
            )
    return {part: found[part] for part in ("train", "val", "test") if part in found}


def _layout(folder: Path, found: Sequence[ImageFolder], passed: PassedOver) -> str:
    ways = _ways(found)
    (layout, first), *others = ways.items() if ways else [("", None)]
    if layout in LAYOUTS and not others:
        return layout
    got = " and ".join(f"in {each.path}" for each in [first, *(each for _, each in others[:1])] if each)
    loose = [place for place in passed.found.get(LOOSE, ()) if Path(place).suffix.lower() in SUFFIXES]
    none = f"{some(loose)} without a folder of its class" if loose else "none"
    raise UnusableFileError(
        f"Expected {folder} to hold images in one of the layouts {', '.join(LAYOUTS)}, got {f'them {got}' if got else none}"
        f"{': all must follow one layout.' if len(ways) > 1 else '.'}"
    )


def _ways(found: Sequence[ImageFolder]) -> dict[str, ImageFolder]:
    """Return each layout that occurs, or a description of an unknown one -> the first image folder with it."""
    ways: dict[str, ImageFolder] = {}
    for each in found:
        places = tuple(i for i, name in enumerate(each.names[:-1]) if name.lower() in PARTS)
        kinds = {(len(names.split("/")) - 1, spot): names for names, (_, spot, _) in LAYOUTS.items()}
        spot = places[0] if places else None
        # a class with the name of a part, and no part above it, may be a part without class folders
        known = each.names[-1].lower() not in PARTS or spot is not None
        way = kinds.get((len(each.names), spot), "") if known else ""
        ways.setdefault(way or f"{len(each.names)} deep", each)
    return ways


def _read_parts(
    folder: Path, parts: dict[str, str], found: Sequence[ImageFolder], options: ReadOptions, passed: PassedOver
) -> ImageData:
    """Read the layout ``{train,test}/<class>``; every class must have a folder in train."""
    train = folder / parts["train"]
    classes = class_folders(train, PassedOver(folder))
    if not classes:
        raise UnusableFileError(f"Expected {train} to hold one folder of images for each class, got none.")
    check_names(classes, f" in {train}")
    by_part: dict[str, list[ImageFolder]] = {
        part: [each for each in found if each.names[0] == parts.get(part)] for part in ("train", "val", "test")
    }
    if empty := [name for name in classes if name not in {each.names[1] for each in by_part["train"]}]:
        raise UnusableFileError(f"Expected {train / empty[0]} to hold images, got none: leave the class out.")
    for part in [part for part in parts if part != "train"]:
        if unknown := set(class_folders(folder / parts[part], PassedOver(folder))) - set(classes):
            raise UnusableFileError(
                f"Expected classes of {folder / parts[part]} to be in {train} too, got {sorted(unknown)}."
            )
    for part in ("test", *(part for part in parts if part == "val")):
        if not by_part[part]:
            raise UnusableFileError(
                f"Expected {folder / parts.get(part, part)} to hold images as <class>/*.png, got none."
            )
    number = {name: position for position, name in enumerate(classes)}
    paths = [[os.path.join(each.path, name) for each in by_part[part] for name in each.images] for part in by_part]
    images = read_images(paths, root=folder, options=options, passed=passed)
    labels = [
        torch.tensor([number[each.names[1]] for each in by_part[part] for _ in each.images], dtype=torch.int64)
        for part in by_part
    ]
    passed.log()
    say_unused_share(options.test_fraction, str(folder))
    val = (images[1], labels[1]) if by_part["val"] else (None, None)
    data = ImageData(images[0], labels[0], images[2], labels[2], classes, None, *val)
    check_images(data, f" of {folder}")
    return data
