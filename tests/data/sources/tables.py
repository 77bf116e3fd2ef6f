"""Tables in a folder, and what becomes of them."""

from pathlib import Path
from typing import Any

import pytest

from fedamm_pl.data.sources import ImageData, ReadOptions, load_images


def table(folder: Path, *lines: str, name: str = "mine.csv") -> Path:
    (folder / name).write_text("".join(f"{line}\n" for line in lines))
    return folder / name


def read(folder: Path, name: str = "mine.csv", **options: Any) -> ImageData:
    return load_images(name, folder, ReadOptions(**options))


def refused(folder: Path, name: str = "mine.csv", **options: Any) -> str:
    """What is said of a table that cannot be used."""
    with pytest.raises(ValueError, match="Expected") as caught:
        read(folder, name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(folder), "F")
