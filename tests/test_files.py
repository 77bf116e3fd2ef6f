"""Files of a run: whole or not at all, never through a link, one run in a folder."""

import errno
import io
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fedamm_pl import files
from fedamm_pl.files import (
    HOLDER,
    LOCK,
    SUBFOLDERS,
    append_whole,
    atomic_file,
    lock_folder,
    of_the_disk,
    refuse_links,
    write_atomically,
)

ROOT = Path(__file__).parents[1]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Whole or not at all


def test_a_file_is_there_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_file(path) as temporary:
        temporary.write_bytes(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["file"]
    write_atomically(path, b"newer")
    assert path.read_bytes() == b"newer"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_is_interrupted_leaves_the_old_file_and_no_other(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_file(path) as temporary:  # noqa: PT012
        temporary.write_bytes(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_what_a_run_that_was_killed_has_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".file.tmp").write_bytes(b"of a run that was killed, and longer")
    write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["file", ".file.tmp"])
def test_a_link_is_replaced_and_not_followed(name: str, tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_bytes(b"precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(target)
    write_atomically(tmp_path / "run/file", b"new")
    assert target.read_bytes() == b"precious"
    assert names(tmp_path / "run") == ["file"]
    assert not (tmp_path / "run/file").is_symlink()


def test_the_contents_and_the_name_are_on_the_disk_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    if not Path("/proc/self/fd").exists():
        pytest.skip("reads /proc")
    monkeypatch.setattr(os, "fsync", noted)
    write_atomically(tmp_path / "file", b"new")
    assert synced == [str(tmp_path / ".file.tmp"), str(tmp_path)]


def test_what_is_appended_is_there_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    append_whole(path, b"one\n")
    append_whole(path, b"two\n")
    assert path.read_bytes() == b"one\ntwo\n"


def test_what_cannot_be_appended_whole_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.FileIO):
        def write(self, content: bytes) -> int:  # type: ignore[override]
            return super().write(content[:2])

    path = tmp_path / "file"
    path.write_bytes(b"one\n")
    monkeypatch.setattr(files, "open", lambda descriptor, mode, buffering: Full(descriptor, mode), raising=False)
    with pytest.raises(OSError, match="No space left") as caught:
        append_whole(path, b"two\n")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"one\n"


@pytest.mark.skipif(not files.NO_FOLLOW, reason="no O_NOFOLLOW here")
def test_nothing_is_appended_through_a_link(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_bytes(b"precious")
    (tmp_path / "file").symlink_to(target)
    with pytest.raises(OSError, match="file") as caught:
        append_whole(tmp_path / "file", b"more")
    assert caught.value.errno == errno.ELOOP
    assert target.read_bytes() == b"precious"


# One run in a folder


def test_a_locked_folder_is_refused_until_it_is_released(tmp_path: Path) -> None:
    folder = tmp_path / "new/run"
    lock = lock_folder(folder)
    who = rf"process {os.getpid()} on {re.escape(socket.gethostname())} has used it since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d; "
    with pytest.raises(
        ValueError, match=rf"a folder that no other run uses, got {folder}: {who}wait for the other run"
    ):
        lock_folder(folder)
    lock.release()
    lock_folder(folder).release()
    assert set(names(folder)) <= {".lock"}


def test_the_end_of_a_process_releases_its_folder(tmp_path: Path) -> None:
    code = f"from pathlib import Path; from fedamm_pl.files import lock_folder; lock_folder(Path({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", f"{code}; import os; os._exit(1)"], cwd=ROOT, check=False)
    lock_folder(tmp_path).release()


ANYBODYS = {
    "nothing": None,
    "empty": b"",
    "no JSON": b"\xff\x00{",
    "a list": b"[1, 2]",
    "too long": b" " * 2000 + b'{"pid": 1}',
    "nested": b"[" * 900,
}


@pytest.mark.parametrize("content", [*ANYBODYS, "a pipe", "a folder"])
def test_who_holds_a_lock_is_not_said_if_the_file_does_not_say_it(content: str, tmp_path: Path) -> None:
    lock = lock_folder(tmp_path)
    holder = tmp_path / HOLDER
    holder.unlink()
    if content == "a pipe":
        os.mkfifo(holder)
    elif content == "a folder":
        holder.mkdir()
    elif ANYBODYS[content] is not None:
        holder.write_bytes(ANYBODYS[content])
    with pytest.raises(ValueError, match=f"no other run uses, got {tmp_path}: wait for the other run"):
        lock_folder(tmp_path)
    lock.release()


def test_who_holds_a_lock_is_said_in_characters_that_only_show(tmp_path: Path) -> None:
    lock = lock_folder(tmp_path)
    (tmp_path / HOLDER).write_text(json.dumps({"pid": [1], "host": "\x1b[2J\nfedamm: all is well" + "x" * 500}))
    with pytest.raises(
        ValueError, match=r"process \[1\] on \\x1b\[2J\\nfedamm: all is wellx+ has used it since \?;"
    ) as refused:
        lock_folder(tmp_path)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 500 + len(str(tmp_path))
    lock.release()


def test_a_full_disk_does_not_keep_from_locking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / HOLDER).write_text('{"pid": 4711, "host": "elsewhere"}')  # of a run that was killed
    monkeypatch.setattr(files, "write_atomically", full)
    with lock_folder(tmp_path), pytest.raises(ValueError, match=f"got {tmp_path}: wait for the other run"):
        lock_folder(tmp_path)
    lock_folder(tmp_path).release()


