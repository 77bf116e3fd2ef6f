"""The benchmark beside the peers, without any of them: ours does the bare loop's work, and the tables' arithmetic."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.contenders import bare_loop, environments, with_fedamm
from benchmarks.contenders.comparison import Entry, against_peers, overview
from benchmarks.contenders.environments import REQUIREMENTS, NotInstalledError, python_of
from benchmarks.contenders.given import FOLDER, read_state
from benchmarks.contenders.job import Job
from benchmarks.contenders.material import Material, generated, largest_difference, prepare
from benchmarks.contenders.measure import Contender, FailedError, measure
from benchmarks.contenders.process_tree import memory, processor_seconds, tree

TINY = Job("tiny", "mlp", "fashion_mnist", num_clients=3, client_size=8, batch_size=8, rounds=2, lr=0.1, num_test=20)


@pytest.fixture
def tiny(tmp_path: Path) -> Material:
    """The files of a tiny job, over generated images."""
    return prepare(TINY, tmp_path, None)


@pytest.mark.parametrize("job", [TINY, replace(TINY, network="cnn", local_epochs=2)], ids=["one step", "two"])
def test_ours_ends_in_the_weights_of_the_bare_loop(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(job, tmp_path, None)
    monkeypatch.setenv(FOLDER, str(tmp_path))
    initial, states = read_state(tmp_path / "initial.npz"), []
    for contender in (bare_loop, with_fedamm):
        contender.main()
        states.append(read_state(tmp_path / "final.npz"))
    assert states[0].keys() == states[1].keys() == initial.keys()
    assert largest_difference(states[0], initial) > 1e-3
    assert largest_difference(states[1], states[0]) < 1e-6


def test_generated_images_can_be_told_apart() -> None:
    images = generated(replace(TINY, num_clients=100, num_test=400))
    means = torch.stack([images.train_images[images.train_labels == label].float().mean(0) for label in range(10)])
    distances = torch.cdist(images.test_images.float().flatten(1), means.flatten(1))
    right = (distances.argmin(1) == images.test_labels).float().mean()
    assert 0.5 < right <= 1  # by the nearest mean of a class; chance is 0.1


def test_a_contender_is_measured_in_a_process_of_its_own(tiny: Material) -> None:
    measured = measure(Contender("bare loop", "ours", "bare_loop"), Path(sys.executable), tiny, timeout=300)
    assert len(measured.wall) == TINY.rounds
    assert min(measured.wall) > 0
    assert measured.processor >= 0
    assert measured.peak > 50  # torch alone takes more
    assert measured.versions["torch"] == torch.__version__.partition("+")[0]
    assert 0 <= tiny.accuracy(measured.state) <= 100


def test_a_contender_that_is_not_there_says_so_in_a_line(tiny: Material) -> None:
    with pytest.raises(FailedError, match=r"^failed: .*No module named benchmarks.contenders.with_nobody$"):
        measure(Contender("nobody", "ours", "with_nobody"), Path(sys.executable), tiny, timeout=300)


@pytest.mark.skipif(sys.platform != "linux", reason="counts in /proc")
def test_all_processes_of_a_contender_count() -> None:
    with subprocess.Popen(["sh", "-c", "sleep 30 & wait"], stdout=subprocess.PIPE) as process:
        try:
            while len(found := tree(process.pid)) < 2:
                pass
            assert found[0] == process.pid
            assert memory(process.pid) > 0
            assert processor_seconds(process.pid) < 1
        finally:
            for member in reversed(tree(process.pid)):
                subprocess.run(["kill", str(member)], check=True)


def entry(name: str, wall: list[float], difference: list[float], ours: bool = False) -> Entry:
    contender = Contender(name, "ours", "bare_loop", ours=ours)
    half = [value / 2 for value in wall]
    return Entry(contender, wall, half, [100 * value for value in wall], [50.0] * len(wall), difference)


def test_ratios_are_medians_of_pairs() -> None:
    bare, mine = entry("bare loop", [1.0, 2.0, 4.0], []), entry("mine", [3.0, 4.0, 4.0], [1e-7] * 3, ours=True)
    assert mine.ratio(bare, "wall") == 2  # of 3, 2, 1
    assert mine.milliseconds(TINY, "wall") == pytest.approx(4000 / (3 * 2))
    assert mine.milliseconds(TINY, "processor") == pytest.approx(2000 / (3 * 2))
    assert against_peers([bare, mine]) == [["mine / bare loop", "2.00x", "2.00x", "2.00x"]]
    row = overview(TINY, [bare, mine], bare).splitlines()[-1]
    assert row == "| mine | 667 | 333 | 400 | 2.00x | 2.00x | 2.00x | 50.0 | 1e-07 |  |"


def test_what_failed_or_did_other_work_is_in_the_table() -> None:
    bare, other = entry("bare loop", [1.0], []), entry("other", [1.0], [1e-3])
    failed = Entry(
        Contender("gone", "ours", "gone", notes={"*": "always", "tiny": "here"}), failure="not installed: no"
    )
    lines = overview(TINY, [bare, other, failed], bare).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "NOT THE SAME WORK" in lines[-2]
    assert lines[-1].endswith("| always; here; not installed: no |")
    assert "NOT THE SAME WORK" not in overview(replace(TINY, batch_size=4), [other], bare)


def test_requirements_are_pinned_alike() -> None:
    pins: dict[str, set[str]] = {}
    for path in REQUIREMENTS.glob("*.txt"):
        for line in path.read_text().splitlines():
            if line != "-r ../../../requirements.txt":
                found = re.fullmatch(r"([\w-]+)(\[\w+\])?==([\d.]+)  # \S.*", line)
                assert found, f"{path.name}: {line}"
                pins.setdefault(found[1], set()).add(found[3])
    assert len(pins["torch"]) == len(pins["numpy"]) == 1
    assert {"fluke-fl", "flwr", "pfl"} <= pins.keys()


def test_an_environment_is_used_again_while_its_requirements_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        (tmp_path / "pfl").mkdir(exist_ok=True)
        return subprocess.CompletedProcess(command, status, "", "some\nwords\n")

    monkeypatch.setattr(environments.subprocess, "run", run)
    status = 0
    assert python_of("pfl", tmp_path) == python_of("pfl", tmp_path)
    assert len(commands) == 2
    (tmp_path / "pfl/requirements.txt").write_text("pfl==0.5.0")
    status = 1
    with pytest.raises(NotInstalledError, match=r"^not installed: words$"):
        python_of("pfl", tmp_path)
    assert not (tmp_path / "pfl/requirements.txt").exists()
