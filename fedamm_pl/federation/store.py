"""Stores in which a simulation keeps the private state of each client from one of its rounds to the next."""

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
    """Interface of a store of private states, with versions by client and round.

    A version is written once, and read until no checkpoint needs it.
    """

    def read(self, client_id: int, round_num: int) -> State:
        """Return the private state of a client that was written in a round.

        Raises:
            OSError: If it is missing or damaged.
        """
        ...

    def write(self, client_id: int, round_num: int, state: State) -> None:
        """Store a state as the client's version of a round."""
        ...

    def holds(self, client_id: int, round_num: int) -> bool:
        """Return whether such a version exists and is intact."""
        ...

    def discard(self, after: int) -> None:
        """Remove the versions of rounds after this one, which failed or were interrupted."""
        ...

    def prune(self, rounds: Collection[int]) -> None:
        """Remove the versions that are not needed to continue after one of these rounds."""
        ...


class Versions:
    """Keeps track of which versions exist, and which of them are no longer needed."""

    def __init__(self) -> None:
        self.rounds: dict[int, list[int]] = {}

    def add(self, client_id: int, round_num: int) -> None:
        """Add a version."""
        known = self.rounds.setdefault(client_id, [])
        if round_num not in known:
            bisect.insort(known, round_num)

    def after(self, round_num: int) -> list[tuple[int, int]]:
        """Drop and return the versions of later rounds."""
        return self._drop(lambda known: [version for version in known if version <= round_num])

    def unneeded(self, rounds: Collection[int]) -> list[tuple[int, int]]:
        """Drop and return the versions that are not the newest one up to any of these rounds.

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
    """Stores states in memory, for runs without an output folder."""

    def __init__(self) -> None:
        self._versions = Versions()
        self._states: dict[tuple[int, int], State] = {}

    def read(self, client_id: int, round_num: int) -> State:
        """Return the private state of a client that was written in a round."""
        return self._states[client_id, round_num]

    def write(self, client_id: int, round_num: int, state: State) -> None:
        """Store a state as the client's version of a round."""
        self._versions.add(client_id, round_num)
        self._states[client_id, round_num] = state

    def holds(self, client_id: int, round_num: int) -> bool:
        """Return whether such a version exists."""
        return (client_id, round_num) in self._states

    def discard(self, after: int) -> None:
        """Remove the versions of rounds after this one."""
        for version in self._versions.after(after):
            del self._states[version]

    def prune(self, rounds: Collection[int]) -> None:
        """Remove the versions that are not needed to continue after one of these rounds."""
        for version in self._versions.unneeded(rounds):
            del self._states[version]


class FileStore:
    """Stores states in files, ``<folder>/<client>_<round>.state``: tensors and their checksum.

    Args:
        folder: Where to write the files; created when the first state is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._versions = Versions()
        if folder.is_dir():
            for path in folder.iterdir():
                if found := re.fullmatch(r"(\d+)_(\d+)\.state", path.name):
                    self._versions.add(int(found[1]), int(found[2]))

    def read(self, client_id: int, round_num: int) -> State:
        """Return the private state of a client that was written in a round.

        Raises:
            OSError: If it is missing or damaged.
        """
        path = self._path(client_id, round_num)
        if path.exists() and not path.is_file():  # reading a pipe would block forever
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
        """Store a state as the client's version of a round."""
        self.folder.mkdir(exist_ok=True)  # not its parents: a run whose folder was removed must not create a new one
        packed = pack(state)
        write_atomically(self._path(client_id, round_num), packed + hashlib.sha256(packed).digest())
        self._versions.add(client_id, round_num)

    def holds(self, client_id: int, round_num: int) -> bool:
        """Return whether such a version exists and is intact."""
        try:
            self.read(client_id, round_num)
        except OSError:
            return False
        return True

    def versions(self, client_id: int) -> list[int]:
        """Return the rounds for which there is a version of a client, in order."""
        return list(self._versions.rounds.get(client_id, ()))

    def discard(self, after: int) -> None:
        """Remove the versions of rounds after this one."""
        self._remove(self._versions.after(after))

    def prune(self, rounds: Collection[int]) -> None:
        """Remove the versions that are not needed to continue after one of these rounds."""
        self._remove(self._versions.unneeded(rounds))

    def _remove(self, versions: list[tuple[int, int]]) -> None:
        for client, round_num in versions:
            self._path(client, round_num).unlink(missing_ok=True)

    def _path(self, client_id: int, round_num: int) -> Path:
        return self.folder / f"{client_id:06d}_{round_num:06d}.state"


class RoundKept:
    """The private state of clients in a round. It is read from earlier rounds, and replaced only if the round succeeds.

    Args:
        store: Where the private states are stored.
        versions: Client -> the round of its current version; updated if the round succeeds.
        round_num: The round.
        personal: State of a client in its first round: the personal state with which the module was created.
    """

    def __init__(self, store: ClientStore, versions: dict[int, int], round_num: int, personal: State) -> None:
        self._store = store
        self._versions = versions
        self._round_num = round_num
        self._personal = personal
        self._written: dict[int, int] = {}
        self.drop()  # an interrupted attempt at the same round

    def read(self, client_id: int) -> State:
        """Return the private state of a client.

        Raises:
            OSError: If it is missing or damaged.
        """
        version = self._versions.get(client_id)
        return self._personal if version is None else self._store.read(client_id, version)

    def write(self, client_id: int, state: State) -> None:
        """Store the new private state of a client, if it has one."""
        if state:
            self._store.write(client_id, self._round_num, state)
            self._written[client_id] = self._round_num

    def commit(self) -> None:
        """Make the states that were written the current ones of their clients."""
        self._versions.update(self._written)

    def drop(self) -> None:
        """Remove the states that were written, because the round has failed."""
        self._store.discard(after=self._round_num - 1)