# A file system without flock


@pytest.fixture
def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("without_flock")
@pytest.mark.parametrize(
    ("lock", "holder", "who"),
    [
        (b"4711\nother-node\n1\n", None, r"process 4711 on other-node has used it since 20\d\d-\S+ \S+; "),
        (b"4711\nother-node\n", None, r"process 4711 on other-node has used it since 20\d\d-\S+ \S+; "),
        (b"", b'{"pid": 4711, "host": "n", "since": "2026-01-01"}', "process 4711 on n has used it since 2026-01-01; "),
        (b"", None, ""),
    ],
)
def test_the_lock_of_a_run_that_was_killed_elsewhere_is_said_with_the_way_out(
    lock: bytes, holder: bytes | None, who: str, tmp_path: Path
) -> None:
    (tmp_path / LOCK).write_bytes(lock)
    if holder:
        (tmp_path / HOLDER).write_bytes(holder)
    way_out = rf"if that run is over \(this file system has no flock, .*\), delete {tmp_path / LOCK} and start again; else wait"
    with pytest.raises(ValueError, match=rf"no other run uses, got {tmp_path}: {who}{way_out}"):
        lock_folder(tmp_path)
    (tmp_path / LOCK).unlink()
    lock_folder(tmp_path).release()
    assert names(tmp_path) == []


@pytest.mark.usefixtures("without_flock")
def test_without_flock_one_run_in_a_folder_holds_too(tmp_path: Path) -> None:
    with lock_folder(tmp_path), pytest.raises(ValueError, match=rf"got {tmp_path}: process {os.getpid()} on "):
        lock_folder(tmp_path)
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file/run"):
        with pytest.raises(ValueError, match=f"`output_dir` to be a folder that can be written, got {folder} "):
            lock_folder(folder)


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(dir: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    with pytest.raises(ValueError, match=rf"a folder that can be written, got {tmp_path} \(Permission denied\)"):
        lock_folder(tmp_path)


@pytest.mark.parametrize("place", ["", *SUBFOLDERS])
@pytest.mark.parametrize("target", ["precious", "missing"])
def test_a_folder_that_holds_links_is_refused(place: str, target: str, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    folder = tmp_path / "run" / place
    folder.mkdir(parents=True)
    link = folder / "metrics.csv"
    link.symlink_to(tmp_path / target)
    message = f"`output_dir` to hold no links, got {link}, which points to {tmp_path / target}"
    with pytest.raises(ValueError, match=message):
        refuse_links(tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        lock_folder(tmp_path / "run")
    link.unlink()
    lock_folder(tmp_path / "run").release()


def test_a_subfolder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"to hold no links, got .*checkpoints, which points to"):
        lock_folder(tmp_path / "run")


def test_a_folder_that_is_a_link_itself_is_a_choice(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    lock_folder(tmp_path / "run").release()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "full"), True),
        (PermissionError(errno.EACCES, "not yours"), True),
        (FileNotFoundError(errno.ENOENT, "gone"), True),
        (ConnectionResetError(errno.ECONNRESET, "gone"), False),
        (TimeoutError(errno.ETIMEDOUT, "slow"), False),
        (socket.gaierror(socket.EAI_NONAME, "no such host"), False),
        (OSError(errno.ENETUNREACH, "no network"), False),
        (OSError("HTTP 500"), False),
        (ValueError("no file"), False),
    ],
)
def test_errors_of_the_disk_are_told_from_those_of_a_network(error: Exception, expected: bool) -> None:
    assert of_the_disk(error) == expected
