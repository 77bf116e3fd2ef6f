"""How many cores may be used: affinity masks, control groups of both versions, nested ones, and systems without."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedamm_pl import cores
from fedamm_pl.cores import CHOSEN, busy_cores, crowded, follow_cores, shared_out, too_many, usable_cores

ROOT = Path(__file__).parents[1]
SLOW = "of 16 cores busy, and threads that wait for each other are slow then: OMP_WAIT_POLICY=passive, or "
V2, V1 = "cgroup2 cgroup rw,nsdelegate", "cgroup cgroup rw,cpu,cpuacct"
OTHERS = (
    "24 1 8:1 / / rw - ext4 /dev/root rw\n33 32 0:30 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n"
)


@pytest.fixture(autouse=True)
def not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 16 cores, whose user has chosen no number of threads."""
    for name in (*CHOSEN, "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    allow(monkeypatch, 16)


def allow(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(os, "process_cpu_count", lambda: number, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(number)), raising=False)


def fake_proc(folder: Path, kind: str, path: str, root: str = "/", **limits: str) -> Path:
    """A ``/proc`` whose only group of interest is mounted at ``folder/mount``; limits are by place below it, __ for a slash."""
    mount = folder / "mount"
    for place, content in limits.items():
        group = mount / place.replace("__", "/").replace("top", ".")
        group.mkdir(parents=True, exist_ok=True)
        quota, period = content.split()
        if kind == V2:
            (group / "cpu.max").write_text(content + "\n")
        else:
            (group / "cpu.cfs_quota_us").write_text(quota + "\n")
            (group / "cpu.cfs_period_us").write_text(period + "\n")
    own = folder / "proc" / "self"
    own.mkdir(parents=True)
    own.joinpath("mountinfo").write_text(f"{OTHERS}35 31 0:26 {root} {mount} ro,nosuid shared:4 - {kind}\n")
    own.joinpath("cgroup").write_text(f"3:memory:/elsewhere\n{'0::' if kind == V2 else '4:cpu,cpuacct:'}{path}\n")
    return own.parent


@pytest.mark.parametrize("kind", [V2, V1])
@pytest.mark.parametrize(
    ("quota", "expected"),
    [("200000 100000", 2), ("270000 100000", 2), ("50000 100000", 1), ("3200000 100000", 16), ("25000 10000", 2)],
)
def test_a_quota_limits_the_cores_rounded_down(kind: str, quota: str, expected: int, tmp_path: Path) -> None:
    assert usable_cores(fake_proc(tmp_path, kind, "/", top=quota)) == expected


@pytest.mark.parametrize(("kind", "none"), [(V2, "max 100000"), (V1, "-1 100000"), (V1, "100000 0")])
def test_a_group_without_a_quota_does_not_limit(kind: str, none: str, tmp_path: Path) -> None:
    assert usable_cores(fake_proc(tmp_path, kind, "/", top=none)) == 16


@pytest.mark.parametrize("kind", [V2, V1])
def test_the_least_of_nested_groups_counts(kind: str, tmp_path: Path) -> None:
    none = "max 100000" if kind == V2 else "-1 100000"
    limits = {"a": "300000 100000", "a__b": "800000 100000", "a__b__c": none, "other": "100000 100000"}
    assert usable_cores(fake_proc(tmp_path, kind, "/a/b/c", **limits)) == 3


@pytest.mark.parametrize("kind", [V2, V1])
@pytest.mark.parametrize(
    ("path", "root"),
    [("/docker/1f", "/docker/1f"), ("/docker/1f", "/"), ("/", "/docker/1f"), ("/../../other", "/")],
    ids=["the host's path", "the host's path, another root", "its own path", "outside of what it sees"],
)
def test_a_container_sees_its_group_at_the_place_itself(kind: str, path: str, root: str, tmp_path: Path) -> None:
    assert usable_cores(fake_proc(tmp_path, kind, path, root, top="400000 100000")) == 4


def test_a_group_below_that_of_a_container_counts(tmp_path: Path) -> None:
    limits = {"top": "800000 100000", "sub": "300000 100000"}
    assert usable_cores(fake_proc(tmp_path, V2, "/docker/1f/sub", "/docker/1f", **limits)) == 3


def test_the_affinity_mask_counts_where_it_is_less(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    proc = fake_proc(tmp_path, V2, "/", top="400000 100000")
    for mask, expected in ((3, 3), (8, 4)):
        allow(monkeypatch, mask)
        assert usable_cores(proc) == expected


@pytest.mark.parametrize("count", [5, None])
def test_other_systems_have_their_processors(
    count: int | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    monkeypatch.setattr(os, "process_cpu_count", lambda: count, raising=False)
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores(tmp_path / "no proc") == (count or 1)


@pytest.mark.parametrize("groups", ["", "no colon\n", "0::\n"])
def test_what_cannot_be_read_limits_nothing(groups: str, tmp_path: Path) -> None:
    proc = fake_proc(tmp_path, V2, "/")
    (proc / "self" / "cgroup").write_text(groups)
    assert usable_cores(proc) == 16


def test_threads_are_shared_out_among_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "usable_cores", lambda: 6)
    assert [shared_out(*numbers) for numbers in ((6, 2), (64, 2), (4, 2), (6, 4), (6, 9))] == [3, 3, 2, 1, 1]


def test_more_threads_than_cores_are_said_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "usable_cores", lambda: 2)
    assert too_many(16) == "torch has 16 threads, but may use 2 of 16 cores"
    assert too_many(2, 4) == "torch has 2 threads in each of 4 processes, but may use 2 of 16 cores"
    assert too_many(2) is None
    assert too_many(1, 4) is None  # they wait for nobody


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of threads that torch had: 16 at first."""
    numbers = [16]
    monkeypatch.setattr(torch, "get_num_threads", lambda: numbers[-1])
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    return numbers


def test_torch_follows_the_cores_and_says_so(threads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "usable_cores", lambda: 2)
    said = "torch has 16 threads, but may use 2 of 16 cores: it computes with 2 (OMP_NUM_THREADS sets another number)"
    assert (follow_cores(), follow_cores()) == (said, None)
    assert threads == [16, 2]


def test_torch_gets_no_more_threads_than_it_takes(threads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "usable_cores", lambda: 32)  # it takes one for each two hyperthreads
    assert follow_cores() is None
    assert threads == [16]


@pytest.mark.parametrize("name", CHOSEN)
def test_what_the_user_has_chosen_stays(name: str, threads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "usable_cores", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 99.0, 99.0))
    monkeypatch.setattr(cores, "busy_cores", lambda: 16.0)
    monkeypatch.setenv(name, "16")
    assert follow_cores() is too_many(16) is crowded() is None
    assert threads == [16]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity masks")
def test_a_real_mask_is_seen() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    code += "from fedamm_pl.cores import usable_cores; print(usable_cores())"
    environment = {name: value for name, value in os.environ.items() if name not in CHOSEN}
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert child.stdout == "1\n"


# A busy machine


@pytest.mark.parametrize(
    ("load", "busy", "remedy"),
    [
        ((0.2, 9.0, 9.0), 12.0, None),  # idle for the last minute: nothing is measured
        ((16.0, 9.0, 9.0), 0.1, None),  # a run that has just ended
        ((16.0, 9.0, 9.0), 12.4, f"other programs keep 12.4 {SLOW}OMP_NUM_THREADS=3, helps"),
        ((16.0, 9.0, 9.0), 16.0, f"other programs keep 16.0 {SLOW}OMP_NUM_THREADS=1, helps"),
    ],
)
def test_a_busy_machine_is_noticed(
    load: tuple[float, float, float],
    busy: float,
    remedy: str | None,
    threads: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: load, raising=False)
    monkeypatch.setattr(cores, "busy_cores", lambda: busy)
    assert crowded() == remedy


def test_threads_that_wait_passively_are_left_alone(threads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (16.0, 16.0, 16.0), raising=False)
    monkeypatch.setattr(cores, "busy_cores", lambda: 16.0)
    assert crowded() is not None
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert crowded() is None
    monkeypatch.setattr(cores, "usable_cores", lambda: 2)
    assert follow_cores() is not None


def test_a_busy_machine_is_none_where_cores_are_left(threads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (12.0, 12.0, 12.0), raising=False)
    monkeypatch.setattr(cores, "busy_cores", lambda: 12.0)
    torch.set_num_threads(4)
    assert crowded() is None


def test_busy_cores_are_those_of_the_meantime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tick = 1 / os.sysconf("SC_CLK_TCK")
    stat, clock = tmp_path / "stat", [0.0]
    stat.write_text("cpu  100 10 50 9000 700 1 2 3 0 0\ncpu0 1 1 1 1\n")

    def sleep(
        seconds: float,
    ) -> None:  # 30 + 5 + 10 + 1 + 1 + 3 = 50 ticks of work and steal; idle and waiting count for nothing
        stat.write_text("cpu  130 15 60 9900 800 2 3 6 0 0\ncpu0 1 1 1 1\n")
        clock[0] += seconds

    monkeypatch.setattr(cores.time, "sleep", sleep)
    monkeypatch.setattr(cores.time, "monotonic", lambda: clock[0])
    assert busy_cores(tmp_path, 0.25) == pytest.approx(50 * tick / 0.25)


def test_busy_cores_are_none_where_the_system_does_not_say(tmp_path: Path) -> None:
    assert busy_cores(tmp_path) == 0
