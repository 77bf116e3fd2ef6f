"""Lightning checkpoints from untrusted sources: tensors and plain data are read and checked; no name is imported."""

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
"""The names (module and name) that a pickle of tensors and plain data may refer to."""
MAX_DEPTH, CHARACTERS = 30, 100
"""How deeply plain data may be nested, and how many characters of a text count as one value."""
DataT = TypeVar("DataT", bound="StoredData")


def file_name(file: StoredFile) -> str:
    """Return the name of a file for messages."""
    return str(file if isinstance(file, str | Path) else getattr(file, "name", "the checkpoint"))


def reason_of(error: Exception) -> str:
    """Return in one line why a file cannot be read, without torch's advice to execute its content."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "weights_only" not in text:
        return f"{type(error).__name__}: {text:.200}" if isinstance(error, LookupError) else f"{text:.200}"
    found = re.search(r"GLOBAL ([\w.]+)|WeightsUnpickler error: (.{,100}?) Check the documentation", text)
    more = f", {found[1] or found[2]}" if found else ""
    return f"it holds more than tensors and plain data{more}; nothing of it was executed"


def require_plain_archive(file: IO[bytes]) -> int:
    """Check that a file is a torch archive of tensors and plain data, and return its size in bytes.

    Even a file that torch reads without executing anything can request far more memory than its size suggests.

    Raises:
        ValueError: If it is not such an archive, unpacks to more than its size, or refers to anything other than
            tensors and plain data.
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
            if part.filename.lower().endswith("data.pkl"):  # torch finds it in upper and lower case
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
    """Check that plain data contain no more values than their file has bytes.

    A list that contains the same list many times, at several levels, takes little space in a file and in memory, but
    printing, comparing or writing it never ends.

    Args:
        content: The content of the file; a tensor counts as one value.
        size: Size of the file in bytes.

    Raises:
        ValueError: If the data contain more values, or are nested too deeply.
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
    """Read a Lightning checkpoint; nothing in it is executed unless the caller passes ``weights_only=False``.

    Args:
        file: A path, a URL that fsspec supports, or an open file.
        map_location: Where tensors go, as for ``torch.load``; by default to the device they were on, if it is
            available.
        weights_only: Whether to read nothing but tensors and plain data; None means True.

    Returns:
        The content, and the size in bytes of a file of tensors and plain data.

    Raises:
        ValueError: If the file is damaged, holds something else, or is not a checkpoint.
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
    except Exception as error:  # a damaged file may raise any error
        raise ValueError(
            f"Expected {name} to be a checkpoint of tensors and plain data, got a file that cannot be read as one: "
            f"{reason_of(error)}."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"Expected {name} to be a checkpoint of Lightning, got {type(content).__name__}.")
    return content, size


def _available(storage: Any, location: str) -> Any:
    """Leave a tensor on its device if that is available here; else move it to the CPU."""
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

    Lightning would also import and call objects that the file names next to the options; this function does not.

    Args:
        kind: The class.
        content: Content of the checkpoint.
        name: Name of the file.
        hparams_file: A YAML file whose options replace those of the checkpoint.
        given: Options from the caller, which override those of the file.

    Raises:
        ValueError: If an option does not have the type in the class's signature.
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
        imported_options: Options that may be an import path, recognised by its dots; a file must not give such a path.
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
        """Create the data module from the options in a checkpoint.

        Nothing in the file is executed, and no name in it is imported.

        Args:
            checkpoint_path: The file.
            map_location: Where tensors go; by default to the device they were on.
            hparams_file: A YAML file whose options replace those of the checkpoint.
            weights_only: False executes the content of the file; use it for your own files only.
            kwargs: Options that override those of the file.

        Raises:
            ValueError: If the file is damaged, or its options have wrong types or are out of range.
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
    """Create an instance of a class with options from a file.

    Raises:
        ValueError: If the class rejects the options with any error.
    """
    try:
        return kind(**options)
    except Exception as error:
        raise ValueError(
            f"Expected the options in {name} to make a {kind.__name__}, got: {' '.join(str(error).split()):.300}"
        ) from error
