"""What clients keep between their rounds survives kills, resumes and failed rounds as the model does, and takes no more room."""

import functools
import itertools
import logging
import math
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from fedamm_pl import FederatedModule, Orchestrator
from fedamm_pl.algorithms import Moon, Scaffold
from fedamm_pl.cli.main import main
from fedamm_pl.federation.callbacks import FederationCallback
from fedamm_pl.federation.checkpoint import load_checkpoint
from fedamm_pl.federation.run import Run
from fedamm_pl.federation.store import FileStore
from fedamm_pl.protocol.messages import ClientResult, State
from fedamm_pl.protocol.session import ServerSession
from tests.faults import faulty
from tests.faults.faulty import CPU, SERVER, Plan
from tests.faults.test_kills import (
    assert_same_run,
    checkpoints,
    empty,
    ended,
    flip_a_bit,
    fork,
    kill_at,
    truncate,
    unfinished,
)
from tests.tiny import NUM_CLASSES, tiny_data

NETWORK = "tests.faults.faulty.network"
ROUNDS = 6


def federation(
    algorithm: type[FederatedModule], folder: Path | None = None, num_rounds: int = ROUNDS, **options: Any
) -> Orchestrator:
    """Two of four clients a round."""
    data = tiny_data(batch_size=8)
    torch.manual_seed(0)
    module = algorithm(NUM_CLASSES, 1, NETWORK, info=data.info, lr=0.05)
    defaults: dict[str, Any] = {"client_fraction": 0.5, "local_epochs": 1, "eval_interval": 1, "trainer": CPU}
    return Orchestrator(module, data, num_rounds=num_rounds, output_dir=folder, **{**defaults, **options})


def kept_files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "clients").iterdir())


def path_of(folder: Path, client: int, round_num: int) -> Path:
    return folder / f"clients/{client:06d}_{round_num:06d}.state"


def kept(folder: Path, round_num: int) -> dict[int, int]:
    """What a checkpoint says: client -> the round of what it keeps."""
    return load_checkpoint(folder / f"checkpoints/round_{round_num:06d}.ckpt").state.kept


def assert_same_end(folder: Path, expected: Path) -> None:
    """The same metrics, model and kept states, bit for bit."""
    assert_same_run(folder, expected)
    assert_same_kept(folder, expected)


def assert_same_kept(folder: Path, expected: Path) -> None:
    rounds = checkpoints(expected)[-1]
    assert kept(folder, rounds) == kept(expected, rounds)
    for pair in kept(expected, rounds).items():
        assert_same_state(*(FileStore(run / "clients").read(*pair) for run in (folder, expected)))


def assert_same_state(first: State, second: State) -> None:
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


