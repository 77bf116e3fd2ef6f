"""A run that is killed at any instant, or whose checkpoints are damaged, ends in the bits of one that was not."""

import builtins
import functools
import hashlib
import io
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.tensorflow_stub.io.gfile import GFile

from fedamm_pl.cli.main import main
from fedamm_pl.federation.checkpoint import load_checkpoint, saved_rounds

ROOT = Path(__file__).parent.parent.parent
PROGRAM = [sys.executable, str(ROOT / "orchestrate.py")]
# what may differ between two runs of the same rounds
CLOCK_AND_HISTORY = {"seconds_per_round", "client_seconds_per_round", "command", "resumes"}
DEADLINE = 120  # seconds after which a child that should have come somewhere counts as hanging

# children are forked from a process that has done the imports, which take seconds
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        *(
            "fedamm_pl.cli.main",
            "torch.utils.tensorboard",
            "pytest",
            "docstring_parser",
            "fsspec.implementations.local",
        ),
        *("torch._decomp.decompositions_for_jvp", "tensorboard.backend.event_processing.event_accumulator"),
    ]
)


def fork(arguments: list[str], log: Path, prepare: Callable[[], None] | None = None) -> BaseProcess:
    """Start the program in a process of its own, after ``prepare`` there; ``<log>.out`` and ``.err`` take its output."""
    process = FORKS.Process(target=_program, args=(arguments, log, prepare), daemon=True)
    process.start()
    return process


