"""A run writes into its own folder only: whoever can put links there cannot have other files overwritten."""

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedamm_pl.cli.main import main
from fedamm_pl.files import append_whole, atomic_file, refuse_links, write_atomically

PLACES = [
    *("checkpoints", "clients", "figures", ".lock", "config.yaml", "metrics.csv", ".metrics.csv.tmp", "summary.json"),
    *("final.ckpt", "diagnostics.json", "events.out.tfevents.0.host", "checkpoints/round_000000.ckpt"),
    *("checkpoints/.round_000001.ckpt.tmp", "clients/000000_000001.state", "figures/confusion.pdf", "notes.txt"),
]


def target_of(folder: Path, place: str, kind: str) -> Path:
    """Make something outside of a folder, and a link to it in the folder."""
    target = folder.with_name("target")
    if kind == "folder":
        target.mkdir()
        (target / "precious").write_text("precious")
    elif kind == "file":
        target.write_text("precious")
    link = folder / place
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_dir() and not link.is_symlink():
        shutil.rmtree(link)
    link.unlink(missing_ok=True)
    link.symlink_to(target)
    return target


def content(path: Path) -> Any:
    """What is there: a file's bytes, a folder's files, None."""
    if path.is_dir():
        return {below.name: below.read_bytes() for below in path.iterdir()}
    return path.read_bytes() if path.exists() else None


def listing(folder: Path) -> dict[Path, float]:
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*") if path.name != "checkpoints"}


@pytest.mark.parametrize(
    ("place", "kind"), list(zip(PLACES, itertools.cycle(["file", "folder", "nothing"]), strict=False))
)
def test_a_run_in_a_folder_with_a_link_is_refused_in_one_line(
    place: str, kind: str, command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    target = target_of(folder, place, kind)
    before = content(target), listing(folder)
    with pytest.raises(SystemExit) as stop:
        main(command("FedAMM", folder))
    printed = capsys.readouterr()
    assert (stop.value.code, printed.out) == (2, "")
    (line,) = printed.err.splitlines()
    assert line == (
        f"fedamm: error: Expected --output.dir to hold no links, got {folder / place}, which points to {target}: a run writes "
        "into its own folder only. Remove the link, or choose another folder."
    )
    assert (content(target), listing(folder)) == before


@pytest.mark.parametrize("place", ["metrics.csv", "checkpoints", "checkpoints/round_000005.ckpt", "final.ckpt"])
def test_a_finished_run_with_a_link_is_not_continued(
    place: str, fedamm_run: Path, command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(fedamm_run, folder)
    target = target_of(folder, place, "folder" if place == "checkpoints" else "file")
    before = content(target)
    with pytest.raises(SystemExit) as stop:
        main(command("FedAMM", folder, "--federation.num_rounds", "6"))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"to hold no links, got {folder / place}" in line
    assert content(target) == before


def test_the_folder_itself_may_be_reached_by_a_link(fedamm_run: Path, tmp_path: Path) -> None:
    shutil.copytree(fedamm_run, tmp_path / "disk")
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    refuse_links(tmp_path / "run")


# Links that come while a run writes


def whole(path: Path) -> None:
    write_atomically(path, b"new")


def in_a_block(path: Path) -> None:
    with atomic_file(path) as temporary:
        temporary.write_bytes(b"new")


@pytest.mark.parametrize("write", [whole, in_a_block])
@pytest.mark.parametrize("name", ["file", ".file.tmp"])
@pytest.mark.parametrize("kind", ["file", "folder", "nothing"])
def test_a_link_is_replaced_and_its_target_left(
    kind: str, name: str, write: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    target = target_of(folder, name, kind)
    before = content(target)
    write(folder / "file")
    assert content(target) == before
    assert not (folder / "file").is_symlink()
    assert [path.name for path in folder.iterdir()] == ["file"]
    assert (folder / "file").read_bytes() == b"new"


@pytest.mark.parametrize("kind", ["file", "folder", "nothing"])
def test_nothing_is_appended_through_a_link(kind: str, tmp_path: Path) -> None:
    target = target_of(tmp_path / "run", "metrics.csv", kind)
    before = content(target)
    with pytest.raises(OSError, match=r"metrics\.csv"):
        append_whole(tmp_path / "run/metrics.csv", b"row\n")
    assert content(target) == before


def test_a_temporary_file_that_comes_in_between_is_not_written_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the removal of what lay there and the making of the new one."""
    unlink, target = Path.unlink, tmp_path / "target"
    target.write_text("precious")

    def swapped(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok)
        os.symlink(target, path)

    monkeypatch.setattr(Path, "unlink", swapped)
    with pytest.raises(FileExistsError):
        whole(tmp_path / "file")
    assert target.read_text() == "precious"