@pytest.fixture(scope="module", params=[Moon, Scaffold])
def uninterrupted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[type[FederatedModule], Path]:
    """A method whose clients keep something, and the folder of a run of it."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    federation(request.param, folder).run()
    return request.param, folder


@pytest.fixture
def copy(uninterrupted: tuple[type[FederatedModule], Path], tmp_path: Path) -> Path:
    """A copy of its folder that one may damage."""
    shutil.copytree(uninterrupted[1], tmp_path / "run")
    return tmp_path / "run"


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    records = [record for record in caplog.records if record.name.startswith("fedamm_pl")]
    return [record.getMessage() for record in records if record.levelno >= logging.WARNING]


# Resumes


def test_a_run_in_pieces_ends_in_the_bits_of_an_uninterrupted_one(uninterrupted: Any, tmp_path: Path) -> None:
    algorithm, expected = uninterrupted
    for num_rounds in (1, 3, 4, ROUNDS):
        federation(algorithm, tmp_path, num_rounds).run()
    assert_same_end(tmp_path, expected)


def test_what_is_kept_in_memory_is_what_is_kept_in_files(uninterrupted: Any) -> None:
    algorithm, folder = uninterrupted
    run = federation(algorithm)
    run.run()
    expected = load_checkpoint(folder / f"checkpoints/round_{ROUNDS:06d}.ckpt").state
    assert run.state.kept == expected.kept
    assert_same_state(run.state.shared, expected.shared)


def test_what_is_kept_matters(uninterrupted: Any, copy: Path) -> None:
    """Else the tests of this file would show nothing."""
    algorithm, expected = uninterrupted
    federation(algorithm, copy, ROUNDS + 1).run()
    other = copy.with_name("other")
    shutil.copytree(expected, other)
    for client, round_num in kept(other, ROUNDS).items():
        store = FileStore(other / "clients")
        store.write(client, round_num, {name: 2 * v + 1 for name, v in store.read(client, round_num).items()})
    federation(algorithm, other, ROUNDS + 1).run()
    assert (copy / "metrics.csv").read_bytes() != (other / "metrics.csv").read_bytes()


@pytest.mark.parametrize("num_damaged", [1, 2])
def test_a_run_that_falls_back_takes_what_its_clients_kept_then(
    num_damaged: int, uninterrupted: Any, copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    algorithm, expected = uninterrupted
    for round_num in range(ROUNDS, ROUNDS - num_damaged, -1):
        truncate(copy / f"checkpoints/round_{round_num:06d}.ckpt")
    run = federation(algorithm, copy)
    with run.opened() as opened:
        assert opened.state.round_num == ROUNDS - num_damaged
        run.run()
    assert len(warnings_in(caplog)) == num_damaged
    assert_same_end(copy, expected)


def test_a_run_that_was_interrupted_may_be_run_again(uninterrupted: Any, tmp_path: Path) -> None:
    """A client of the round in progress has kept something already."""
    algorithm, expected = uninterrupted

    class Interrupts(FederationCallback):
        def on_client_end(self, run: Run, result: ClientResult) -> None:
            if run.state.round_num == 2 and not clients:
                clients.append(result.client_id)
                raise KeyboardInterrupt

    clients: list[int] = []
    run = federation(algorithm, tmp_path, callbacks=[Interrupts()])
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert path_of(tmp_path, clients[0], 3).exists()
    assert clients[0] not in run.state.kept or run.state.kept[clients[0]] < 3
    run.run()
    assert_same_end(tmp_path, expected)


# Missing and damaged files


def delete(path: Path) -> None:
    path.unlink()


def seal(path: Path, content: bytes) -> None:
    """Write something else, with a checksum that is in order."""
    path.write_bytes(content + sha256(content).digest())


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def replace_by_code(path: Path) -> None:
    seal(path, pickle.dumps(Bomb(path.parent / "executed")))


def replace_by_nothing(path: Path) -> None:
    seal(path, b"")


DAMAGES = [delete, empty, truncate, flip_a_bit, replace_by_code, replace_by_nothing]


@pytest.mark.parametrize("uninterrupted", [Moon], indirect=True)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_lacks_what_a_client_kept_is_passed_over(
    damage: Callable[[Path], None], uninterrupted: Any, copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    algorithm, expected = uninterrupted
    client = max(client for client, round_num in kept(copy, ROUNDS).items() if round_num == ROUNDS)
    damage(path_of(copy, client, ROUNDS))
    run = federation(algorithm, copy)
    with run.opened() as opened:
        assert opened.state.round_num == ROUNDS - 1
        run.run()
    (warning,) = warnings_in(caplog)
    assert f"round_{ROUNDS:06d}.ckpt" in warning
    assert f"client {client}" in warning
    assert "is skipped" in warning
    assert len(warning.splitlines()) == 1
    assert not (copy / "clients/executed").exists()
    (copy / "clients/executed").mkdir()  # the bomb could have gone off
    (copy / "clients/executed").rmdir()
    assert_same_end(copy, expected)


@pytest.mark.parametrize("uninterrupted", [Moon], indirect=True)
@pytest.mark.parametrize("damage", [delete, flip_a_bit])
def test_without_a_checkpoint_whose_clients_files_are_whole_a_run_is_refused(
    damage: Callable[[Path], None], uninterrupted: Any, copy: Path
) -> None:
    algorithm, _ = uninterrupted
    for name in kept_files(copy):
        damage(copy / "clients" / name)
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"to hold an intact checkpoint to continue from, got \d damaged") as refused:
        federation(algorithm, copy).run()
    assert len(str(refused.value).splitlines()) == 1
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()} == before


# Failed rounds


class StruckScaffold(faulty.Strikable, Scaffold):
    """A client fails, or returns NaN, or the server makes NaN of what it got, after they have trained."""

    def client_payload(self) -> State:
        payload = super().client_payload()
        self.strike()
        return plan_spoils(payload) if self.struck else payload

    def server_update(self, state: State, results: Any, server: ServerSession) -> State:
        updated = super().server_update(state, results, server)
        return plan_spoils(updated) if faulty.plan.strikes(server.round_num, SERVER) else updated


def plan_spoils(payload: State) -> State:
    return {**payload, "model.hidden.weight": torch.full_like(payload["model.hidden.weight"], math.nan)}


def nothing() -> None:
    pass


FAILED_ROUNDS: dict[str, tuple[list[int], Callable[[], None]]] = {
    "most clients fail": ([1, 2, 3], faulty.INJECTED),
    "most updates are refused": ([1, 2, 3], nothing),
    "the server's update is": ([SERVER], nothing),
}


@pytest.mark.parametrize("in_files", [True, False])
@pytest.mark.parametrize("how", FAILED_ROUNDS)
def test_a_failed_round_changes_nothing_that_clients_keep(
    how: str, in_files: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is as if none of its clients had answered."""
    runs = []
    for who, act in ([0, 1, 2, 3], faulty.INJECTED), FAILED_ROUNDS[how]:
        strikes = set(itertools.product([2, 3], who))
        monkeypatch.setattr(faulty, "plan", Plan(lambda *pair, strikes=strikes: pair in strikes, act))
        folder = tmp_path / str(len(runs)) if in_files else None
        for num_rounds in (2, 5) if folder and runs else (5,):  # also in pieces
            run = federation(StruckScaffold, folder, num_rounds, client_fraction=1.0, keep_checkpoints=1)
            run.run()
        assert run.state.counts["failed_rounds"] == 2
        assert run.state.kept == dict.fromkeys(range(4), 5)
        runs.append(run)
    assert_same_state(*(run.state.shared for run in runs))
    if in_files:
        assert_same_kept(tmp_path / "1", tmp_path / "0")
        assert kept_files(tmp_path / "0") == kept_files(tmp_path / "1")


