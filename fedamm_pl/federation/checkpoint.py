"""Checkpoints of a run: written whole or not at all, and checked when read."""

import hashlib
import io
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_type_hints

import torch

from fedamm_pl.data.sources.reading import require_memory
from fedamm_pl.federation.soundness import first_nonfinite
from fedamm_pl.files import write_atomically
from fedamm_pl.hints import fits
from fedamm_pl.protocol.messages import ClientFailure, ClientResult, State, payload_bytes
from fedamm_pl.stored import reason_of, require_bounded, require_plain_archive
from fedamm_pl.version import __version__

log = logging.getLogger(__name__)
PATTERN = "round_*.ckpt"
DIGEST_SIZE = hashlib.sha256().digest_size
FORMAT = 2
"""Format of the files; runs cannot be continued from files of another format."""
SPARE_BYTES = 2**30
"""Bytes that the tensors of a state may take in addition to four times the size of its file."""


class OtherVersionError(ValueError):
    """Raised if a checkpoint is intact, but has another format."""


@dataclass
class RunState:
    """Everything needed to continue a run; random draws depend on seed and round, and optimizers are new each round.

    Attributes:
        round_num: The last completed round; 0 before the first.
        shared: The server's state.
        history: A row of metrics for each evaluated round, ``round`` among them.
        seconds: Wall time so far by kind: clients (waiting for them), evaluate, other.
        client_seconds: Time that clients needed so far, added up over them: train, meta. With several workers it may
            exceed the wall time.
        bytes_total: Tensor bytes so far between server and clients: received and sent by clients.
        clients_total: Number of client fits so far, and of times that a client only computed statistics.
        counts: Clients that failed, updates refused, rounds failed, and times the run was continued so far.
        failed_in_a_row: Number of rounds that have failed since the last successful one.
        stopped: Why the run stopped, if too many rounds in a row failed or none succeeded.
        ended: Why the run ended early without an error, by a callback or early stopping.
        kept: Client -> the round of its current private state, see :mod:`fedamm_pl.federation.store`.
        diverged: When the global model was first seen to have diverged, and how: ``round`` and ``reason``.
        diagnostics: Data for the figures besides the metrics, for each evaluated round: ``round``, ``bytes`` and
            ``seconds`` up to it, and what the algorithm adds.
        confusion: Confusion matrix of the last evaluation: test images by true class (row) and predicted class; None
            with many classes.
        client_accuracies: Accuracies on the examples that each client has held out, or NaN: ``latest``, of the global
            model in the last evaluation; ``best``, of the global model in the best round by validation; ``own``, of the
            client's own model in the last evaluation.
    """

    round_num: int
    shared: State
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("clients", "evaluate", "other"), 0.0))
    client_seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("train", "meta"), 0.0))
    bytes_total: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("received", "sent"), 0))
    clients_total: int = 0
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("failed_clients", "refused_updates", "failed_rounds", "resumes"), 0)
    )
    failed_in_a_row: int = 0
    stopped: str | None = None
    ended: str | None = None
    kept: dict[int, int] = field(default_factory=dict)
    diverged: dict[str, Any] | None = None
    diagnostics: list[dict[str, Any]] = field(default_factory=list)
    confusion: list[list[int]] | None = None
    client_accuracies: dict[str, list[float]] = field(default_factory=dict)

    def copy(self) -> "RunState":
        """Return an independent copy; tensors are shared, since they are never changed in place."""
        containers: dict[str, Any] = {
            name: value.copy() for name, value in vars(self).items() if isinstance(value, dict | list)
        }
        return replace(self, **containers)

    def count(
        self, failures: Sequence[ClientFailure], failed: str | None, max_failed_rounds: int, num_rounds: int
    ) -> None:
        """Count the failures of a round, and stop the run if too many rounds have failed in a row, or all of them.

        Args:
            failures: The clients that failed and those whose update was refused.
            failed: Why the round failed, or None.
            max_failed_rounds: Number of failed rounds in a row that stops the run.
            num_rounds: Number of rounds of the run.
        """
        self.count_clients(failures)
        self.counts["failed_rounds"] += failed is not None
        self.failed_in_a_row = self.failed_in_a_row + 1 if failed else 0
        if self.failed_in_a_row >= max_failed_rounds:
            self.stopped = (
                f"stopped after round {self.round_num}: {self.failed_in_a_row} rounds in a row failed, "
                f"`max_failed_rounds` allows no more. The last: {failed}"
            )
        elif failed and self.counts["failed_rounds"] == self.round_num == num_rounds:
            self.stopped = f"stopped after round {self.round_num}: no round succeeded. The last: {failed}"

    def count_clients(self, failures: Sequence[ClientFailure]) -> None:
        """Count clients that failed, and those whose update was refused."""
        refused = sum(failure.stage == "update" for failure in failures)
        self.counts["refused_updates"] += refused
        self.counts["failed_clients"] += len(failures) - refused

    def account(
        self, results: Sequence[ClientResult], seconds: Mapping[str, float], client_seconds: Mapping[str, float]
    ) -> None:
        """Add the costs of a round to the totals.

        Args:
            results: The results of the round's clients.
            seconds: Wall time by kind.
            client_seconds: Time of the clients by kind.
        """
        for kind, value in seconds.items():
            self.seconds[kind] += value
        for kind, value in client_seconds.items():
            self.client_seconds[kind] += value
        self.bytes_total["received"] += sum(result.bytes_received for result in results)
        self.bytes_total["sent"] += sum(result.bytes_sent for result in results)
        self.clients_total += len(results)

    def note(self, shown: Mapping[str, Any]) -> None:
        """Record data for the figures: the costs up to an evaluated round, and what the method adds."""
        spent = {"seconds": self.seconds.copy(), "client_seconds": self.client_seconds.copy()}
        row = {"round": self.round_num, "bytes": sum(self.bytes_total.values()), **spent}
        self.diagnostics.append({**row, **shown})


