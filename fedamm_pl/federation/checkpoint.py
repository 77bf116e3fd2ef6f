"""Server states on disk: written whole or not at all, checked when read."""

import io
import logging
import os
import pickle
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fedamm_pl.federation.messages import State

log = logging.getLogger(__name__)
PATTERN = "round_*.ckpt"


@dataclass
class RunState:
    """All that a run needs to go on: randomness is a function of the seed and the round, optimizers are new each round.

    Attributes:
        round_num: The last completed round; 0 before the first.
        shared: The server's state.
        history: A row of metrics for each evaluated round, ``round`` among them.
        seconds: Wall time so far by kind: train, meta, evaluate, other.
        bytes_total: Tensor bytes so far between server and clients: received and sent by clients.
        clients_total: Client fits so far.
    """

    round_num: int
    shared: State
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("train", "meta", "evaluate", "other"), 0.0)
    )
    bytes_total: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("received", "sent"), 0))
    clients_total: int = 0


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a loss of power."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    if os.name == "posix":  # the new name itself, too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def make_writable(folder: Path) -> None:
    """Make a folder if it is missing, and try to write into it.

    Raises:
        ValueError: If that fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"Expected `output_dir` to be a folder that can be written, got {folder} ({error.strerror})."
        ) from error


def save_checkpoint(folder: Path, state: RunState, fingerprint: Mapping[str, Any]) -> Path:
    """Write ``<folder>/round_<number>.ckpt``.

    Args:
        folder: Where to; made if missing.
        state: What to write.
        fingerprint: The options that determine the result, in primitive types.

    Returns:
        The file's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {"fingerprint": dict(fingerprint), **vars(state)}
    content["shared"] = {name: value.cpu() for name, value in state.shared.items()}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path = folder / f"round_{state.round_num:06d}.ckpt"
    write_atomically(path, buffer.getvalue())
    return path


def load_checkpoint(path: Path) -> tuple[RunState, dict[str, Any]]:
    """Read a checkpoint after checking its checksums; nothing in it is executed.

    Returns:
        The state, and the fingerprint of the run that wrote it.

    Raises:
        ValueError: If the file is damaged or no checkpoint of a run.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"checksum of {damaged} differs")
        content = torch.load(path, map_location="cpu", weights_only=True)
        fingerprint = content.pop("fingerprint")
        return RunState(**content), fingerprint
    except (
        zipfile.BadZipFile,
        EOFError,
        pickle.UnpicklingError,
        RuntimeError,
        KeyError,
        TypeError,
        ValueError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"Expected {path} to be a whole checkpoint of a run, got a damaged file ({reason})."
        ) from error


def latest_checkpoint(folder: Path) -> tuple[RunState, dict[str, Any]] | None:
    """Read the newest whole checkpoint of a folder; damaged ones are reported and passed over.

    Returns:
        State and fingerprint, or None if the folder holds no checkpoint at all.

    Raises:
        ValueError: If there are checkpoints and none of them is whole.
    """
    paths = sorted(folder.glob(PATTERN), reverse=True)
    damaged: list[ValueError] = []
    for path in paths:
        try:
            found = load_checkpoint(path)
        except ValueError as error:
            damaged.append(error)
            continue
        for reason in damaged:
            log.warning("%s It is passed over.", reason)
        return found
    if paths:
        raise ValueError(
            f"Expected {folder} to hold a whole checkpoint to continue from, got {len(paths)} damaged: "
            "choose another `output_dir`, or delete them to start anew."
        )
    return None


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """List the options in which two fingerprints differ, one sentence each."""
    return [
        f"{name} is {current.get(name)!r} but was {saved.get(name)!r}"
        for name in sorted({**saved, **current})
        if current.get(name) != saved.get(name)
    ]