@pytest.mark.parametrize("act", [faulty.INJECTED, nothing])
def test_a_client_that_fails_or_is_refused_keeps_what_it_kept(
    act: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faulty, "plan", Plan(lambda *pair: pair in ((2, 1), (1, 2)), act))
    run = federation(StruckScaffold, tmp_path, 2, client_fraction=1.0)
    run.run()
    assert run.state.kept == {0: 2, 1: 1, 2: 2, 3: 2}
    assert not path_of(tmp_path, 1, 2).exists()
    assert not path_of(tmp_path, 2, 1).exists()


# Room


def test_files_that_no_checkpoint_needs_are_removed(tmp_path: Path) -> None:
    class Counts(FederationCallback):
        def on_client_end(self, run: Run, result: ClientResult) -> None:
            numbers.append(len(kept_files(tmp_path)))

    numbers: list[int] = []
    for num_rounds in (9, 12):
        federation(Scaffold, tmp_path, num_rounds, keep_checkpoints=2, callbacks=[Counts()]).run()
    needed = {pair for number in checkpoints(tmp_path) for pair in kept(tmp_path, number).items()}
    assert len(checkpoints(tmp_path)) <= 3  # the newest two, and the best
    assert set(kept_files(tmp_path)) == {path_of(tmp_path, *pair).name for pair in needed}
    assert max(numbers) <= 4 * (3 + 1)


def test_other_files_beside_them_are_left(tmp_path: Path) -> None:
    (tmp_path / "clients").mkdir()
    names = ("notes.txt", "7.state", "x_1.state", "000000_000001.state.bak")
    for name in names:
        (tmp_path / "clients" / name).write_text("mine")
    federation(Scaffold, tmp_path, 4, keep_checkpoints=1).run()
    assert all((tmp_path / "clients" / name).read_text() == "mine" for name in names)


# The program

SHORT = ["--federation.num_rounds", "3", "--federation.eval_interval", "1", "--logger", "false"]
SHORT += ["--algorithm.model", NETWORK, "--algorithm", "Moon"]


@pytest.fixture(scope="module")
def short_run(command: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("short") / "run"
    main(command("FedAvg", folder, *SHORT))
    return folder


@pytest.mark.parametrize(
    "moment",
    [
        "half",
        pytest.param("fsync", marks=pytest.mark.slow),
        pytest.param("replace", marks=pytest.mark.slow),
        "replaced",
    ],
)
def test_a_run_that_is_killed_while_it_writes_what_a_client_keeps_ends_as_the_uninterrupted(
    moment: str, short_run: Path, command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, name = tmp_path / "run", max(name for name in kept_files(short_run) if name.endswith("_000002.state"))
    arguments = command("FedAvg", folder, *SHORT)
    kill = functools.partial(kill_at, f"{moment} .{name}.tmp 1")
    assert ended(fork(arguments, tmp_path / "log", kill)) == -signal.SIGKILL
    assert checkpoints(folder) == [0, 1]
    assert unfinished(folder) == ([] if moment == "replaced" else [f".{name}.tmp"])
    main(arguments)
    printed = capsys.readouterr()
    assert "continuing after round 1\n" in printed.out
    assert printed.err == ""
    assert_same_end(folder, short_run)


def spoil_at_once(paths: list[Path]) -> Callable[..., None]:
    """A disk that gives back other bytes than it was given."""
    write = FileStore.write

    def spoiled(store: FileStore, client_id: int, round_num: int, state: State) -> None:
        write(store, client_id, round_num, state)
        path = store.folder / f"{client_id:06d}_{round_num:06d}.state"
        paths.append(path)
        flip_a_bit(path)

    return spoiled


def test_a_file_that_cannot_be_read_in_the_middle_of_a_run_ends_it_in_one_line(
    short_run: Path, command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, paths = tmp_path / "run", list[Path]()
    arguments = command("FedAvg", folder, *SHORT)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(FileStore, "write", spoil_at_once(paths))
        with pytest.raises(SystemExit) as stop:
            main(arguments)
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fedamm: error: the client's stored state is damaged, its checksum differs (")
    assert any(f"({path})" in line for path in paths)
    # the checkpoints of this run cannot be gone on from but for the first, when nobody had kept anything
    main(arguments)
    assert "is skipped" in capsys.readouterr().err
    assert_same_end(folder, short_run)
