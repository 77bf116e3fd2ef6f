"""Where a simulation keeps what each client keeps to itself from one of its rounds to the next."""

import bisect
import errno
import hashlib
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol

from fedamm_pl.files import write_atomically
from fedamm_pl.protocol.codec import pack, unpack
from fedamm_pl.protocol.messages import State

DIGEST_SIZE = hashlib.sha256().digest_size


class ClientStore(Protocol):
    """Versions of what clients keep: a client's state of a round is written once and read until no checkpoint needs it."""

    def read(self, client_id: int, round_num: int) -> State:
        """Return what a client kept in a round.

        Raises:
            OSError: If it is not there, or damaged.
        """
        ...

    def write(self, client_id: int, round_num: int, state: State) -> None:
        """Keep a state as the client's version of a round."""
        ...

    def holds(self, client_id: int, round_num: int) -> bool:
        """Whether there is such a version, and it is whole."""
        ...

    def discard(self, after: int) -> None:
        """Forget the versions of rounds after this one: of a round that failed, or was interrupted."""
        ...

    def prune(self, rounds: Collection[int]) -> None:
        """Forget the versions that no one needs who goes on after one of these rounds."""
        ...


class Versions:
    """Which versions there are, and which of them are no longer needed."""

    def __init__(self) -> None:
        self.rounds: dict[int, list[int]] = {}

    def add(self, client_id: int, round_num: int) -> None:
        """Note a version."""
        known = self.rounds.setdefault(client_id, [])
        if round_num not in known:
            bisect.insort(known, round_num)

    def after(self, round_num: int) -> list[tuple[int, int]]:
        """Drop and return the versions of later rounds."""
        return self._drop(lambda known: [version for version in known if version <= round_num])

    def unneeded(self, rounds: Collection[int]) -> list[tuple[int, int]]:
        """Drop and return the versions that are not the newest up to one of these rounds.

        Example:
            >>> versions = Versions()
            >>> for round_num in (1, 4, 6):
            ...     versions.add(0, round_num)
            >>> versions.unneeded([5, 7])
            [(0, 1)]
        """

        def needed(known: list[int]) -> list[int]:
            found = {known[place - 1] for end in rounds if (place := bisect.bisect_right(known, end))}
            return sorted(found)

        return self._drop(needed)

    def _drop(self, kept_of: Callable[[list[int]], list[int]]) -> list[tuple[int, int]]:
        dropped = []
        for client, known in list(self.rounds.items()):
            kept = kept_of(known)
            dropped += [(client, version) for version in known if version not in kept]
            self.rounds[client] = kept
        return dropped


class MemoryStore:
    """Keeps states in memory, for runs that write nothing."""

    def __init__(self) -> None:
        self._versions = Versions()
        self._states: dict[tuple[int, int], State] = {}

    def read(self, client_id: int, round_num: int) -> State:
        """Return what a client kept in a round."""
        return self._states[client_id, round_num]

    def write(self, client_id: int, round_num: int, state: State) -> None:
        """Keep a state as the client's version of a round."""
        self._versions.add(client_id, round_num)
        self._states[client_id, round_num] = state

    def holds(self, client_id: int, round_num: int) -> bool:
        """Whether there is such a version."""
        return (client_id, round_num) in self._states

    def discard(self, after: int) -> None:
        """Forget the versions of rounds after this one."""
        for version in self._versions.after(after):
            del self._states[version]

    def prune(self, rounds: Collection[int]) -> None:
        """Forget the versions that no one needs who goes on after one of these rounds."""
        for version in self._versions.unneeded(rounds):
            del self._states[version]


class FileStore:
    """Keeps states in files, ``<folder>/<client>_<round>.state``: tensors and their checksum.

    Args:
        folder: Where; made when the first state is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._versions = Versions()
        if folder.is_dir():
            for path in folder.iterdir():
                if found := re.fullmatch(r"(\d+)_(\d+)\.state", path.name):
                    self._versions.add(int(found[1]), int(found[2]))

    def read(self, client_id: int, round_num: int) -> State:
        """Return what a client kept in a round.

        Raises:
            OSError: If it is not there, or damaged.
        """
        path = self._path(client_id, round_num)
        if path.exists() and not path.is_file():  # to read a pipe would wait for ever
            raise OSError(errno.EINVAL, "the client's stored state is not a file", str(path))
        content = path.read_bytes()
        packed, digest = content[:-DIGEST_SIZE], content[-DIGEST_SIZE:]
        try:
            if hashlib.sha256(packed).digest() != digest:
                raise ValueError("its checksum differs")
            return unpack(packed)[0]
        except ValueError as error:
            raise OSError(errno.EIO, f"the client's stored state is damaged, {error}", str(path)) from error

    def write(self, client_id: int, round_num: int, state: State) -> None:
        """Keep a state as the client's version of a round."""
        self.folder.mkdir(exist_ok=True)  # without parents: a run whose folder was removed shall not make a new one
        packed = pack(state)
        write_atomically(self._path(client_id, round_num), packed + hashlib.sha256(packed).digest())
        self._versions.add(client_id, round_num)

    def holds(self, client_id: int, round_num: int) -> bool:
        """Whether there is such a version, and it is whole."""
        try:
            self.read(client_id, round_num)
        except OSError:
            return False
        return True

    def versions(self, client_id: int) -> list[int]:
        """Return the rounds in which a client kept what is here, in order."""
        return list(self._versions.rounds.get(client_id, ()))

    def discard(self, after: int) -> None:
        """Forget the versions of rounds after this one."""
        self._remove(self._versions.after(after))

    def prune(self, rounds: Collection[int]) -> None:
        """Forget the versions that no one needs who goes on after one of these rounds."""
        self._remove(self._versions.unneeded(rounds))

    def _remove(self, versions: list[tuple[int, int]]) -> None:
        for client, round_num in versions:
            self._path(client, round_num).unlink(missing_ok=True)

    def _path(self, client_id: int, round_num: int) -> Path:
        return self.folder / f"{client_id:06d}_{round_num:06d}.state"


class RoundKept:
    """What the clients of a round keep: read from before it, in force when the round has succeeded.

    Args:
        store: Has it.
        versions: Client -> the round of what it kept last.
        round_num: The round.
        personal: What a client has at its first round: the personal state that the module was made with.
    """

    def __init__(self, store: ClientStore, versions: dict[int, int], round_num: int, personal: State) -> None:
        self._store = store
        self._versions = versions
        self._round_num = round_num
        self._personal = personal
        self._written: dict[int, int] = {}
        self.drop()  # of the same round, interrupted

    def read(self, client_id: int) -> State:
        """Return what a client has kept.

        Raises:
            OSError: If it is not there, or damaged.
        """
        version = self._versions.get(client_id)
        return self._personal if version is None else self._store.read(client_id, version)

    def write(self, client_id: int, state: State) -> None:
        """Keep a client's state, if it keeps anything."""
        if state:
            self._store.write(client_id, self._round_num, state)
            self._written[client_id] = self._round_num

    def commit(self) -> None:
        """Let what was written be what the clients have kept."""
        self._versions.update(self._written)

    def drop(self) -> None:
        """Forget what was written: the round has failed."""
        self._store.discard(after=self._round_num - 1)