def _program(arguments: list[str], log: Path, prepare: Callable[[], None] | None) -> None:
    for number, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(log.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if prepare:
        prepare()
    sys.argv = ["orchestrate.py", *arguments]
    main()


def ended(process: BaseProcess, deadline: float = DEADLINE) -> int:
    """Wait for the end of a process; return its exit status, that of a signal negative."""
    process.join(deadline)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError("the process hangs")
    return process.exitcode


def wait_for(what: Callable[[], Any]) -> Any:
    """Poll until there is something, and return it."""
    end = time.monotonic() + DEADLINE
    while not (found := what()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.002)
    return found


def checkpoints(folder: Path) -> list[int]:
    """Return the rounds of which there is a checkpoint."""
    return sorted(saved_rounds(folder / "checkpoints"))


def unfinished(folder: Path) -> list[str]:
    """Return the temporary files in a folder."""
    return sorted(path.name for path in folder.rglob("*") if path.name.endswith(".tmp"))


def lines_of_metrics(folder: Path) -> list[list[str]]:
    return [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]


def assert_same_run(folder: Path, expected: Path) -> None:
    """The same metrics byte for byte, the same tensors bit for bit, the same summary, and no temporary files."""
    assert (folder / "metrics.csv").read_bytes() == (expected / "metrics.csv").read_bytes()
    states = [torch.load(run / "final.ckpt", weights_only=True)["state_dict"] for run in (folder, expected)]
    assert states[0].keys() == states[1].keys()
    assert not [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]
    summaries = [json.loads((run / "summary.json").read_text()) for run in (folder, expected)]
    contents = [
        {name: part for name, part in content.items() if name not in CLOCK_AND_HISTORY} for content in summaries
    ]
    assert contents[0] == contents[1]
    assert checkpoints(folder)[-3:] == checkpoints(expected)[-3:]
    assert unfinished(folder) == []


def assert_each_round_is_logged_once(folder: Path) -> None:
    """TensorBoard shows the values of metrics.csv, each evaluated round once, and each round's clients once."""
    log = EventAccumulator(str(folder))
    log.Reload()
    names, *table = lines_of_metrics(folder)
    column = names.index("test/acc")
    logged = [(event.step, event.value) for event in log.Scalars("test/acc")]
    assert [step for step, _ in logged] == [int(row[0]) for row in table]
    assert [value for _, value in logged] == pytest.approx([float(row[column]) for row in table], rel=1e-6)
    assert [event.step for event in log.Scalars("client/loss")] == list(range(1, int(table[-1][0]) + 1))


def wait_for_another_second(folder: Path) -> None:
    """TensorBoard orders its files by the second in their names; a start of the real program takes several."""
    starts = [int(path.name.split(".")[3]) for path in folder.glob("events.out.tfevents.*")]
    wait_for(lambda: time.time() >= max(starts, default=0) + 1)


# The real program, killed at random


@pytest.fixture(scope="module")
def long_run(command: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path, float]:
    """The options of a run of a few seconds, its folder when it was not interrupted, and the seconds that it took."""
    options = ["--federation.num_rounds", "30", "--federation.eval_interval", "2"]
    folder = tmp_path_factory.mktemp("long") / "run"
    start = time.monotonic()
    main(command("FedAMM", folder, *options))
    return options, folder, time.monotonic() - start


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again_ends_as_the_uninterrupted(
    kills: int, long_run: Any, command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, expected, seconds = long_run
    instants, folder = random.Random(0), tmp_path / "run"
    arguments = [*PROGRAM, *command("FedAMM", folder, *options)]
    table, progress = [f"{'kill':>4} {'seconds':>8} {'checkpoint':>10} {'metrics':>8}  temporary files"], []
    for kill in range(1, kills + 1):
        begun = (folder / "config.yaml").stat().st_mtime_ns if kill > 1 else 0
        with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
            if kill == 1:
                wait_for(lambda: checkpoints(folder))
            else:  # it has taken up the newest checkpoint and begins
                wait_for(lambda begun=begun: (folder / "config.yaml").stat().st_mtime_ns > begun)
            # so that the run is likely to last until the last kill, and each stretch may end anywhere
            left = seconds * (1 - progress[-1] / 30) if progress else seconds
            delay = instants.uniform(0, 2 * left / (kills - kill + 2))
            time.sleep(delay)
            child.kill()
            _, errors = child.communicate(timeout=DEADLINE)
        assert child.returncode == -signal.SIGKILL, f"it ended before the kill: {errors}"
        assert "Traceback" not in errors
        progress.append(checkpoints(folder)[-1])
        temporary = ", ".join(unfinished(folder)) or "-"
        table.append(f"{kill:4} {delay:8.3f} {progress[-1]:10} {lines_of_metrics(folder)[-1][0]:>8}  {temporary}")
    last = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=DEADLINE)
    with capsys.disabled() if kills > 2 else nullcontext():
        print("", *table, sep="\n")
    assert last.returncode == 0, last.stderr
    assert f"continuing after round {progress[-1]}\n" in last.stdout
    assert progress == sorted(progress)
    assert_same_run(folder, expected)
    assert_each_round_is_logged_once(folder)


# Killed at a chosen moment of the writing


def watch(at: Callable[[str], None], patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """Have ``at`` called with "<moment> <file> <count>" at each moment at which the program changes the disk.

    The moments: half (of the bytes are written), fsync (before a file or folder is flushed), replace and replaced (before
    and after a file gets its name), unlink and unlinked.
    """
    counts: Counter[str] = Counter()
    plain_open, path_open, replace, unlink, fsync = open, Path.open, Path.replace, Path.unlink, os.fsync
    move, write_event = shutil.move, GFile.write

    def moment(what: str, path: Path) -> None:
        name = "events" if path.name.startswith("events") else path.name
        counts[what + name] += 1
        at(f"{what} {name} {counts[what + name]}")

    class HalfWritten(io.FileIO):
        def write(self, content: Any) -> int:
            written = super().write(content[: len(content) // 2])
            moment("half", Path(os.readlink(f"/proc/self/fd/{self.fileno()}")))
            return written + super().write(content[len(content) // 2 :])

    def watched_open(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        return HalfWritten(path, mode) if mode in ("wb", "ab") else path_open(path, mode, *args, **options)

    def watched_plain_open(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        """Rows are appended to a file that is open already."""
        return HalfWritten(file, mode) if mode == "ab" else plain_open(file, mode, *args, **options)

    def watched_fsync(file: int) -> None:
        moment("fsync", Path(os.readlink(f"/proc/self/fd/{file}")))
        fsync(file)

    def watched_replace(path: Path, target: Path) -> Path:
        moment("replace", path)
        target = replace(path, target)
        moment("replaced", path)
        return target

    def watched_unlink(path: Path, missing_ok: bool = False) -> None:
        moment("unlink", path)
        unlink(path, missing_ok)
        moment("unlinked", path)

    def watched_move(source: str, target: str) -> str:
        path = Path(move(source, target))
        path.write_bytes(path.read_bytes())  # from another disk it is copied, bit by bit
        return str(path)

    def watched_write_event(file: GFile, content: bytes) -> None:
        write_event(file, content[: len(content) // 2])
        moment("half", Path(os.fsdecode(file.filename)))
        write_event(file, content[len(content) // 2 :])

    for owner, name, watched in (
        (os, "fsync", watched_fsync),
        (builtins, "open", watched_plain_open),
        (Path, "open", watched_open),
        (Path, "replace", watched_replace),
        (Path, "unlink", watched_unlink),
        (shutil, "move", watched_move),
        (GFile, "write", watched_write_event),
    ):
        patch(owner, name, watched)


def kill_at(chosen: str) -> None:
    """Have this process killed at a moment."""

    def at(moment: str) -> None:
        if moment == chosen:
            os.kill(os.getpid(), signal.SIGKILL)

    watch(at)


def list_moments(path: Path) -> None:
    """Write all moments to a file."""

    def at(moment: str) -> None:
        with open(path, "a") as file:
            file.write(f"{moment}\n")

    watch(at)


@pytest.fixture(scope="module")
def short_options() -> list[str]:
    """Three rounds, each of one client and each evaluated."""
    return ["--federation.num_rounds", "3", "--federation.eval_interval", "1", "--federation.client_fraction", "0.25"]


@pytest.fixture(scope="module")
def short_run(command: Any, short_options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("short") / "run"
    main(command("FedAMM", folder, *short_options))
    return folder


@pytest.fixture
def killed_at(
    command: Any, short_options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], tuple[Path, str]]:
    """A function: kill the short run at a moment, check that it leaves whole files, continue it; folder and its log."""

    def killed_at(moment: str) -> tuple[Path, str]:
        folder, arguments = tmp_path / "run", command("FedAMM", tmp_path / "run", *short_options)
        assert ended(fork(arguments, tmp_path / "killed", functools.partial(kill_at, moment))) == -signal.SIGKILL
        assert (tmp_path / "killed.err").read_text() == ""
        for round_num in checkpoints(folder):
            assert load_checkpoint(folder / f"checkpoints/round_{round_num:06d}.ckpt").state.round_num == round_num
        for name in ("config.yaml", "summary.json", "final.ckpt"):  # whole or not there
            assert not (folder / name).exists() or (folder / name).stat().st_size > 100
        wait_for_another_second(folder)
        capsys.readouterr()
        main(arguments)
        return folder, capsys.readouterr().err

    return killed_at


MOMENTS = [
    "half events 5",  # a torn record
    "half .round_000000.ckpt.tmp 1",
    "half .round_000002.ckpt.tmp 1",
    "half metrics.csv 1",  # a torn row
    "replace .round_000001.ckpt.tmp 1",  # metrics.csv has the row, there is no checkpoint
    "replaced .round_000002.ckpt.tmp 1",  # before the folder is flushed
    "half .final.ckpt.tmp 1",
    "half .summary.json.tmp 1",
]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_is_killed_while_it_writes_ends_as_the_uninterrupted(
    moment: str, killed_at: Any, short_run: Path
) -> None:
    folder, log = killed_at(moment)
    what, file, _ = moment.split()
    if file.startswith(".round") and what != "replaced":
        (line,) = (line for line in log.splitlines() if file in line)
        assert "is skipped" in line
    else:
        assert log == ""
    assert_same_run(folder, short_run)
    assert_each_round_is_logged_once(folder)


@pytest.mark.slow
def test_a_run_that_is_killed_at_each_moment_of_its_writing_ends_as_the_uninterrupted(
    killed_at: Any, command: Any, short_options: list[str], short_run: Path, tmp_path: Path
) -> None:
    arguments = command("FedAMM", tmp_path / "run", *short_options)
    assert ended(fork(arguments, tmp_path / "log", functools.partial(list_moments, tmp_path / "moments"))) == 0
    moments = (tmp_path / "moments").read_text().splitlines()
    assert set(MOMENTS) <= set(moments)
    failed = {}
    for moment in moments:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        try:
            folder, _ = killed_at(moment)
            assert_same_run(folder, short_run)
            assert_each_round_is_logged_once(folder)
        except AssertionError as error:
            failed[moment] = str(error)
    assert not failed, f"{len(failed)} of {len(moments)}"


# Damaged checkpoints


def empty(path: Path) -> None:
    path.write_bytes(b"")


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 16
    path.write_bytes(content)


def flag_a_tensor_as_a_folder(path: Path) -> None:
    """One bit in the table of the archive, which no checksum covers: torch then returns memory that nobody has written."""
    content = bytearray(path.read_bytes())
    content[content.rindex(b"archive/data/0") - 8] ^= 16
    path.write_bytes(content)


def garbage(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(path.stat().st_size))


def replace_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_an_archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("state.txt", "round 5")


def replace_by(content: Any, path: Path) -> None:
    """Write something else, with a checksum that is in order."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.write_bytes(buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest())


def replace_by_a_list(path: Path) -> None:
    replace_by([1, 2, 3], path)


def drop_a_field(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    del content["state"]["shared"]
    replace_by(content, path)


DAMAGES = [
    *(empty, truncate, flip_a_bit, flag_a_tensor_as_a_folder, garbage),
    *(replace_by_an_archive, replace_by_a_list, drop_a_field),
]


@pytest.fixture
def finished(fedamm_run: Path, tmp_path: Path) -> Path:
    """A copy of the folder of a finished run of five rounds."""
    shutil.copytree(fedamm_run, tmp_path / "run")
    return tmp_path / "run"


def assert_passed_over(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """One warning, and it names the file."""
    (warning,) = (record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
    assert name in warning
    assert "is skipped" in warning
    assert "\n" not in warning


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_reported_and_passed_over(
    damage: Callable[[Path], None],
    finished: Path,
    fedamm_run: Path,
    command: Any,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(finished / "checkpoints/round_000005.ckpt")
    main(command("FedAMM", finished))
    assert_passed_over("round_000005.ckpt", caplog)
    assert "continuing after round 4\n" in capsys.readouterr().out
    assert_same_run(finished, fedamm_run)


@pytest.mark.parametrize("damage", [replace_by_a_folder, replace_by_an_archive, replace_by_a_list])
def test_a_foreign_file_with_the_name_of_a_later_round_is_passed_over(
    damage: Callable[[Path], None],
    finished: Path,
    fedamm_run: Path,
    command: Any,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (finished / "checkpoints/round_000005.ckpt").unlink()
    shutil.copy(finished / "checkpoints/round_000004.ckpt", finished / "checkpoints/round_000009.ckpt")
    damage(finished / "checkpoints/round_000009.ckpt")
    main(command("FedAMM", finished))
    assert_passed_over("round_000009.ckpt", caplog)
    assert "continuing after round 4\n" in capsys.readouterr().out
    assert (finished / "metrics.csv").read_bytes() == (fedamm_run / "metrics.csv").read_bytes()
    assert checkpoints(finished)[-2:] == [5, 9]


def test_a_checkpoint_under_the_name_of_a_later_round_is_passed_over(
    finished: Path, command: Any, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(finished / "checkpoints/round_000003.ckpt", finished / "checkpoints/round_000009.ckpt")
    main(command("FedAMM", finished))
    assert_passed_over("round_000009.ckpt", caplog)
    assert "continuing after round 5\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["round_000002 (copy).ckpt", "round_000009.backup.ckpt", "round_x.ckpt", "round_.ckpt"]
)
def test_copies_of_checkpoints_under_names_of_your_own_are_left_alone(
    name: str, finished: Path, command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    newest, copy = finished / "checkpoints/round_000005.ckpt", finished / "checkpoints" / name
    shutil.copy(newest, copy)
    main(command("FedAMM", finished, "--federation.num_rounds", "7"))
    assert "continuing after round 5\n" in capsys.readouterr().out
    assert copy.read_bytes()
    assert [round_num for round_num in (5, 6, 7) if round_num not in checkpoints(finished)] == []


def test_two_damaged_checkpoints_are_passed_over(
    finished: Path, fedamm_run: Path, command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for round_num, damage in ((5, garbage), (4, truncate)):
        damage(finished / f"checkpoints/round_{round_num:06d}.ckpt")
    main(command("FedAMM", finished))
    assert "continuing after round 3\n" in capsys.readouterr().out
    assert_same_run(finished, fedamm_run)


@pytest.mark.parametrize("damage", [empty, garbage, replace_by_a_folder])
def test_damaged_checkpoints_alone_are_refused_in_one_line(
    damage: Callable[[Path], None], finished: Path, command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = sorted((finished / "checkpoints").iterdir())
    for path in paths:
        damage(path)
    metrics = (finished / "metrics.csv").read_bytes()
    with pytest.raises(SystemExit) as stop:
        main(command("FedAMM", finished))
    printed = capsys.readouterr()
    assert (stop.value.code, printed.out) == (2, "")
    (line,) = printed.err.splitlines()
    assert line.startswith("fedamm: error: ")
    assert "--output.dir" in line
    assert f"{finished / 'checkpoints'}" in line
    assert f"{len(paths)} damaged" in line
    assert (finished / "metrics.csv").read_bytes() == metrics


def positions(size: int, number: int) -> Iterator[int]:
    """Draw them: a third at the beginning of a file, a third at its end, where an archive has its table, the rest anywhere."""
    draws = random.Random(1)
    for low, high in ((0, 3000), (size - 3000, size), (0, size)):
        for _ in range(number // 3):
            yield draws.randrange(low, high)


@pytest.mark.parametrize("number", [150, pytest.param(6000, marks=pytest.mark.slow)])
def test_a_flipped_bit_is_recognised(number: int, fedamm_run: Path, tmp_path: Path) -> None:
    content, path = (
        bytearray((fedamm_run / "checkpoints/round_000005.ckpt").read_bytes()),
        tmp_path / "round_000005.ckpt",
    )
    for position in positions(len(content), number):
        bit = 1 << position % 8
        content[position] ^= bit
        path.write_bytes(content)
        content[position] ^= bit
        with pytest.raises(
            ValueError, match=r"round_000005\.ckpt to be an intact checkpoint of a run, got a damaged file"
        ):
            load_checkpoint(path)
    path.write_bytes(content)
    assert load_checkpoint(path).state.round_num == 5


@pytest.mark.parametrize("number", [50, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_file_that_was_cut_anywhere_is_recognised(number: int, fedamm_run: Path, tmp_path: Path) -> None:
    content, path = (fedamm_run / "checkpoints/round_000005.ckpt").read_bytes(), tmp_path / "round_000005.ckpt"
    for size in (len(content) - 1, len(content) - 32, *positions(len(content), number)):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"got a damaged file"):
            load_checkpoint(path)
