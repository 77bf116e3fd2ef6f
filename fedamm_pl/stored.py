"""Lightning checkpoints of strangers: plain data and tensors are read, checked, and used; no name in a file is imported."""

import logging
import pickletools
import re
import reprlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

import pytorch_lightning as pl
import torch
import yaml
from lightning_fabric.utilities.cloud_io import get_filesystem

from fedamm_pl.hints import fits, option_types, shown

log = logging.getLogger(__name__)
StoredFile = str | Path | IO[bytes]
Stored = tuple[dict[str, Any], int | None]
PLAIN = re.compile(
    r"collections (OrderedDict|Counter)|torch\._utils _rebuild_(tensor|parameter)\w*|torch\.nn\.parameter Parameter|"
    r"torch Size|torch(\.cuda)? \w+Storage|torch\.storage \w+|torch [a-z]\w*|torch\.serialization _get_layout|_codecs encode|(builtins|__builtin__) (set|complex)"
)
"""What tensors and plain data are made of in a pickle: module and name."""
MAX_DEPTH, CHARACTERS = 30, 100
"""How deep plain data may be nested, and how many characters of a text count as one value."""
DataT = TypeVar("DataT", bound="StoredData")


def file_name(file: StoredFile) -> str:
    """Return what messages call a file."""
    return str(file if isinstance(file, str | Path) else getattr(file, "name", "the checkpoint"))


def reason_of(error: Exception) -> str:
    """Return in a line why a file cannot be read, without torch's advice to execute what it holds."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "weights_only" not in text:
        return f"{type(error).__name__}: {text:.200}" if isinstance(error, LookupError) else f"{text:.200}"
    found = re.search(r"GLOBAL ([\w.]+)|WeightsUnpickler error: (.{,100}?) Check the documentation", text)
    more = f", {found[1] or found[2]}" if found else ""
    return f"it holds more than tensors and plain data{more}; nothing of it was executed"


def require_plain_archive(file: IO[bytes]) -> int:
    """Check that a file is an archive as torch writes it, of tensors and plain data, and return its size.

    What torch reads without executing anything can still ask for memory that has nothing to do with the file's size.

    Raises:
        ValueError: If it is none, unpacks to more than its size, or names what is no part of tensors and plain data.
    """
    start = file.tell()
    size = file.seek(0, 2)
    file.seek(start)
    if not zipfile.is_zipfile(file):
        raise ValueError("it is not an archive of torch" if size else "it is empty")
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
        if (unpacked := sum(part.file_size for part in parts)) > size:
            raise ValueError(f"it has {size} bytes and would unpack to {unpacked}")
        for part in parts:
            if part.filename.lower().endswith("data.pkl"):  # torch finds it in any case
                _require_plain(archive.read(part))
    file.seek(start)
    return size


def _require_plain(program: bytes) -> None:
    for code, name, _ in pickletools.genops(program):
        if code.name in ("GLOBAL", "INST") and not PLAIN.fullmatch(str(name)):
            raise ValueError(
                f"it holds more than tensors and plain data, {str(name).replace(' ', '.'):.100}, which was not used"
            )


def require_bounded(content: Any, size: int) -> None:
    """Check that plain data hold no more values than a file of their size has bytes.

    A list that holds the same list many times, and so on, takes little room in a file and in memory; printed, compared or
    written out it never ends.

    Args:
        content: What was read; tensors count as one value.
        size: Of the file.

    Raises:
        ValueError: If they hold more, or are nested too deeply.
    """
    level, values = [content], 1
    for _ in range(MAX_DEPTH):
        holders = [value for value in level if isinstance(value, dict | list | tuple | set)]
        values += sum(len(value) for value in level if isinstance(value, str | bytes)) // CHARACTERS
        values += sum((1 + isinstance(holder, dict)) * len(holder) for holder in holders)
        if values > size:
            raise ValueError(f"it holds more values than its {size} bytes: the same values repeated")
        level = [part for holder in holders for part in holder]
        level += [part for holder in holders if isinstance(holder, dict) for part in holder.values()]
        if not level:
            return
    raise ValueError("it is nested too deeply")


def read_stored(file: StoredFile, map_location: Any = None, weights_only: bool | None = None) -> Stored:
    """Read a Lightning checkpoint; nothing in it is executed unless the caller says ``weights_only=False``.

    Args:
        file: A path, a URL that fsspec knows, or an open file.
        map_location: Where tensors go, as for ``torch.load``; by default where they were, if there is such a device.
        weights_only: Whether to read nothing but tensors and plain data: yes unless False.

    Returns:
        What it holds, and the size in bytes of a file of tensors and plain data.

    Raises:
        ValueError: If it is damaged, holds something else, or is no checkpoint.
        OSError: If there is no such file.
    """
    if isinstance(file, str | Path):
        with get_filesystem(file).open(str(file), "rb") as opened:
            return _read(opened, file_name(file), map_location, weights_only)
    return _read(file, file_name(file), map_location, weights_only)


def _read(file: IO[bytes], name: str, map_location: Any, weights_only: bool | None) -> Stored:
    try:
        size = require_plain_archive(file) if weights_only is not False else None
        content = torch.load(file, map_location=map_location or _available, weights_only=weights_only is not False)
    except Exception as error:  # what is damaged may raise anything
        raise ValueError(
            f"Expected {name} to be a checkpoint of tensors and plain data, got a file that cannot be read as one: "
            f"{reason_of(error)}."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"Expected {name} to be a checkpoint of Lightning, got {type(content).__name__}.")
    return content, size


def _available(storage: Any, location: str) -> Any:
    """Leave a tensor where it was, if there is such a device here."""
    device = torch.device(location)
    return None if device.type == "cpu" or torch.get_device_module(device).is_available() else storage.cpu()


def stored_options(
    kind: type[pl.LightningModule] | type[pl.LightningDataModule],
    content: Mapping[str, Any],
    name: str,
    hparams_file: str | Path | None,
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the options that a checkpoint holds for a class, checked against the types in its signature.

    Lightning would also import and call what a file names beside them; that is left out.

    Args:
        kind: The class.
        content: Of the checkpoint.
        name: Of the file.
        hparams_file: A YAML file whose options stand in their place.
        given: What the caller gives; it stands in their place too.

    Raises:
        ValueError: If an option is not of the type of the class.
        TypeError: If the caller gives an option that the class does not have.
    """
    types, takes_all = option_types(kind)
    if not takes_all and (unknown := sorted(given.keys() - types.keys())):
        raise TypeError(f"Expected options of {kind.__name__}, got {unknown[0]!r}, which it does not have.")
    options = content.get(kind.CHECKPOINT_HYPER_PARAMS_KEY, {})
    if hparams_file is not None:
        name, options = str(hparams_file), _read_yaml(hparams_file)
    if not isinstance(options, dict) or not all(isinstance(option, str) for option in options):
        raise ValueError(f"Expected the options in {name} to be named by text, got {reprlib.repr(options)}.")
    own = {option: value for option, value in options.items() if option in types and option not in given}
    for option, value in own.items():
        if not fits(value, types[option]):
            raise ValueError(
                f"Expected `{option}` in {name} to be {shown(types[option])} for {kind.__name__}, "
                f"got {reprlib.repr(value)}."
            )
    if left := sorted(option for option in options.keys() - types.keys() if not option.startswith("_")):
        log.warning("%s: %d options are left out that %s does not have: %.200s", name, len(left), kind.__name__, left)
    return {**own, **given}


