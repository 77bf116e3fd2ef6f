"""Clients on the workers of a Ray cluster: the contract, and what becomes of workers and machines that die, hang, or never start."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from fedamm_pl import FedAvg, cores
from fedamm_pl.algorithms import Scaffold
from fedamm_pl.federation.executors import Executor, Ray, Runner, RunSpec, Sequential
from fedamm_pl.federation.executors import cluster as clusters
from fedamm_pl.federation.executors import ray as module
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.protocol.messages import ClientFailure
from tests.federation.executors import methods
from tests.federation.executors.contract import ExecutorContract, at_first, broadcast, tasks
from tests.federation.executors.methods import STRUCK, AbsentElsewhere, OtherElsewhere
from tests.federation.executors.test_processes import check_sound_but
from tests.federation.small import Recorder, assert_equal, federation, make, spec
from tests.tiny import tiny_data, tiny_resnet

os.environ.update(clusters.LOOPBACK)  # before the first import: no port of these clusters is open to the network
ray = pytest.importorskip("ray", reason="Ray is not installed; there may be no wheel for this Python")

ROOT = Path(__file__).parents[3]
linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A home of their own: Ray writes a token into it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def cluster(home: None) -> Iterator[None]:
    """A Ray that runs while the tests of this file do: to start one takes seconds."""
    with clusters.connected(None, 8, {"CPU": 1, "GPU": 0}):
        yield


def executor(**options: Any) -> Ray:
    return Ray(**{"num_workers": 2, "threads_per_worker": 1, "client_timeout": 20.0, **options})


def pids(runner: Any) -> list[int]:
    """The processes of a runner's workers."""
    found = []
    for slot in runner._slots:
        assert slot.ready or slot.receive() is None  # one that is started anew
        found.append(ray.get(slot._actor.__ray_call__.remote(lambda worker: os.getpid())))
    return found


