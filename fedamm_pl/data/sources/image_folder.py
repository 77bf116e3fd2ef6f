"""Image folders: one file an image, one folder a class."""

import os
from pathlib import Path

import torch

from fedamm_pl.data.sources.image_data import ImageData, check_images, check_names
from fedamm_pl.data.sources.image_files import read_images
from fedamm_pl.data.sources.listing import BESIDE, PassedOver, class_folders, image_files, visible
from fedamm_pl.data.sources.options import ReadOptions
from fedamm_pl.data.sources.reading import UnusableFileError


def read_image_folder(folder: Path, options: ReadOptions | None = None) -> ImageData:
    """Read ``<folder>/{train,test}/<class>/*.png`` (or .jpg, .bmp, .gif, .tif, .webp).

    A file's suffix says that it is an image, its content which of these formats it has. Images are turned upright as their
    EXIF orientation says. Palettes, 1-bit and CMYK images become grey levels or RGB (CMYK by the plain formula, without a
    colour profile); of several frames or pages the first is taken. Hidden and system names, other files and further folders
    are passed over; what is passed over is logged in one line. Links are followed, also out of the folder, which is logged too.

    Args:
        folder: The folder. All images are of one size; if those of both parts are grey they stay grey, else all become RGB.
        options: How it is read.

    Returns:
        The images, classes in alphabetical order of their folders.

    Raises:
        ValueError: If a folder is empty or missing, a file is no image of these formats, is transparent or has 16 bits a
            channel, sizes differ, or the images do not fit into memory. The message names the file.
    """
    passed = PassedOver(folder)
    classes = class_folders(folder / "train", passed)
    if not classes:
        raise UnusableFileError(f"Expected {folder / 'train'} to hold one folder of images for each class, got none.")
    check_names(classes, f" in {folder / 'train'}")
    has_test = os.path.isdir(folder / "test")
    if unknown := set(class_folders(folder / "test", passed) if has_test else ()) - set(classes):
        raise UnusableFileError(
            f"Expected classes of {folder / 'test'} to be in {folder / 'train'} too, got {sorted(unknown)}."
        )
    train, test = (image_files(folder / part, classes, passed) for part in ("train", "test"))
    if empty := set(range(len(classes))) - {label for _, label in train}:
        raise UnusableFileError(
            f"Expected {folder / 'train' / classes[min(empty)]} to hold images, got none: leave the class out."
        )
    for path in (folder / entry.name for entry in visible(folder, passed)):
        if path.name not in ("train", "test") and os.path.isdir(path):
            passed.add(BESIDE, path)
    parts = [[path for path, _ in part] for part in (train, test)]
    images = read_images(parts, root=folder, options=options or ReadOptions(), passed=passed)
    labels = [torch.tensor([label for _, label in part]) for part in (train, test)]
    passed.log()
    data = ImageData(images[0], labels[0], images[1], labels[1], classes)
    check_images(data, f" of {folder}")
    return data