def _read_yaml(path: str | Path) -> Any:
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(
            f"Expected `hparams_file` {path} to be YAML of plain data, got {' '.join(str(error).split()):.200}."
        ) from error


class StoredData(pl.LightningDataModule):
    """A data module whose options are checked when they come from a file.

    Attributes:
        imported_options: Options that may hold an import path, known by its dots, which a file must not give.
    """

    imported_options: tuple[str, ...] = ()

    @classmethod
    def load_from_checkpoint(
        cls: type[DataT],
        checkpoint_path: StoredFile,
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> DataT:
        """Make the data module of the options in a checkpoint; nothing in the file is executed, no name in it imported.

        Args:
            checkpoint_path: The file.
            map_location: Where tensors go; by default where they were.
            hparams_file: A YAML file with options that stand in place of the checkpoint's.
            weights_only: False executes what the file holds: for files of your own.
            kwargs: Options that stand in their place.

        Raises:
            ValueError: If the file is damaged or holds options of wrong types, or they are out of range.
        """
        name = file_name(checkpoint_path)
        content, _ = read_stored(checkpoint_path, map_location, weights_only)
        options = stored_options(cls, content, name, hparams_file, kwargs)
        for option in cls.imported_options:
            if option not in kwargs and "." in str(options.get(option, "")):
                raise ValueError(
                    f"Expected `{option}` in {name} not to be an import path, got {options[option]!r:.80}: a name in a file is "
                    f"not imported; if you trust it, give {option} to load_from_checkpoint."
                )
        data = built(cls, options, name)
        if cls.__qualname__ in content:
            data.load_state_dict(content[cls.__qualname__])
        return data


BuiltT = TypeVar("BuiltT")


def built(kind: type[BuiltT], options: Mapping[str, Any], name: str) -> BuiltT:
    """Make an instance of a class with what a file holds.

    Raises:
        ValueError: If it does not take them, whatever it says.
    """
    try:
        return kind(**options)
    except Exception as error:
        raise ValueError(
            f"Expected the options in {name} to make a {kind.__name__}, got: {' '.join(str(error).split()):.300}"
        ) from error
