"""Clients in several processes: the contract, and what becomes of processes that die, hang, or never start."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedamm_pl import FedAvg, cores
from fedamm_pl.federation.executors import Executor, Processes, Runner, RunSpec, Sequential, processes
from fedamm_pl.protocol.messages import ClientFailure
from tests.federation.executors import methods
from tests.federation.executors.contract import ExecutorContract, at_first, broadcast, comparable, tasks
from tests.federation.executors.methods import STRUCK, AbsentElsewhere, OtherElsewhere
from tests.federation.small import assert_equal, federation, make, spec
from tests.tiny import tiny_data, tiny_resnet

ROOT = Path(__file__).parents[3]


def check_sound_but(
    struck: int | None, found: list[Any], round_num: int, clients: list[int], reference: Runner, scripted: RunSpec
) -> None:
    """Check that outcomes are in order and as in one process, but for a client that is lost."""
    assert [outcome.client_id for outcome in found] == clients
    sound = [outcome for outcome in found if outcome.client_id != struck]
    expected = reference.run(
        broadcast(scripted, round_num), tasks(round_num, [one.client_id for one in sound]), at_first
    )
    assert [comparable(outcome) for outcome in sound] == [comparable(outcome) for outcome in expected]


class TestProcesses(ExecutorContract):
    window = 4

    def executor(self) -> Executor:
        return Processes(num_workers=2, threads_per_worker=1, client_timeout=10.0)

    def test_a_worker_killed_in_mid_fit_is_replaced_and_its_client_trained_again(
        self, runner: Runner, reference: Runner, scripted: RunSpec, caplog: pytest.LogCaptureFixture
    ) -> None:
        clients = [0, STRUCK, 2, 3, 4]
        found = list(runner.run(broadcast(scripted, methods.DIES_ONCE), tasks(methods.DIES_ONCE, clients), at_first))
        assert f"round {methods.DIES_ONCE}: client 1 is trained again: its worker died, SIGKILL" in caplog.text
        check_sound_but(None, found, methods.DIES_ONCE, clients, reference, scripted)  # it dies but once

    def test_a_client_that_kills_its_worker_each_time_is_lost(
        self, runner: Runner, reference: Runner, scripted: RunSpec
    ) -> None:
        clients = [0, STRUCK, 2]
        found = list(runner.run(broadcast(scripted, methods.DIES), tasks(methods.DIES, clients), at_first))
        assert found[1] == ClientFailure(STRUCK, "lost", "its worker died, SIGKILL (2 times)")
        check_sound_but(STRUCK, found, methods.DIES, clients, reference, scripted)

    def test_a_client_that_hangs_is_lost_after_its_time(
        self, runner: Runner, reference: Runner, scripted: RunSpec, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(runner.options, "client_timeout", 4.0)  # type: ignore[attr-defined]
        monkeypatch.setattr(runner.options, "max_retries", 0)  # type: ignore[attr-defined]
        clients = [STRUCK, 0, 2, 3]
        found = list(runner.run(broadcast(scripted, methods.HANGS), tasks(methods.HANGS, clients), at_first))
        assert found[0] == ClientFailure(STRUCK, "lost", "nothing came back within 4 s")
        check_sound_but(STRUCK, found, methods.HANGS, clients, reference, scripted)

    def test_what_cannot_be_sent_costs_one_client(self, runner: Runner, reference: Runner, scripted: RunSpec) -> None:
        clients = [0, STRUCK, 2]
        found = list(runner.run(broadcast(scripted, methods.UNSENDABLE), tasks(methods.UNSENDABLE, clients), at_first))
        assert isinstance(found[1], ClientFailure)
        assert found[1].stage == "update"
        assert found[1].reason.startswith("Expected tensors that can be sent, got ")
        check_sound_but(STRUCK, found, methods.UNSENDABLE, clients, reference, scripted)

    @pytest.mark.parametrize(
        ("round_num", "reason"),
        [
            (
                methods.SENDS_JUNK,
                r"its worker sent a message that cannot be read: Expected packed tensors, got bytes .* \(2 times\)",
            ),
            (methods.SENDS_ANOTHER_KIND, r"its worker sent a ClientTask, not a result \(2 times\)"),
        ],
    )
    def test_what_a_worker_sends_that_is_no_result_costs_one_client_and_the_worker(
        self, round_num: int, reason: str, runner: Runner, reference: Runner, scripted: RunSpec
    ) -> None:
        before, clients = set(multiprocessing.active_children()), [0, STRUCK, 2, 3]
        found = list(runner.run(broadcast(scripted, round_num), tasks(round_num, clients), at_first))
        assert isinstance(found[1], ClientFailure)
        assert (found[1].client_id, found[1].stage) == (STRUCK, "lost")
        assert re.fullmatch(reason, found[1].reason), found[1].reason
        assert found[1].reason.isprintable()
        assert set(multiprocessing.active_children()) != before
        check_sound_but(STRUCK, found, round_num, clients, reference, scripted)

    def test_a_result_of_an_odd_kind_costs_one_client_and_no_worker(
        self, runner: Runner, reference: Runner, scripted: RunSpec
    ) -> None:
        before, clients = set(multiprocessing.active_children()), [0, STRUCK, 2]
        round_num = methods.SENDS_AN_ODD_RESULT
        found = list(runner.run(broadcast(scripted, round_num), tasks(round_num, clients), at_first))
        assert found[1] == ClientFailure(STRUCK, "update", "'list' object has no attribute 'items'")
        assert set(multiprocessing.active_children()) == before
        check_sound_but(STRUCK, found, round_num, clients, reference, scripted)

    def test_of_a_message_that_is_too_long_nothing_is_read(
        self, runner: Runner, scripted: RunSpec, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(processes, "MESSAGE_MODELS", 0)
        monkeypatch.setattr(processes, "MESSAGE_ROOM", 1000)
        monkeypatch.setattr(runner.options, "max_retries", 0)  # type: ignore[attr-defined]
        sent = broadcast(scripted, methods.FAILS_IN_TRAINING)  # a failure is short
        found = list(runner.run(sent, tasks(methods.FAILS_IN_TRAINING, [0, STRUCK]), at_first))
        assert found[0] == ClientFailure(0, "lost", "its worker sent more than 1000 bytes")
        assert isinstance(found[1], ClientFailure)
        assert found[1].reason.startswith("RuntimeError: no step")

    def test_a_worker_that_cannot_read_what_it_was_sent_says_so(
        self, runner: Runner, reference: Runner, scripted: RunSpec, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(processes, "encode", lambda message: b"junk")
        monkeypatch.setattr(runner.options, "max_retries", 0)  # type: ignore[attr-defined]
        (found,) = runner.run(broadcast(scripted, methods.SOUND), tasks(methods.SOUND, [2]), at_first)
        assert isinstance(found, ClientFailure)
        assert found.reason.startswith("its worker cannot read what it was sent: Expected packed tensors, got bytes")
        monkeypatch.undo()
        check_sound_but(
            None,
            list(runner.run(broadcast(scripted, methods.SOUND), tasks(methods.SOUND, [2]), at_first)),
            methods.SOUND,
            [2],
            reference,
            scripted,
        )

    def test_a_worker_that_sees_other_data_when_it_is_started_anew_is_not_used(
        self, runner: Runner, scripted: RunSpec
    ) -> None:
        (slot, _) = runner._slots  # type: ignore[attr-defined]
        slot.environment = {**slot.environment, "content_hash": "other"}
        slot.restart()
        with pytest.raises(
            EOFError, match=r"see and use the same, got worker 0: content_hash is '\w+' but was 'other'"
        ):
            slot.receive()
        slot.environment = runner.environment
        slot.restart()
        assert slot.receive() is None
        assert slot.ready

    def test_a_worker_that_died_idle_is_replaced_in_the_next_round(
        self, runner: Runner, reference: Runner, scripted: RunSpec
    ) -> None:
        child = multiprocessing.active_children()[0]
        child.kill()
        child.join()
        clients = [0, 2, 3]
        found = list(runner.run(broadcast(scripted, methods.SOUND), tasks(methods.SOUND, clients), at_first))
        check_sound_but(None, found, methods.SOUND, clients, reference, scripted)


def one_worker(**options: Any) -> Processes:
    return Processes(num_workers=1, threads_per_worker=1, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_workers": 0}, "`num_workers` to be 1 or more, got 0"),
        ({"threads_per_worker": 0}, "`threads_per_worker` to be 1 or more, got 0"),
        ({"max_retries": -1}, "`max_retries` to be 0 or more, got -1"),
        ({"client_timeout": 0.0}, "`client_timeout` to be a number above 0 or null, got 0.0"),
        ({"client_timeout": float("nan")}, "`client_timeout` to be a number above 0 or null, got nan"),
        ({"client_timeout": float("inf")}, "`client_timeout` to be a number above 0 or null, got inf"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Processes(**options)


def test_it_closes_twice_and_a_network_may_be_a_module() -> None:
    data = tiny_data()
    module = make(FedAvg, data, model=tiny_resnet(4, 1))
    asked, sent = tasks(1, [0, 2]), broadcast(spec(module, data), 1)
    with Sequential().open(spec(module, data)) as plain:
        expected = [comparable(outcome) for outcome in plain.run(sent, asked, at_first)]
    runner = one_worker().open(spec(module, data))
    assert [comparable(outcome) for outcome in runner.run(sent, asked, at_first)] == expected
    assert len(multiprocessing.active_children()) == 1
    for _ in range(2):
        runner.close()
        assert multiprocessing.active_children() == []


# At the start


def test_data_that_a_worker_cannot_load_are_one_line_at_the_start() -> None:
    data = AbsentElsewhere("tiny", num_clients=4, num_meta_per_class=2, imbalance_factor=0.2)
    with pytest.raises(ValueError, match=r"^Expected worker 0 to start, got: Expected data, got none$"):
        one_worker().open(spec(make(FedAvg, data), data))
    assert multiprocessing.active_children() == []


def test_data_that_differ_in_a_worker_are_refused() -> None:
    data = OtherElsewhere("tiny", num_clients=4, num_meta_per_class=2, imbalance_factor=0.2)
    message = rf"see and use the same, got worker 0: content_hash is '\w+' but was '{data.content_hash}'\.$"
    with pytest.raises(ValueError, match=message):
        one_worker().open(spec(make(FedAvg, data), data))
    assert multiprocessing.active_children() == []


def test_workers_that_differ_are_refused_by_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []

    class Slot:
        ready = True

        def __init__(self, content: bytes, place: int) -> None:
            self.place, self.name, self.pipe = place, f"worker {place}", open(os.devnull)  # noqa: SIM115

        def started(self) -> dict[str, Any]:
            return {"content_hash": data.content_hash, "threads": 1, "torch": "2.9" if self.place < 2 else "2.8"}

        def end(self, seconds: float) -> None:
            ended.append(self.place)

    monkeypatch.setattr(processes, "ProcessSlot", Slot)
    data = tiny_data()
    with pytest.raises(ValueError, match=r"use the same, got worker 2: torch is '2\.8' but was '2\.9'\."):
        Processes(num_workers=3).open(spec(make(FedAvg, data), data))
    assert ended == [0, 1, 2]


def test_threads_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    monkeypatch.setattr(processes, "ProcessRunner", lambda options, spec: threads.append(spec.threads))
    data = tiny_data()
    described = RunSpec(make(FedAvg, data), data, spec(make(FedAvg, data), data).trainer, seed=0, threads=8)
    monkeypatch.setattr(cores, "usable_cores", lambda: 16)
    for executor in (Processes(3), Processes(9), Processes(3, threads_per_worker=5)):
        executor.open(described)
    monkeypatch.setattr(cores, "usable_cores", lambda: 4)  # more threads than these would wait for each other
    Processes(2).open(described)
    assert threads == [2, 1, 5, 2]


def test_a_module_that_is_not_as_its_options_make_it_is_refused_by_name() -> None:
    data = tiny_data()
    module = make(FedAvg, data)
    module.model.conv1.weight.requires_grad = False
    with pytest.raises(
        ValueError, match=r"FedAvg to be as its options make it, .*, got one that differs in model\.conv1\."
    ):
        one_worker().open(spec(module, data))
    assert multiprocessing.active_children() == []


def test_what_cannot_be_imported_elsewhere_is_refused() -> None:
    class Local(FedAvg):
        pass

    data = tiny_data()
    with pytest.raises(ValueError, match="Expected Local and TinyData to be importable in another process"):
        one_worker().open(spec(make(Local, data), data))


# As a program

SCRIPT = """
    import sys
    from pathlib import Path

    sys.path.insert(0, {root!r})
    from fedamm_pl.algorithms import Scaffold
    from fedamm_pl.federation.callbacks import FederationCallback
    from fedamm_pl.federation.executors import Processes
    from tests.federation.small import federation


    class Watch(FederationCallback):
        def on_client_end(self, run, result):
            if run.state.round_num == 1:
                print("in mid-round", flush=True)


    {guard}
        executor = Processes(2, threads_per_worker=1)
        federation(Scaffold, num_rounds=10_000, output_dir=sys.argv[1], callbacks=[Watch()], executor=executor).run()