@dataclass(frozen=True)
class Checkpoint:
    """A run's state, with its fingerprint and its environment.

    Attributes:
        state: The state.
        fingerprint: What determines the result, see :func:`~fedamm_pl.federation.fingerprint.fingerprint`.
        environment: What can change the last digits of the result.
    """

    state: RunState
    fingerprint: dict[str, Any]
    environment: dict[str, Any]


def save_checkpoint(
    folder: Path, state: RunState, fingerprint: Mapping[str, Any], environment: Mapping[str, Any]
) -> Path:
    """Write ``<folder>/round_<number>.ckpt``.

    Args:
        folder: Where to write it; created if missing.
        state: What to write.
        fingerprint: What determines the result, in primitive types.
        environment: What can change the last digits of the result.

    Returns:
        The file's path.
    """
    folder.mkdir(exist_ok=True)  # not its parents: a run whose folder was removed must not create a new one
    shared = {name: value.cpu() for name, value in state.shared.items()}
    content = {
        "format": FORMAT,
        "fingerprint": dict(fingerprint),
        "environment": dict(environment),
        "state": {**vars(state), "shared": shared},
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path, archive = folder / f"round_{state.round_num:06d}.ckpt", buffer.getvalue()
    # zip's own checksums do not cover its directory, where a flipped bit can give a tensor of uninitialised memory
    write_atomically(path, archive + hashlib.sha256(archive).digest())
    return path


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint after checking its checksum; nothing in it is executed.

    Raises:
        OtherVersionError: If another version of this package wrote it in another format.
        ValueError: If the file is damaged, cannot be read, or is no checkpoint of the round in its name.
    """
    try:
        if path.exists() and not path.is_file():  # reading a pipe would block forever
            raise ValueError("it is not a file")
        require_memory(path.stat().st_size, "it")
        content = path.read_bytes()
        archive, digest = content[:-DIGEST_SIZE], content[-DIGEST_SIZE:]
        if hashlib.sha256(archive).digest() != digest:
            raise ValueError("its checksum differs")
        require_plain_archive(io.BytesIO(archive))
        loaded = torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)
        require_bounded(loaded, len(archive))
        if loaded.get("format") != FORMAT:
            raise OtherVersionError(
                f"Expected {path} to be of fedamm_pl {__version__} (format {FORMAT}), got a checkpoint that version "
                f"{loaded['fingerprint']['fedamm_pl']} wrote (format {loaded.get('format', 1)}): continue with that version, or "
                "choose another `output_dir` to start again."
            )
        state = RunState(**loaded["state"])
        types = get_type_hints(RunState)
        if wrong := [name for name, value in vars(state).items() if not fits(value, types[name], finite=False)]:
            raise ValueError(f"its {wrong[0]} is no {types[wrong[0]]}")
        _require_sound(state, len(archive))
        if path.stem != f"round_{state.round_num:06d}":
            raise ValueError(f"it is of round {state.round_num}")
        return Checkpoint(state, dict(loaded["fingerprint"]), dict(loaded["environment"]))
    except OtherVersionError:
        raise
    except Exception as error:  # whatever the error is, an older checkpoint may be intact
        raise ValueError(
            f"Expected {path} to be an intact checkpoint of a run, got a damaged file ({reason_of(error)})."
        ) from error


def _require_sound(state: RunState, size: int) -> None:
    """Check what the types do not show, so that a run that continues from the state does not fail during a round.

    Args:
        state: The state in a file.
        size: Size of the file in bytes.

    Raises:
        ValueError: If an account or a row lacks an entry that a run writes, or the server's state is not finite or far
            larger than the file.
    """
    blank = RunState(0, {})
    for name in ("seconds", "client_seconds", "bytes_total", "counts"):
        account = getattr(state, name)
        if account.keys() != getattr(blank, name).keys() or not all(0 <= part < math.inf for part in account.values()):
            raise ValueError(f"its {name} are not valid for a run")
    if state.client_accuracies and "latest" not in state.client_accuracies:
        raise ValueError("its client_accuracies lack the latest")
    if not state.history or not all({"round", "test/acc"} <= row.keys() for row in state.history):
        raise ValueError("its history is empty or has a row without round or test/acc")
    if state.diverged is not None and not {"round", "reason"} <= state.diverged.keys():
        raise ValueError("its diverged lacks round or reason")
    if odd := [name for name, value in state.shared.items() if value.layout is not torch.strided or value.is_meta]:
        raise ValueError(f"its {odd[0]} is not a dense tensor")
    if (needed := payload_bytes(state.shared)) > SPARE_BYTES + 4 * size:
        raise ValueError(f"its tensors take {needed} bytes")
    if entry := first_nonfinite(state.shared):
        raise ValueError(f"its {entry} is NaN or infinite")


def saved_rounds(folder: Path) -> list[int]:
    """Return the rounds for which a folder holds checkpoints, newest first."""
    found = (re.fullmatch(r"round_(\d{6,})", path.stem) for path in folder.glob(PATTERN))
    return sorted((int(match[1]) for match in found if match), reverse=True)


def latest_checkpoint(folder: Path, holds: Callable[[int, int], bool] | None = None) -> Checkpoint | None:
    """Read the newest intact checkpoint of a folder; damaged and half-written ones are reported and skipped.

    Args:
        folder: Where the checkpoints are.
        holds: Client and round -> whether the private state of the client in that round exists and is intact; without
            it, a checkpoint counts as damaged.

    Returns:
        The checkpoint, or None if the folder holds none at all.

    Raises:
        OtherVersionError: If another version of this package wrote the newest.
        ValueError: If there are checkpoints, but none of them is intact.
    """
    for path in folder.glob(f".{PATTERN}.tmp"):
        log.warning("%s was being written when a run was stopped. It is skipped.", path)
    paths = sorted(folder.glob(PATTERN), reverse=True)
    damaged: list[ValueError] = []
    for path in paths:
        try:
            found = load_checkpoint(path)
            _require_kept(path, found.state, holds)
        except OtherVersionError:
            raise
        except ValueError as error:
            damaged.append(error)
            continue
        for reason in damaged:
            log.warning("%s It is skipped.", reason)
        return found
    if paths:
        raise ValueError(
            f"Expected {folder} to hold an intact checkpoint to continue from, got {len(paths)} damaged: "
            "choose another `output_dir`, or delete them to start again."
        )
    return None


def _require_kept(path: Path, state: RunState, holds: Callable[[int, int], bool] | None) -> None:
    if holds and (lacking := [client for client, round_num in state.kept.items() if not holds(client, round_num)]):
        raise ValueError(
            f"Expected {path} to be an intact checkpoint of a run, got one without its clients' state: the files of "
            f"{len(lacking)} of {len(state.kept)} are missing or damaged, the first of client {lacking[0]}."
        )
