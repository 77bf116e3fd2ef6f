"""Checks of the arguments of every module: numbers in range, and the description of the images or features."""

from typing import Any

from fedamm_pl.data.sources import ImageInfo


def require_range(name: str, value: float, *, above: float | None = None, least: float | None = None) -> None:
    """Check that a number is finite and in range.

    Raises:
        ValueError: If it is not finite, or not above ``above`` or not at least ``least``.
    """
    if above is not None and not above < value < float("inf"):
        raise ValueError(f"Expected `{name}` to be a number above {above}, got {value}.")
    if least is not None and not least <= value < float("inf"):
        raise ValueError(f"Expected `{name}` to be a number of {least} or more, got {value}.")


def check_info(info: ImageInfo, num_classes: int, in_channels: int) -> None:
    """Check that the description of the images or features fits the numbers of classes and channels.

    Raises:
        ValueError: If it does not.
    """
    known: dict[str, Any] = dict(info)
    sizes = {"mean": in_channels, "std": in_channels, "class_names": num_classes, "class_counts": num_classes}
    for name, size in sizes.items():
        if name in known and len(known[name]) != size:
            raise ValueError(f"Expected `info` to hold {size} {name}, got {len(known[name])}.")
    if not all(0 < value < float("inf") for value in known.get("std", ())):
        raise ValueError(f"Expected `info` to hold std above 0, got {known['std']}.")
    size = known.get("image_size", [])
    if len(size) not in (0, 2) or not all(length >= 1 for length in size):
        raise ValueError(
            f"Expected `info` to hold an image_size of a height and a width of 1 or more, or of nothing for features, got {size}."
        )
    groups = known.get("shot_groups", {}).values()
    # limited, because a small file can hold the same list many times and would fill the memory
    if sum(map(len, groups)) > 100 * num_classes or not all(0 <= c < num_classes for group in groups for c in group):
        raise ValueError(f"Expected `info` to hold shot_groups of the classes 0 to {num_classes - 1}, got others.")
