"""Files with code inside are refused by name, and nothing of the code runs."""

import hashlib
import os
import pickle
import pickletools
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from fedamm_pl import FedAMM
from fedamm_pl.cli.main import main
from fedamm_pl.data import load_images
from fedamm_pl.federation.checkpoint import load_checkpoint


class Bomb:
    """Makes a folder when it is unpickled.

    Args:
        path: The folder.
        by_shell: Whether by a command.
    """

    def __init__(self, path: Path, by_shell: bool = False) -> None:
        self.path = path
        self.by_shell = by_shell

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (os.system, (f"mkdir {self.path}",)) if self.by_shell else (os.mkdir, (str(self.path),))


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """The folder that exists if code was executed."""
    return tmp_path / "executed"


@pytest.mark.parametrize("by_shell", [False, True])
def test_the_bomb_works(by_shell: bool, trace: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(trace, by_shell)))
    assert trace.exists()


# Checkpoints


def bare_pickle(path: Path, content: Any) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))  # torch's


def legacy_format(path: Path, content: Any) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def archive_format(path: Path, content: Any) -> None:
    torch.save(content, path)


def exchanged_pickle(path: Path, content: Any) -> None:
    """The archive of a sound checkpoint whose pickle was exchanged, checksums in order."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (name for name in parts if name.endswith("data.pkl"))
    parts[name] = pickle.dumps(content, protocol=2)
    with zipfile.ZipFile(path, "w") as archive:
        for part, data in parts.items():
            archive.writestr(part, data)


def compiled_program(path: Path, content: Any) -> None:
    """A TorchScript archive, which torch.load would hand to another loader."""
    archive_format(path, content)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{path.stem}/constants.pkl", pickle.dumps(content, protocol=2))


FORMATS = [bare_pickle, legacy_format, archive_format, exchanged_pickle, compiled_program]


TORCHSCRIPT = "ignore:.*looks like a TorchScript archive"  # torch says so before it refuses the file


def seal(path: Path) -> None:
    """Put the checksum of a run's checkpoint in order: it guards against damage, not against malice."""
    content = path.read_bytes()
    path.write_bytes(content + hashlib.sha256(content).digest())


def hidden(trace: Path) -> dict[str, Any]:
    """Code deep inside what looks like a checkpoint."""
    return {"fingerprint": {}, "environment": {}, "state": {"round_num": 5, "shared": {"a": [Bomb(trace)]}}}


@pytest.mark.filterwarnings(TORCHSCRIPT)
@pytest.mark.parametrize("by_shell", [False, True])
@pytest.mark.parametrize("write", FORMATS)
def test_code_in_a_checkpoint_is_refused(
    write: Callable[[Path, Any], None], by_shell: bool, fedamm_run: Path, trace: Path, tmp_path: Path
) -> None:
    path = tmp_path / "round_000005.ckpt"
    for content in (Bomb(trace, by_shell), hidden(trace)):
        shutil.copy(fedamm_run / "checkpoints/round_000005.ckpt", path)
        write(path, content)
        seal(path)
        with pytest.raises(ValueError, match=r"round_000005\.ckpt to be an intact checkpoint of a run") as refused:
            load_checkpoint(path)
        assert "checksum" not in str(refused.value)
        assert "weights_only" not in str(refused.value)
        assert not trace.exists()


