"""What clients keep, version by version, in memory and in files."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedamm_pl.algorithms import Moon, Scaffold
from fedamm_pl.federation.store import ClientStore, FileStore, MemoryStore, RoundKept, Versions
from fedamm_pl.protocol.messages import State
from tests.federation.small import assert_equal, federation
from tests.tiny import tiny_data

REPEATABLE = settings(deadline=None, derandomize=True, database=None, max_examples=300)


def state(number: int) -> State:
    return {"model.w": torch.full((2, 3), number / 3), "count": torch.tensor(number), "none": torch.empty(0)}


@pytest.fixture(params=["memory", "files"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ClientStore:
    return MemoryStore() if request.param == "memory" else FileStore(tmp_path / "clients")


def test_what_was_written_is_read(store: ClientStore) -> None:
    store.write(0, 1, state(1))
    store.write(0, 2, state(2))
    store.write(1234567, 1, state(3))
    for client, round_num, number in ((0, 1, 1), (0, 2, 2), (1234567, 1, 3)):
        assert_equal(store.read(client, round_num), state(number))
        assert store.holds(client, round_num)
    assert not store.holds(0, 3)
    assert not store.holds(1, 1)
    with pytest.raises((OSError, KeyError)):
        store.read(1, 1)


def test_a_version_is_replaced_by_one_of_the_same_round(store: ClientStore) -> None:
    store.write(0, 1, state(1))
    store.write(0, 1, state(2))
    assert_equal(store.read(0, 1), state(2))
    store.prune([1])
    assert store.holds(0, 1)


def test_later_rounds_are_discarded(store: ClientStore) -> None:
    for client, round_num in ((0, 1), (0, 2), (0, 3), (1, 3)):
        store.write(client, round_num, state(round_num))
    store.discard(after=1)
    assert [store.holds(*version) for version in ((0, 1), (0, 2), (0, 3), (1, 3))] == [True, False, False, False]
    store.discard(after=1)


def test_what_no_checkpoint_needs_is_pruned(store: ClientStore) -> None:
    for client, round_num in ((0, 1), (0, 4), (0, 6), (1, 2), (2, 7)):
        store.write(client, round_num, state(round_num))
    store.prune([5, 7])
    held = {version: store.holds(*version) for version in ((0, 1), (0, 4), (0, 6), (1, 2), (2, 7))}
    assert held == {(0, 1): False, (0, 4): True, (0, 6): True, (1, 2): True, (2, 7): True}
    store.prune([5])
    assert not store.holds(2, 7)


# Versions against a model that tries all

VERSIONS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 12)), max_size=30)
Model = set[tuple[int, int]]


def needed(model: Model, rounds: set[int]) -> Model:
    """The version that each client would go on with after each of the rounds."""
    return {
        max(
            (version for version in model if version[0] == client and version[1] <= end), key=lambda version: version[1]
        )
        for end in rounds
        for client in {client for client, known in model if known <= end}
    }


@given(
    steps=st.lists(
        st.tuples(st.just("add"), VERSIONS)
        | st.tuples(st.just("after"), st.integers(0, 12))
        | st.tuples(st.just("unneeded"), st.sets(st.integers(0, 13), max_size=5)),
        max_size=12,
    )
)
@REPEATABLE
def test_versions_are_those_of_a_model_that_tries_all(steps: list[tuple[str, object]]) -> None:
    versions, model = Versions(), set[tuple[int, int]]()
    for kind, value in steps:
        if kind == "add":
            for version in value:  # type: ignore[attr-defined]
                versions.add(*version)
                model.add(version)
            continue
        dropped = versions.after(value) if kind == "after" else versions.unneeded(value)  # type: ignore[arg-type]
        left = {version for version in model if version[1] <= value} if kind == "after" else needed(model, value)  # type: ignore[operator, arg-type]
        assert sorted(dropped) == sorted(model - left)
        model = left
        assert {(client, known) for client, all_known in versions.rounds.items() for known in all_known} == model


# Files


def test_files_are_found_again_and_others_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "clients"
    first = FileStore(folder)
    assert not folder.exists()  # until something is kept
    first.write(3, 2, state(1))
    first.write(3, 5, state(2))
    (folder / "notes.txt").write_text("mine")
    (folder / "000003_000001.state.bak").write_text("mine")
    second = FileStore(folder)
    second.prune([5])
    assert sorted(path.name for path in folder.iterdir()) == [
        "000003_000001.state.bak",
        "000003_000005.state",
        "notes.txt",
    ]
    assert_equal(second.read(3, 5), state(2))


@pytest.mark.parametrize("kind", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_not_waited_for(kind: Any, tmp_path: Path) -> None:
    store = FileStore(tmp_path / "clients")
    store.write(0, 1, state(1))
    path = tmp_path / "clients/000000_000001.state"
    path.unlink()
    kind(path)
    assert not store.holds(0, 1)
    with pytest.raises(OSError, match="the client's stored state is not a file"):
        store.read(0, 1)


@pytest.mark.parametrize("place", [0, 50, -40, -1])
def test_a_damaged_file_is_not_read(place: int, tmp_path: Path) -> None:
    store = FileStore(tmp_path / "clients")
    store.write(3, 2, state(1))
    (path,) = (tmp_path / "clients").iterdir()
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(OSError, match="the client's stored state is damaged, its checksum differs"):
        store.read(3, 2)
    assert not store.holds(3, 2)
    path.write_bytes(b"")
    assert not store.holds(3, 2)


def test_a_folder_that_was_removed_is_not_made_anew(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        FileStore(tmp_path / "gone/clients").write(0, 1, state(1))


# A round


def test_what_a_round_keeps_is_in_force_when_it_has_succeeded(store: ClientStore) -> None:
    versions: dict[int, int] = {}
    first = RoundKept(store, versions, 1, state(0))
    assert_equal(first.read(5), state(0))  # its personal state
    first.write(5, state(1))
    first.write(6, {})
    assert_equal(first.read(5), state(0))
    assert versions == {}
    first.commit()
    assert versions == {5: 1}
    second = RoundKept(store, versions, 2, state(0))
    assert_equal(second.read(5), state(1))
    second.write(5, state(2))
    second.drop()
    assert_equal(second.read(5), state(1))
    assert not store.holds(5, 2)
    again = RoundKept(store, versions, 2, state(0))
    again.write(5, state(3))
    interrupted = RoundKept(store, versions, 2, state(0))
    assert not store.holds(5, 2)
    assert_equal(interrupted.read(5), state(1))


# In runs


def sizes(folder: Path) -> tuple[int, int]:
    """Bytes of the newest checkpoint, and of all that clients keep."""
    newest = max((folder / "checkpoints").glob("*.ckpt"))
    return newest.stat().st_size, sum(path.stat().st_size for path in (folder / "clients").glob("*"))


def test_a_checkpoint_does_not_grow_by_what_clients_keep(tmp_path: Path) -> None:
    from fedamm_pl import FedAvg

    options = {"num_rounds": 8, "eval_interval": 8, "client_fraction": 0.25, "keep_checkpoints": 1}
    data = {"num_clients": 40, "partition": "iid", "batch_size": 64}
    for algorithm in (FedAvg, Moon):
        folder = tmp_path / algorithm.__name__
        method = {"projection": None} if algorithm is Moon else {}  # a head of its own would make it larger
        run = federation(algorithm, tiny_data(**data), method=method, output_dir=folder, **options)  # type: ignore[arg-type]
        run.run()
    plain, moon = (sizes(tmp_path / name) for name in ("FedAvg", "Moon"))
    assert plain[1] == 0
    num_kept = len(run.state.kept)
    assert num_kept > 30
    assert abs(moon[0] - plain[0]) <= num_kept * 300
    assert moon[1] > num_kept * 10_000
    assert len(list((tmp_path / "Moon/clients").iterdir())) <= 2 * 40  # of the newest checkpoint and of the best


@pytest.mark.parametrize("keep_checkpoints", [1, 3])
def test_files_of_clients_are_bounded_by_the_checkpoints(keep_checkpoints: int, tmp_path: Path) -> None:
    run = federation(Scaffold, num_rounds=12, eval_interval=4, keep_checkpoints=keep_checkpoints, output_dir=tmp_path)
    run.run()
    rounds = {int(path.stem.removeprefix("round_")) for path in (tmp_path / "checkpoints").iterdir()}
    assert keep_checkpoints <= len(rounds) <= keep_checkpoints + 1
    versions = {tuple(map(int, path.stem.split("_"))) for path in (tmp_path / "clients").iterdir()}
    assert len(versions) <= 4 * len(rounds)
    assert versions == needed(versions, rounds)  # type: ignore[arg-type]
    assert versions >= set(run.state.kept.items())
