"""A disk that fails ends the run in one line, damages nothing that was saved, and the run can go on afterwards."""

import csv
import errno
import functools
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
from filelock import FileLock

from fedamm_pl.cli.main import main
from fedamm_pl.federation.checkpoint import load_checkpoint
from tests.faults.test_kills import (
    assert_each_round_is_logged_once,
    assert_same_run,
    checkpoints,
    ended,
    fork,
    unfinished,
    wait_for,
    wait_for_another_second,
    watch,
)

SHORT = ["--federation.num_rounds", "3", "--federation.eval_interval", "1", "--federation.client_fraction", "0.25"]
LONG = ["--federation.num_rounds", "40", "--federation.eval_interval", "7"]
PAGE = 4096
REFUSED = errno.EPERM if os.geteuid() == 0 else errno.EACCES  # how a folder refuses a new file, see :func:`read_only`


@pytest.fixture(scope="module")
def expected(command: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on a disk that works."""
    folder = tmp_path_factory.mktemp("sound") / "run"
    main(command("FedAMM", folder, *SHORT))
    return folder


def assert_readable(folder: Path) -> None:
    """Whatever is there is whole: every checkpoint, and every row of metrics.csv; and no temporary file lies about."""
    for round_num in checkpoints(folder):
        assert load_checkpoint(folder / f"checkpoints/round_{round_num:06d}.ckpt").state.round_num == round_num
    if (folder / "metrics.csv").exists() and (text := (folder / "metrics.csv").read_text().strip()):
        head, *rows = csv.reader(text.splitlines())
        assert head[:2] == ["round", "test/loss"]
        assert [len(row) for row in rows] == [len(head)] * len(rows)
        rounds = [int(row[0]) for row in rows]
        assert rounds == sorted(set(rounds))
    assert unfinished(folder) == []


def assert_one_line(errors: str, number: int, folder: Path) -> None:
    """One line, beside what the rounds had to say, that names the reason and how to go on."""
    (line,) = (line for line in errors.splitlines() if not line.startswith("round "))
    assert line.startswith(f"fedamm: error: {os.strerror(number)} (")
    assert f"--output.dir {folder} continues" in line


def status(arguments: list[str]) -> Any:
    """Run the program in this process and return its exit status."""
    try:
        main(arguments)
    except SystemExit as stop:
        return stop.code
    return 0


def fail_at(chosen: str, number: int, patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """Have the disk fail at a moment, see :func:`watch`, and from then on; for the event file only if that is chosen."""
    failing = False

    def at(moment: str) -> None:
        nonlocal failing
        failing |= moment == chosen
        spared = moment.startswith("unlink") or (" events " in moment and " events " not in chosen)
        if failing and not spared:
            raise OSError(number, os.strerror(number))

    watch(at, patch)


FILES = [".config.yaml.tmp", ".metrics.csv.tmp", ".round_000002.ckpt.tmp", ".final.ckpt.tmp", ".summary.json.tmp"]
OPERATIONS = {"half": errno.ENOSPC, "fsync": errno.EIO, "replace": errno.EROFS}


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("half .config.yaml.tmp 1", errno.ENOSPC),
        ("fsync .metrics.csv.tmp 1", errno.EIO),
        ("half metrics.csv 1", errno.ENOSPC),
        ("half .round_000002.ckpt.tmp 1", errno.ENOSPC),
        ("replace .round_000002.ckpt.tmp 1", errno.EROFS),
        ("half .final.ckpt.tmp 1", errno.ENOSPC),
        ("fsync .summary.json.tmp 1", errno.EIO),
        ("fsync checkpoints 2", errno.EIO),
        *(
            pytest.param(f"{operation} {file} 1", number, marks=pytest.mark.slow)
            for file in FILES
            for operation, number in OPERATIONS.items()
        ),
    ],
)
def test_a_disk_that_fails_ends_the_run_in_one_line(
    moment: str,
    number: int,
    expected: Path,
    command: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        fail_at(moment, number, monkeypatch.setattr)
        assert status(command("FedAMM", folder, *SHORT)) == 1
    assert_one_line(capsys.readouterr().err, number, folder)
    assert_readable(folder)
    wait_for_another_second(folder)
    main(command("FedAMM", folder, *SHORT))
    assert capsys.readouterr().err == ""
    assert_same_run(folder, expected)
    assert_each_round_is_logged_once(folder)


@pytest.mark.parametrize("moment", ["half events 1", "half events 9", "half events 60"])
def test_a_disk_that_is_full_for_the_event_file_ends_the_run_in_one_line(
    moment: str, expected: Path, command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is written by a thread: that neither hangs, nor dies unseen, nor prints a traceback."""
    folder, log = tmp_path / "run", tmp_path / "log"
    process = fork(command("FedAMM", folder, *SHORT), log, functools.partial(fail_at, moment, errno.ENOSPC))
    assert ended(process) == 1
    assert_readable(folder)
    wait_for_another_second(folder)
    main(command("FedAMM", folder, *SHORT))
    assert capsys.readouterr().err == ""
    assert_same_run(folder, expected)
    assert_each_round_is_logged_once(folder)
    assert_one_line(log.with_suffix(".err").read_text(), errno.ENOSPC, folder)


def refuse_folder(*_: Any, **__: Any) -> NoReturn:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.mark.parametrize(
    ("owner", "name"), [(Path, "mkdir"), (tempfile, "TemporaryFile"), (FileLock, "acquire")], ids=str
)
def test_a_folder_that_cannot_be_written_is_refused_at_start(
    owner: Any,
    name: str,
    command: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(owner, name, refuse_folder)
    assert status(command("FedAMM", tmp_path / "run")) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line == (
        f"fedamm: error: Expected --output.dir to be a folder that can be written, got {tmp_path / 'run'} "
        "(Read-only file system)."
    )


# Disks that really fail


def limit_file_size(limit: int) -> None:
    """Have writes beyond this many bytes of a file fail, in this process."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("limit", [500, 4000, 300_000])  # config.yaml; the event file; the first checkpoint
def test_a_file_that_may_not_grow_ends_the_run_in_one_line(
    limit: int, expected: Path, command: Any, tmp_path: Path
) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    arguments = command("FedAMM", folder, *SHORT)
    if limit == 4000:  # no checkpoint comes before the event file has grown
        main(arguments)
        for path in (*folder.glob("checkpoints/*"), folder / "final.ckpt", folder / "summary.json"):
            path.unlink()
        wait_for_another_second(folder)
    process = fork(arguments, log, functools.partial(limit_file_size, limit))
    assert ended(process) == 1
    assert_one_line(log.with_suffix(".err").read_text(), errno.EFBIG, folder)
    assert_readable(folder)
    wait_for_another_second(folder)
    main(arguments)
    assert_same_run(folder, expected)


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[int], None]]:
    """Mount a disk of this many bytes on a folder; yields a function that changes its size."""
    folder.mkdir()

    def mount(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True, check=False)

    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("only root can mount a small disk")
    mounted = mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs")
    if mounted.returncode != 0:
        pytest.skip(f"this machine allows no mount: {mounted.stderr.strip()}")
    try:
        yield lambda size: mount("-o", f"remount,size={size}").check_returncode()
    finally:
        subprocess.run(["umount", str(folder)], check=True)


SOME_SIZES = [12 * PAGE, 230 * PAGE]  # not a checkpoint; two of them
MANY_SIZES = [*range(2 * PAGE, 14 * PAGE, PAGE), *range(96 * PAGE, 500 * PAGE, 9 * PAGE)]


@pytest.mark.parametrize("sizes", [SOME_SIZES, pytest.param(MANY_SIZES, marks=pytest.mark.slow)])
def test_a_disk_that_fills_up_ends_the_run_in_one_line(
    sizes: list[int], expected: Path, command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = {}
    for size in sizes:
        disk = tmp_path / f"{size}"
        folder, log = disk / "run", tmp_path / "log"
        arguments = command("FedAMM", folder, *SHORT)
        with small_disk(disk, size) as resize:
            try:
                status = ended(fork(arguments, log))
                if status == 0:  # it was large enough
                    continue
                assert status in (1, 2)
                errors = log.with_suffix(".err").read_text()
                if status == 1:
                    assert_one_line(errors, errno.ENOSPC, folder)
                else:
                    assert errors.splitlines() == [errors.strip()]
                assert_readable(folder)
                resize(1000 * PAGE)
                wait_for_another_second(folder)
                main(arguments)
                assert_same_run(folder, expected)
                assert_each_round_is_logged_once(folder)
            except AssertionError as error:
                failed[size // PAGE] = str(error)
    assert not failed


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Let no file be made in a folder."""
    if os.geteuid() != 0:
        folder.chmod(0o500)
    elif not shutil.which("chattr") or subprocess.run(["chattr", "+i", str(folder)], check=False).returncode:
        pytest.skip("root may write anywhere, and this file system has no immutable folders")
    try:
        yield
    finally:
        if os.geteuid() != 0:
            folder.chmod(0o700)
        else:
            subprocess.run(["chattr", "-i", str(folder)], check=True)


def test_a_folder_that_becomes_read_only_ends_the_run_in_one_line(command: Any, tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    process = fork(command("FedAMM", folder, *LONG), log)
    wait_for(lambda: len(checkpoints(folder)) > 1)
    with read_only(folder / "checkpoints"):
        assert ended(process) == 1
    assert_one_line(log.with_suffix(".err").read_text(), REFUSED, folder)
    assert_readable(folder)


def put_temporary_files_into(folder: str) -> None:
    tempfile.tempdir = folder


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_folder_that_is_read_only_at_the_end_is_named(
    elsewhere: bool, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where temporary files lie on another disk."""
    folder, log = tmp_path / "run", tmp_path / "log"
    if elsewhere:
        if not os.access("/dev/shm", os.W_OK):
            pytest.skip("this machine has no second disk")
        temporary = "/dev/shm"
    else:
        temporary = str(tmp_path)
    options = [*SHORT, "--federation.num_rounds", "20", "--logger", "false"]
    prepare = functools.partial(put_temporary_files_into, temporary)
    process = fork(command("FedAMM", folder, *options), log, prepare)
    wait_for(lambda: len(checkpoints(folder)) > 2)  # metrics.csv has all columns and is not written anew
    with read_only(folder):
        assert ended(process) == 1
    assert_one_line(log.with_suffix(".err").read_text(), REFUSED, folder)
    assert_readable(folder)


@pytest.mark.parametrize("logger", ["true", "false"])
@pytest.mark.parametrize("removed", ["deleted", "moved"])
def test_a_folder_that_is_removed_ends_the_run_in_one_line(
    removed: str, logger: str, command: Any, tmp_path: Path
) -> None:
    folder, log, moved = tmp_path / "run", tmp_path / "log", tmp_path / "moved"
    process = fork(command("FedAMM", folder, *LONG, "--logger", logger), log)
    wait_for(lambda: len(checkpoints(folder)) > 1)
    folder.rename(moved)
    if removed == "deleted":
        shutil.rmtree(moved)
    assert ended(process) == 1
    assert_one_line(log.with_suffix(".err").read_text(), errno.ENOENT, folder)
    assert not folder.exists() or list(folder.iterdir()) == []
    if removed == "moved":
        assert_readable(moved)