@pytest.mark.usefixtures("cluster")
class TestRay(ExecutorContract):
    window = 4
    bits: ClassVar[Any] = [entry for entry in ExecutorContract.bits if entry[0].__name__ not in ("Moon", "CReFF")]
    """Each takes half a minute."""

    def executor(self) -> Executor:
        return executor()

    def test_a_worker_killed_in_mid_fit_is_replaced_and_its_client_trained_again(
        self, runner: Runner, reference: Runner, scripted: RunSpec, caplog: pytest.LogCaptureFixture
    ) -> None:
        clients = [0, STRUCK, 2, 3, 4]
        found = list(runner.run(broadcast(scripted, methods.DIES_ONCE), tasks(methods.DIES_ONCE, clients), at_first))
        assert re.search(
            rf"round {methods.DIES_ONCE}: client 1 is trained again: its worker on [\d.]+ died: ", caplog.text
        )
        check_sound_but(None, found, methods.DIES_ONCE, clients, reference, scripted)  # it dies but once

    def test_a_client_that_kills_its_worker_each_time_is_lost(
        self, runner: Runner, reference: Runner, scripted: RunSpec
    ) -> None:
        clients = [0, STRUCK, 2]
        found = list(runner.run(broadcast(scripted, methods.DIES), tasks(methods.DIES, clients), at_first))
        assert isinstance(found[1], ClientFailure)
        assert (found[1].client_id, found[1].stage) == (STRUCK, "lost")
        assert re.fullmatch(r"its worker on [\d.]+ died: .* \(2 times\)", found[1].reason)
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

    @pytest.mark.parametrize(
        ("round_num", "stage", "reason"),
        [
            (methods.UNSENDABLE, "update", "Expected tensors that can be sent, got .*"),
            (methods.SENDS_AN_ODD_RESULT, "update", "'list' object has no attribute 'items'"),
        ],
    )
    def test_what_is_no_result_costs_one_client(
        self, round_num: int, stage: str, reason: str, runner: Runner, reference: Runner, scripted: RunSpec
    ) -> None:
        clients = [0, STRUCK, 2, 3]
        found = list(runner.run(broadcast(scripted, round_num), tasks(round_num, clients), at_first))
        assert isinstance(found[1], ClientFailure)
        assert (found[1].client_id, found[1].stage) == (STRUCK, stage)
        assert re.fullmatch(reason, found[1].reason), found[1].reason
        check_sound_but(STRUCK, found, round_num, clients, reference, scripted)

    def test_a_worker_that_cannot_read_what_it_was_sent_says_so(
        self, runner: Runner, scripted: RunSpec, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "encode", lambda message: b"junk")
        monkeypatch.setattr(runner.options, "max_retries", 0)  # type: ignore[attr-defined]
        (found,) = runner.run(broadcast(scripted, methods.SOUND), tasks(methods.SOUND, [2]), at_first)
        assert isinstance(found, ClientFailure)
        assert found.reason.startswith("its worker cannot read what it was sent: Expected packed tensors, got bytes")

    def test_a_worker_that_died_idle_is_replaced_in_the_next_round(
        self, runner: Runner, reference: Runner, scripted: RunSpec
    ) -> None:
        list(runner.run(broadcast(scripted, methods.SOUND), tasks(methods.SOUND, [0, 2, 3, 4]), at_first))
        os.kill(pids(runner)[0], signal.SIGKILL)
        clients = [0, 2, 3]
        found = list(runner.run(broadcast(scripted, methods.SOUND), tasks(methods.SOUND, clients), at_first))
        check_sound_but(None, found, methods.SOUND, clients, reference, scripted)

    def test_it_tells_how_many_workers_are_busy(self, runner: Runner, scripted: RunSpec) -> None:
        list(runner.run(broadcast(scripted, methods.SOUND), tasks(methods.SOUND, [0, 2, 3, 4]), at_first))
        assert len(pids(runner)) == 2
        assert runner.busy == (0, 2)
        outcomes = runner.run(broadcast(scripted, methods.SLOW), tasks(methods.SLOW, [0, 2, 3, 4]), at_first)
        next(outcomes)
        assert runner.busy[0] in (0, 1, 2)
        list(outcomes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_workers": 0}, "`num_workers` to be 1 or more, got 0"),
        ({"cpus_per_worker": -1.0}, "`cpus_per_worker` to be a number of 0 or more, got -1.0"),
        ({"gpus_per_worker": float("nan")}, "`gpus_per_worker` to be a number of 0 or more, got nan"),
        ({"gpus_per_worker": 1.5}, "`gpus_per_worker` to be whole where it is above 1, got 1.5"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ray(**options)


def test_gpus_are_refused_where_the_server_has_none() -> None:
    data = tiny_data()
    with pytest.raises(
        ValueError, match=r"Expected `gpus_per_worker` to be 0 where the server .*, got 0\.5: accelerator is cpu"
    ):
        executor(gpus_per_worker=0.5).open(spec(make(FedAvg, data), data))


def test_without_ray_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    data = tiny_data()
    with pytest.raises(ValueError, match=r'Expected Ray to be installed, got: .* Install it by `pip install "ray>='):
        executor().open(spec(make(FedAvg, data), data))


@pytest.mark.parametrize(
    ("options", "threads", "cpus"),
    [
        ({}, 2, 2),
        ({"threads_per_worker": 3}, 3, 3),
        ({"cpus_per_worker": 5.0}, 5, 5.0),
        ({"cpus_per_worker": 0.5}, 1, 0.5),
        ({"address": "auto"}, 1, 1),
        ({"address": "auto", "threads_per_worker": 3, "cpus_per_worker": 1.0}, 3, 1.0),
    ],
)
def test_threads_and_cores_follow_from_each_other(
    options: dict[str, Any], threads: int, cpus: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "usable_cores", lambda: 4)
    data = tiny_data()
    given = dataclasses.replace(spec(make(FedAvg, data), data), threads=4)
    found = Ray(2, **options)
    assert found.for_workers(given).threads == threads
    assert found.resources(given) == {"CPU": cpus, "GPU": 0}
    assert found.workers_here == (0 if "address" in options else 2)


@pytest.mark.usefixtures("cluster")
def test_a_cluster_without_room_is_refused_with_what_there_is() -> None:
    data = tiny_data()
    message = (
        r"Expected a cluster with room for 3 workers of 4000 CPUs, 0 GPUs, got one of 1 machine with \d+ CPUs, 0 GPUs\."
    )
    with pytest.raises(ValueError, match=message):
        executor(num_workers=3, cpus_per_worker=4000.0).open(spec(make(FedAvg, data), data))


@pytest.mark.usefixtures("cluster")
def test_workers_that_wait_for_room_are_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STARTING", 3.0)
    monkeypatch.setattr(clusters, "require_room", lambda *_: None)
    data = tiny_data()
    with pytest.raises(
        ValueError, match=r"worker 0 to start within 3 s, .* waits for 4000 CPUs, 0 GPUs or .*; free .*: \d+ CPUs"
    ):
        executor(cpus_per_worker=4000.0).open(spec(make(FedAvg, data), data))


@pytest.mark.usefixtures("cluster")
def test_data_that_a_worker_cannot_load_are_one_line_that_names_its_machine() -> None:
    data = AbsentElsewhere("tiny", num_clients=4, num_meta_per_class=2, imbalance_factor=0.2)
    with pytest.raises(ValueError, match=r"^Expected worker 0 on [\d.]+ to start, got: Expected data, got none$"):
        executor().open(spec(make(FedAvg, data), data))


@pytest.mark.usefixtures("cluster")
def test_data_that_differ_in_a_worker_are_refused_by_its_machine() -> None:
    data = OtherElsewhere("tiny", num_clients=4, num_meta_per_class=2, imbalance_factor=0.2)
    message = rf"see and use the same, got worker 0 on [\d.]+: content_hash is '\w+' but was '{data.content_hash}'\.$"
    with pytest.raises(ValueError, match=message):
        executor().open(spec(make(FedAvg, data), data))


@pytest.mark.usefixtures("cluster")
def test_it_closes_twice_and_a_network_may_be_a_module() -> None:
    data = tiny_data()
    given = spec(make(FedAvg, data, model=tiny_resnet(4, 1)), data)
    runner = executor(num_workers=1).open(given)
    found = list(runner.run(broadcast(given, 1), tasks(1, [0, 2]), at_first))
    with Sequential().open(given) as plain:
        check_sound_but(None, found, 1, [0, 2], plain, given)
    outcomes = runner.run(broadcast(given, 2), tasks(2, [0, 2]), lambda client: {})
    next(outcomes)
    for _ in range(2):
        runner.close()
    outcomes.close()  # type: ignore[attr-defined]  # a round that is dropped after the end starts nobody
    assert ray.is_initialized()  # what the program had joined before stays


@pytest.mark.usefixtures("cluster")
def test_three_workers_one_of_which_is_killed_give_the_same_bits(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_rounds": 3, "client_fraction": 1.0}
    plain = federation(Scaffold, output_dir=tmp_path / "plain", **options)
    plain.run()

    class Kill(Recorder):
        def on_client_end(self, run: Any, result: Any) -> None:
            if run.state.round_num == 1 and not self.calls.count("killed"):
                assert other._opened is not None
                slots = other._opened[1]._slots  # type: ignore[attr-defined]
                self.calls.append("killed")
                ray.kill(min(slots, key=lambda slot: slot.ready)._actor)  # one that trains, if all have not just ended

    watch = Kill()
    other = federation(
        Scaffold,
        output_dir=tmp_path / "other",
        executor=executor(num_workers=3),
        callbacks=[watch],
        **options,
    )
    other.run()
    assert "killed" in watch.calls
    assert other.state.counts["failed_clients"] == 0
    tables = [(tmp_path / name / "metrics.csv").read_bytes() for name in ("plain", "other")]
    assert tables[0] == tables[1]
    assert_equal(*(torch.load(tmp_path / name / "final.ckpt")["state_dict"] for name in ("plain", "other")))


@pytest.mark.usefixtures("cluster")
def test_the_server_evaluates_while_clients_of_the_next_round_train_elsewhere() -> None:
    class Elsewhere(Ray):
        """As if its workers were on other machines."""

        workers_here = 0  # type: ignore[assignment]

    class Watch(Recorder):
        def __init__(self) -> None:
            super().__init__()
            self.busy: list[tuple[int, int]] = []

        def on_round_end(self, run: Any, record: Any) -> None:
            self.busy.append(run.busy())

    plain, watch = federation(Scaffold, num_rounds=4), Watch()
    plain.run()
    other = federation(Scaffold, num_rounds=4, executor=Elsewhere(2, threads_per_worker=1), callbacks=[watch])
    other.run()
    assert watch.busy == [(0, 2), (2, 2), (2, 2), (2, 2), (0, 2)]  # nothing comes after the last round
    assert other.state.history == plain.state.history
    assert_equal(other.state.shared, plain.state.shared)


@linux
def test_a_machine_that_is_gone_costs_no_client(tmp_path: Path) -> None:
    """Two machines, so to speak; the second is lost while it trains."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(TWO_MACHINES.format(root=str(ROOT))))
    found = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert "on two machines: True" in found.stdout
    assert "same bits: True, failed clients: 0, lost a machine: True" in found.stdout


TWO_MACHINES = """
    import os, sys

    sys.path.insert(0, {root!r})
    import torch
    from fedamm_pl.federation.executors import Ray
    from fedamm_pl.federation.executors.cluster import LOOPBACK

    os.environ.update(LOOPBACK)
    import ray
    from ray.cluster_utils import Cluster
    from fedamm_pl.algorithms import Scaffold
    from fedamm_pl.federation.callbacks import FederationCallback
    from tests.federation.small import federation

    torch.set_num_threads(1)


    class Lose(FederationCallback):
        lost = False

        def on_client_end(self, run, result):
            if run.state.round_num == 1 and not self.lost:
                self.lost = True
                cluster.remove_node(second, allow_graceful=False)


    if __name__ == "__main__":
        options = {{"num_cpus": 2, "include_dashboard": False, "object_store_memory": 80 * 2**20}}
        cluster = Cluster(initialize_head=True, head_node_args=options)
        second = cluster.add_node(**options)
        plain = federation(Scaffold, num_rounds=3)
        plain.run()
        watch = Lose()
        executor = Ray(2, address=cluster.address, threads_per_worker=1, max_retries=2)
        other = federation(Scaffold, num_rounds=3, executor=executor, callbacks=[watch])
        with other.opened():
            places = {{ray.get(slot._actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id()))
                       for slot in other._opened[1]._slots}}
            print("on two machines:", len(places) == 2)
            other.run()
        same = other.state.history == plain.state.history
        same = same and all(torch.equal(other.state.shared[name], value) for name, value in plain.state.shared.items())
        print(f"same bits: {{same}}, failed clients: {{other.state.counts['failed_clients']}}, lost a machine: {{watch.lost}}")
        cluster.shutdown()
"""


def marked(mark: str) -> list[str]:
    """The command lines of the processes that have a mark in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes() and int(folder.name) != os.getpid():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:120])
        except OSError:  # it has just ended, or is not ours
            continue
    return [command for command in found if command]  # those that have ended have none