@pytest.mark.filterwarnings(TORCHSCRIPT)
@pytest.mark.parametrize("write", FORMATS)
def test_a_run_passes_code_over(
    write: Callable[[Path, Any], None],
    fedamm_run: Path,
    command: Any,
    trace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(fedamm_run, folder)
    write(folder / "checkpoints/round_000005.ckpt", hidden(trace))
    seal(folder / "checkpoints/round_000005.ckpt")
    main(command("FedAMM", folder))
    printed = capsys.readouterr()
    assert "continuing after round 4\n" in printed.out
    (line,) = printed.err.splitlines()
    assert "round_000005.ckpt" in line
    assert "is skipped" in line
    assert "checksum" not in line
    assert not trace.exists()
    assert (folder / "metrics.csv").read_bytes() == (fedamm_run / "metrics.csv").read_bytes()


@pytest.mark.filterwarnings(TORCHSCRIPT)
@pytest.mark.parametrize("options", [{}, {"weights_only": True}], ids=["default", "weights_only"])
@pytest.mark.parametrize("write", FORMATS)
def test_code_in_final_ckpt_is_refused(
    write: Callable[[Path, Any], None], options: dict[str, Any], fedamm_run: Path, trace: Path, tmp_path: Path
) -> None:
    """As the README loads it."""
    path = tmp_path / "final.ckpt"
    shutil.copy(fedamm_run / "final.ckpt", path)
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"]["info"] = Bomb(trace)
    write(path, content)
    with pytest.raises(ValueError, match=r"final\.ckpt to be a checkpoint of tensors and plain data, got") as refused:
        FedAMM.load_from_checkpoint(path, **options)
    assert len(str(refused.value).splitlines()) == 1
    assert "weights_only" not in str(refused.value)
    assert not trace.exists()


def test_final_ckpt_holds_nothing_but_primitives_and_tensors(fedamm_run: Path) -> None:
    """So that the safe way of loading is the only one that is ever needed."""
    allowed = {("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2")}
    for path in (fedamm_run / "final.ckpt", *fedamm_run.glob("checkpoints/*")):
        found = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        assert found == set(), path
        with zipfile.ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
            program = archive.read(name)
        storages = {("torch", "FloatStorage"), ("torch", "LongStorage")}
        assert globals_of(program) <= allowed | storages, path


def globals_of(program: bytes) -> set[tuple[str, str]]:
    """Return what a pickle of protocol 2 imports."""
    return {tuple(str(arg).split(" ")) for code, arg, _ in pickletools.genops(program) if code.name == "GLOBAL"}  # type: ignore[misc]


# Data


def test_objects_in_an_npz_are_refused(
    command: Any, data_root: Path, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with np.load(data_root / "tiny.npz") as archive:
        arrays: dict[str, Any] = dict(archive)
    arrays["y_test"] = np.array([Bomb(trace)] * len(arrays["y_test"]), dtype=object)
    np.savez(tmp_path / "tiny.npz", **arrays)
    assert refused(command("FedAMM", tmp_path / "run", "--data.root", str(tmp_path)), capsys).startswith(
        f"fedamm: error: Expected {tmp_path / 'tiny.npz'} to be an npz file of plain arrays, got Python objects in y_test"
    )
    assert not trace.exists()


@pytest.mark.parametrize("as_member", [False, True])
def test_a_pickle_for_an_npz_is_refused(
    as_member: bool,
    command: Any,
    data_root: Path,
    trace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "tiny.npz"
    if as_member:
        shutil.copy(data_root / "tiny.npz", path)
        with zipfile.ZipFile(path) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, part in {**parts, "x_test.npy": pickle.dumps(Bomb(trace))}.items():
                archive.writestr(name, part)
    else:
        bare_pickle(path, Bomb(trace))
    line = refused(command("FedAMM", tmp_path / "run", "--data.root", str(tmp_path)), capsys)
    assert str(path) in line
    assert not trace.exists()


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_pickle_for_an_image_is_refused(
    part: str, command: Any, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "images"
    for folder in ("train/a", "train/b", "test/a", "test/b"):
        (root / folder).mkdir(parents=True)
        Image.new("RGB", (12, 12), "red").save(root / folder / "0.png")
    path = root / part / "a/1.png"
    bare_pickle(path, Bomb(trace))
    with pytest.raises(ValueError, match=r"a/1\.png to be a PNG, JPEG, WebP, BMP, GIF or TIFF image, got a file"):
        load_images("image_folder", root)
    line = refused(
        command("FedAMM", tmp_path / "run", "--data.dataset", "image_folder", "--data.root", str(root)), capsys
    )
    assert f"Expected {path} to be a PNG, JPEG, WebP, BMP, GIF or TIFF image, got a file" in line
    assert not trace.exists()


# Configurations

TAGS = [
    "!!python/object/apply:os.system ['mkdir {trace}']",
    "!!python/object/apply:os.mkdir ['{trace}']",
    "!!python/object/new:os.mkdir ['{trace}']",
    "!!python/object/apply:builtins.eval [\"__import__('os').mkdir('{trace}')\"]",
]


@pytest.mark.parametrize("tag", TAGS)
def test_the_tags_work(tag: str, trace: Path) -> None:
    yaml.unsafe_load(tag.format(trace=trace))
    assert trace.exists()


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The program must refuse this in one line, which is returned."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    printed = capsys.readouterr()
    assert (stop.value.code, printed.out) == (2, "")
    (line,) = printed.err.splitlines()
    assert line.startswith("fedamm: error: ")
    return line


@pytest.mark.parametrize("as_one_word", [False, True])
@pytest.mark.parametrize("tag", TAGS)
def test_code_in_a_configuration_is_refused(
    tag: str, as_one_word: bool, fedamm_run: Path, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text((fedamm_run / "config.yaml").read_text() + f"other: {tag.format(trace=trace)}\n")
    words = [f"--config={path}"] if as_one_word else ["--config", str(path)]
    line = refused([*words, "--output.dir", str(tmp_path / "run")], capsys)
    assert str(path) in line
    assert "python/object" in line
    assert not trace.exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["--data.dataset", "--algorithm.lr", "--logger", "--federation", "--algorithm"])
@pytest.mark.parametrize("tag", TAGS)
def test_code_in_an_option_is_text(
    tag: str, option: str, command: Any, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused([*command("FedAMM", tmp_path / "run"), option, tag.format(trace=trace)], capsys)
    assert not trace.exists()


def test_code_in_the_configuration_that_a_run_left_is_not_read(
    fedamm_run: Path, command: Any, trace: Path, tmp_path: Path
) -> None:
    """A continued run writes config.yaml and hparams.yaml; it never reads them."""
    folder = tmp_path / "run"
    shutil.copytree(fedamm_run, folder)
    for name in ("config.yaml", "hparams.yaml"):
        (folder / name).write_text(TAGS[0].format(trace=trace))
    main(command("FedAMM", folder, "--output.figures", "true"))
    assert not trace.exists()
    assert (folder / "config.yaml").read_text() == (fedamm_run / "config.yaml").read_text()