"""

Start = Callable[[Path, str], "subprocess.Popen[str]"]


def group(process: "subprocess.Popen[str]") -> list[int]:
    """The processes of a group that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, members = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has just ended
            continue
        if int(members) == process.pid and state not in "ZX":
            found.append(int(stat.parent.name))
    return found


def ends(process: "subprocess.Popen[str]", seconds: float = 30.0) -> bool:
    """Whether all processes of a group end within some seconds."""
    limit = time.monotonic() + seconds
    while group(process) and time.monotonic() < limit:
        time.sleep(0.1)
    return not group(process)


def interrupted(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Press Ctrl-C until a program ends: Python drops one that comes while an object is deleted.

    Returns:
        How often, and what it wrote to standard error.
    """
    for times in (1, 2, 3):
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        try:
            return times, process.communicate(timeout=20)[1]
        except subprocess.TimeoutExpired:
            continue
    raise AssertionError("it goes on")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """A function (folder of the run, the line that guards it) -> the program, leader of its own group."""
    started: list[subprocess.Popen[str]] = []

    def start(folder: Path, guard: str = 'if __name__ == "__main__":') -> "subprocess.Popen[str]":
        script = tmp_path / "script.py"
        script.write_text(textwrap.dedent(SCRIPT.format(root=str(ROOT), guard=guard)))
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, str(script), str(folder)]
        started.append(subprocess.Popen(command, start_new_session=True, cwd=tmp_path, **pipes))
        return started[-1]

    yield start
    for process in started:
        for member in group(process):
            os.kill(member, signal.SIGKILL)
        process.communicate()


posix = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


@posix
def test_ctrl_c_ends_all_processes_and_the_run_goes_on_to_the_same_bits(start: Start, tmp_path: Path) -> None:
    from fedamm_pl.algorithms import Scaffold

    process = start(tmp_path / "run")  # type: ignore[call-arg]
    assert process.stdout is not None
    assert process.stdout.readline() == "in mid-round\n"
    times, errors = interrupted(process)
    assert process.returncode in (-signal.SIGINT, 130)
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert errors.count("\nKeyboardInterrupt") <= times  # none of a worker
    assert ends(process)
    saved = max(int(path.stem.removeprefix("round_")) for path in (tmp_path / "run/checkpoints").glob("*.ckpt"))
    assert saved >= 1
    resumed = federation(Scaffold, num_rounds=saved + 1, output_dir=tmp_path / "run")
    whole = federation(Scaffold, num_rounds=saved + 1)
    assert resumed.run() == whole.run()
    assert resumed.state.counts["resumes"] == 1
    assert_equal(resumed.state.shared, whole.state.shared)


def test_a_round_that_is_dropped_after_the_end_starts_nobody() -> None:
    before = set(multiprocessing.active_children())
    data = tiny_data()
    given = spec(make(FedAvg, data), data)
    with Processes(num_workers=1).open(given) as runner:
        outcomes = runner.run(broadcast(given, 1), tasks(1, [0, 1, 2]), lambda client: {})
        next(outcomes)
    outcomes.close()  # type: ignore[attr-defined]
    assert set(multiprocessing.active_children()) == before


@posix
def test_workers_end_by_themselves_when_the_program_is_killed(start: Start, tmp_path: Path) -> None:
    process = start(tmp_path / "run")  # type: ignore[call-arg]
    assert process.stdout is not None
    assert process.stdout.readline() == "in mid-round\n"
    assert len(group(process)) >= 3
    process.kill()
    process.wait()
    assert ends(process)


@posix
def test_a_script_without_the_guard_is_told_so(start: Start, tmp_path: Path) -> None:
    process = start(tmp_path / "run", "if True:")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.search(r"Expected worker 0 to start, got one that ended \(its worker died, exit status 1\)", errors)
    assert 'below `if __name__ == "__main__":`' in errors
    assert ends(process)