def shared_memory() -> set[str]:
    """The files in shared memory, but for semaphores, of which Ray has none and other tests some."""
    return {path.name for path in Path("/dev/shm").iterdir() if not path.name.startswith("sem.")}


@linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_ended_leaves_no_process_and_no_memory_and_goes_on(
    number: signal.Signals, command: Any, tmp_path: Path
) -> None:
    before = shared_memory()
    mark = f"FEDAMM_MARK_{os.getpid()}_{number.name}"
    more = ["--executor", "Ray", "--executor.threads_per_worker", "1", "--federation.num_rounds", "100000"]
    words = [sys.executable, str(ROOT / "orchestrate.py"), *command("FedAvg", tmp_path / "run", *more)]
    process = subprocess.Popen(
        words,
        cwd=tmp_path,
        env={**os.environ, mark: "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    while not process.stdout.readline().startswith("round 2/"):
        assert process.poll() is None
    assert marked(mark)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert re.search("continues after the last completed round", errors), errors
    assert "Traceback" not in errors
    limit = time.monotonic() + 30
    while (left := marked(mark)) and time.monotonic() < limit:
        time.sleep(0.2)
    assert left == []
    assert shared_memory() <= before
    saved = max(int(path.stem.removeprefix("round_")) for path in (tmp_path / "run/checkpoints").glob("*.ckpt"))
    assert saved >= 1


def test_workers_train_on_the_gpu_that_ray_gives_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainerConfig, "kind", property(lambda trainer: "cuda"))
    data = tiny_data()
    given = dataclasses.replace(spec(make(FedAvg, data), data), trainer=TrainerConfig("cpu", devices=[2]))
    assert executor().for_workers(given).trainer.devices == 1
    assert executor().resources(given) == {"CPU": 1, "GPU": 1.0}
    assert executor(gpus_per_worker=0.25).resources(given) == {"CPU": 1, "GPU": 0.25}
    assert clusters.environment(2)["env_vars"]["OMP_NUM_THREADS"] == "2"
    assert "CUDA_VISIBLE_DEVICES" not in clusters.environment(2)["env_vars"]
    assert clusters.environment(2, on_gpu=False)["env_vars"]["CUDA_VISIBLE_DEVICES"] == ""
