"""A folder belongs to one live run at a time, and to one experiment for good."""

import dataclasses
import functools
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedamm_pl
from fedamm_pl import FedAMM, Orchestrator
from fedamm_pl.cli.main import main
from fedamm_pl.federation import fingerprint, trainer
from fedamm_pl.federation.callbacks import FederationCallback, Progress, RoundRecord, files
from fedamm_pl.federation.checkpoint import FORMAT, OtherVersionError, load_checkpoint
from fedamm_pl.federation.evaluation import Evaluator
from fedamm_pl.federation.executors import worker
from fedamm_pl.federation.run import Run
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.files import lock_folder
from tests.faults.test_kills import assert_same_run, checkpoints, ended, fork, replace_by, wait_for
from tests.tiny import NUM_CLASSES, TinyData, tiny_data, tiny_resnet


def snapshot(folder: Path) -> dict[Path, tuple[bytes | None, int]]:
    """Return every path below a folder with its content and the time of its last change."""
    return {
        path: (path.read_bytes() if path.is_file() else None, path.stat().st_mtime_ns if path.is_file() else 0)
        for path in folder.rglob("*")
    }


def assert_free(folder: Path) -> None:
    lock_folder(folder).release()


class Meanwhile(FederationCallback):
    """Calls a function at the end of round 2."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def on_round_end(self, run: Run, record: RoundRecord) -> None:
        if record.round_num == 2:
            self.function()


def federation(folder: Path, data: TinyData | None = None, num_rounds: int = 4, **options: Any) -> Orchestrator:
    """A small one, in this process."""
    data = data or tiny_data()
    torch.manual_seed(0)
    module = FedAMM(NUM_CLASSES, 1, tiny_resnet(NUM_CLASSES, 1), differentiation="forward", info=data.info)
    cpu = TrainerConfig(accelerator="cpu")
    defaults: dict[str, Any] = {"num_rounds": num_rounds, "local_epochs": 1, "trainer": cpu, "output_dir": folder}
    return Orchestrator(module, data, **{**defaults, **options})


@pytest.fixture
def half(fedamm_run: Path, tmp_path: Path) -> Path:
    """The folder of a run of five rounds of which the last two are missing."""
    folder = tmp_path / "run"
    shutil.copytree(fedamm_run, folder)
    for name in ("checkpoints/round_000004.ckpt", "checkpoints/round_000005.ckpt", "final.ckpt", "summary.json"):
        (folder / name).unlink()
    return folder


# The lock


def test_another_process_is_refused_and_disturbs_nothing(
    fedamm_run: Path, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, log, arguments = tmp_path / "run", tmp_path / "second", command("FedAMM", tmp_path / "run")
    save, statuses = files.save_checkpoint, []

    def meanwhile(path: Path, state: Any, *rest: Any) -> Path:
        if state.round_num == 2:
            before = snapshot(folder)
            statuses.append(ended(fork(arguments, log)))
            assert snapshot(folder) == before
        return save(path, state, *rest)

    monkeypatch.setattr(files, "save_checkpoint", meanwhile)
    main(arguments)
    assert statuses == [2]
    (line,) = log.with_suffix(".err").read_text().splitlines()
    assert line.startswith(
        f"fedamm: error: Expected --output.dir to be a folder that no other run uses, got {folder}: "
    )
    assert log.with_suffix(".out").read_text() == ""
    assert_same_run(folder, fedamm_run)


def test_another_name_of_the_folder_does_not_help(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "run")
    lock = lock_folder(tmp_path / "run")
    with pytest.raises(ValueError, match=r"no other run uses, got \S*/link:"):
        lock_folder(tmp_path / "link")
    lock.release()
    assert_free(tmp_path / "link")


def test_another_orchestrator_in_the_process_is_refused_and_disturbs_nothing(tmp_path: Path) -> None:
    undisturbed = federation(tmp_path / "undisturbed").run()

    def meanwhile() -> None:
        before = snapshot(tmp_path / "run")
        with pytest.raises(ValueError, match=r"Expected `output_dir` to be a folder that no other run uses"):
            federation(tmp_path / "run").run()
        assert snapshot(tmp_path / "run") == before

    assert federation(tmp_path / "run", callbacks=[Meanwhile(meanwhile)]).run() == undisturbed
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")


def test_the_folder_of_a_killed_run_is_free_at_once(
    fedamm_run: Path, command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    process = fork(command("FedAMM", folder), tmp_path / "log")
    wait_for(lambda: len(checkpoints(folder)) > 1)
    process.kill()
    ended(process)
    main(command("FedAMM", folder))
    assert capsys.readouterr().err == ""
    assert_same_run(folder, fedamm_run)


def test_the_folder_of_a_finished_run_is_free(tmp_path: Path) -> None:
    first = federation(tmp_path)
    first.run()
    assert_free(tmp_path)
    assert len(federation(tmp_path, num_rounds=5).run()) > len(first.state.history)


@pytest.mark.parametrize("error", [RuntimeError("injected"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_the_folder_of_a_failed_run_is_free(error: BaseException, tmp_path: Path) -> None:
    def fail() -> None:
        raise error

    failed = federation(tmp_path, callbacks=[Meanwhile(fail)])
    with pytest.raises(type(error)):
        failed.run()
    assert_free(tmp_path)
    assert failed.state.round_num == 1  # it is alive, back at its last whole round, and holds the folder no longer


def test_the_folder_of_a_refused_run_is_free(tmp_path: Path) -> None:
    federation(tmp_path).run()
    with pytest.raises(ValueError, match=r"seed is 1 but was 0") as refused:
        federation(tmp_path, seed=1).run()
    assert_free(tmp_path)
    assert refused.traceback  # what refers to the run is alive


def test_a_run_that_never_began_touches_nothing(tmp_path: Path) -> None:
    never_run = federation(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    federation(tmp_path / "run", num_rounds=0).run()
    assert never_run.state.history == []


def test_an_opened_run_holds_its_folder_until_it_is_closed(tmp_path: Path) -> None:
    """It has taken up what it goes on from; nobody may add to it meanwhile."""
    federation(tmp_path, num_rounds=1).run()
    opened = federation(tmp_path, num_rounds=2)
    with opened.opened() as run:
        assert run.state.round_num == opened.state.round_num == 1
        with pytest.raises(ValueError, match=r"no other run"):
            lock_folder(tmp_path)
        assert opened.run()[-1]["round"] == 2
        with pytest.raises(ValueError, match=r"no other run"):
            lock_folder(tmp_path)
    assert_free(tmp_path)


def test_a_run_may_be_run_again(tmp_path: Path) -> None:
    first = federation(tmp_path)
    history = first.run()
    assert first.run() == history


@pytest.mark.parametrize("place", ["a client", "the evaluation", "a callback"])
def test_an_interrupted_run_may_be_run_again(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a notebook the object is still there after Ctrl-C."""
    undisturbed = federation(tmp_path / "undisturbed", eval_interval=1)
    undisturbed.run()
    owner, name = {
        "a client": (FedAMM, "training_step"),
        "the evaluation": (Evaluator, "measure"),
        "a callback": (Progress, "on_round_end"),
    }[place]
    first = federation(tmp_path / "run", eval_interval=1, callbacks=[Progress()])
    original = getattr(owner, name)

    def interrupted(*args: Any) -> Any:
        if first.state.round_num == 2 or len(first.state.history) == 3:
            monkeypatch.setattr(owner, name, original)
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises((KeyboardInterrupt, SystemExit)):  # Lightning makes the other of the one
        first.run()
    assert first.run() == undisturbed.state.history
    assert all(torch.equal(value, first.state.shared[name]) for name, value in undisturbed.state.shared.items())
    metrics = [(tmp_path / folder / "metrics.csv").read_bytes() for folder in ("run", "undisturbed")]
    assert metrics[0] == metrics[1]


def test_a_run_that_runs_again_is_refused_where_another_has_begun(tmp_path: Path) -> None:
    """It has given its folder up at its end."""
    first = federation(tmp_path, num_rounds=2)
    first.run()
    second = federation(tmp_path, num_rounds=4)
    first.config = dataclasses.replace(first.config, num_rounds=3)
    with second.opened(), pytest.raises(ValueError, match=r"no other run"):
        first.run()
    assert second.run()[-1]["round"] == 4


def test_the_lock_file_that_comes_with_a_copy_does_not_matter(
    half: Path, fedamm_run: Path, command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = lock_folder(half)  # the original is in use
    shutil.copytree(half, tmp_path / "copy")
    (tmp_path / "copy/.lock").write_text(str(os.getpid()))
    main(command("FedAMM", tmp_path / "copy"))
    lock.release()
    assert capsys.readouterr().err == ""
    assert_same_run(tmp_path / "copy", fedamm_run)


# What a resume compares


def relabel(arrays: dict[str, Any]) -> None:
    arrays["y_test"][7] += 1


def darken_a_pixel(arrays: dict[str, Any]) -> None:
    arrays["x_train"][300, 5, 5, 1] ^= 1


def exchange_two_images(arrays: dict[str, Any]) -> None:
    arrays["x_test"][[0, 1]] = arrays["x_test"][[1, 0]]


def copy_of_data(root: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Copy tiny.npz to another folder, changed."""
    with np.load(root / "tiny.npz") as archive:
        arrays = dict(archive)
    change(arrays)
    folder.mkdir()
    np.savez(folder / "tiny.npz", **arrays)
    return folder


@pytest.fixture
def refuse(half: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """A function: the program must refuse a command line in one line, which is returned, and leave the folder as it was."""

    def refuse(arguments: list[str]) -> str:
        before = snapshot(half)
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        printed = capsys.readouterr()
        assert (stop.value.code, printed.out) == (2, "")
        (line,) = printed.err.splitlines()
        assert snapshot(half) == before
        return line

    return refuse


def test_all_differing_options_are_listed(refuse: Any, half: Path, command: Any) -> None:
    options = ("--seed", "1", "--algorithm.lr", "0.1", "--data.partition", "iid", "--federation.local_epochs", "2")
    line = refuse(command("FedAMM", half, *options, "--federation.aggregation", "uniform"))
    assert line == (
        f"fedamm: error: Expected --output.dir {half} to hold a run with the same options, got others: "
        "algorithm.lr is 0.1 but was 0.05; data.partition is 'iid' but was 'by_num_classes'; "
        "data.seed is 1 but was 0; federation.aggregation is 'uniform' but was 'num_examples'; "
        "federation.local_epochs is 2 but was 1; seed is 1 but was 0. Choose another folder, or the old options."
    )


@pytest.mark.parametrize("change", [relabel, darken_a_pixel, exchange_two_images])
def test_other_data_under_the_same_name_are_refused(
    change: Callable[[dict[str, Any]], None], refuse: Any, half: Path, command: Any, data_root: Path, tmp_path: Path
) -> None:
    root = copy_of_data(data_root, tmp_path / "data", change)
    line = refuse(command("FedAMM", half, "--data.root", str(root)))
    assert "data (content) is '" in line
    assert line.count(" but was ") == 1


def test_the_same_data_elsewhere_are_no_difference(
    half: Path, fedamm_run: Path, command: Any, data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = copy_of_data(data_root, tmp_path / "data", lambda arrays: None)
    main(command("FedAMM", half, "--data.root", str(root)))
    assert capsys.readouterr().err == ""
    assert_same_run(half, fedamm_run)


def test_another_version_of_the_package_is_refused(
    refuse: Any, half: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    was = fingerprint.__version__
    monkeypatch.setattr(fingerprint, "__version__", "99.0")
    assert f"fedamm_pl is '99.0' but was '{was}'" in refuse(command("FedAMM", half))


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what a checkpoint holds; its checksum is in order."""
    content = torch.load(path, weights_only=True)
    change(content)
    replace_by(content, path)


def without_a_format(content: dict[str, Any]) -> None:
    """As the first version wrote them."""
    del content["format"]
    content["fingerprint"]["fedamm_pl"] = "0.1.0"


def of_a_later_format(content: dict[str, Any]) -> None:
    content["format"] = 99
    content["fingerprint"]["fedamm_pl"] = "7.0"
    content["state"] = ["of another form"]


@pytest.mark.parametrize(
    ("change", "version", "number"), [(without_a_format, "0.1.0", 1), (of_a_later_format, "7.0", 99)]
)
def test_a_checkpoint_of_another_format_is_refused_by_the_version_that_wrote_it(
    change: Callable[[dict[str, Any]], None], version: str, number: int, half: Path, refuse: Any, command: Any
) -> None:
    """It is not damaged: nobody shall delete it, and none before it is taken in its place."""
    newest = half / "checkpoints/round_000003.ckpt"
    rewrite(newest, change)
    expected = (
        f"Expected {newest} to be of fedamm_pl {fedamm_pl.__version__} (format {FORMAT}), got a checkpoint that version "
        f"{version} wrote (format {number}): continue with that version, or choose another "
    )
    with pytest.raises(OtherVersionError) as other:
        load_checkpoint(newest)
    assert str(other.value) == f"{expected}`output_dir` to start again."
    assert refuse(command("FedAMM", half)) == f"fedamm: error: {expected}--output.dir to start again."


def other_torch(monkeypatch: pytest.MonkeyPatch) -> str:
    versions = worker.versions()
    monkeypatch.setattr(worker, "versions", lambda: {**versions, "torch": "99.0"})
    return f"torch is '99.0' but was '{versions['torch']}'"


def more_threads(monkeypatch: pytest.MonkeyPatch) -> str:
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    return f"threads is {threads + 1} but was {threads}"


@pytest.mark.parametrize("change", [other_torch, more_threads])
def test_other_libraries_and_threads_continue_with_a_note(
    change: Callable[[pytest.MonkeyPatch], str],
    half: Path,
    fedamm_run: Path,
    command: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    note = change(monkeypatch)
    main(command("FedAMM", half))
    (warning,) = (record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
    assert warning == f"{note}; from here on results may differ in their last digits"
    assert (half / "metrics.csv").read_bytes() == (fedamm_run / "metrics.csv").read_bytes()


def test_other_arithmetic_chosen_by_the_hardware_is_refused_and_the_old_one_continues(
    half: Path, fedamm_run: Path, command: Any, refuse: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    was = TrainerConfig("cpu").resolved_precision
    now = {"bf16-mixed": "32-true", "32-true": "bf16-mixed"}[was]
    monkeypatch.setattr(trainer, "computes_in_bfloat16", lambda _: now == "bf16-mixed")
    assert f"trainer.precision is '{now}' but was '{was}'" in refuse(command("FedAMM", half))
    main(command("FedAMM", half, "--trainer.precision", was))
    assert (half / "metrics.csv").read_bytes() == (fedamm_run / "metrics.csv").read_bytes()


def test_other_data_in_python_are_refused(tmp_path: Path) -> None:
    federation(tmp_path, num_rounds=1).run()
    data = tiny_data()
    data.images.train_images[0, 0, 0, 0] += 1
    with pytest.raises(ValueError, match=r"data \(content\) is '\w+' but was '\w+'\. Choose"):
        federation(tmp_path, data).run()


class OtherAMM(FedAMM):
    """Of another class, with the same options."""


def test_another_class_in_python_is_refused(tmp_path: Path) -> None:
    federation(tmp_path, num_rounds=1).run()
    data = tiny_data()
    module = OtherAMM(NUM_CLASSES, 1, tiny_resnet(NUM_CLASSES, 1), differentiation="forward", info=data.info)
    with pytest.raises(ValueError, match=r"algorithm is '\S*OtherAMM' but was 'FedAMM'"):
        Orchestrator(module, data, num_rounds=1, local_epochs=1, output_dir=tmp_path).run()


# Resumes are counted


def resumes(folder: Path) -> int:
    return int(json.loads((folder / "summary.json").read_text())["resumes"])


def test_resumes_are_counted(command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rounds in ("1", "2", "3"):
        main(command("FedAMM", tmp_path, "--federation.num_rounds", rounds))
        assert resumes(tmp_path) == int(rounds) - 1
    assert "resumes 2\n" in capsys.readouterr().out
    main(command("FedAMM", tmp_path, "--federation.num_rounds", "3"))
    assert resumes(tmp_path) == 2  # there was nothing left to do


def die_after(round_num: int) -> None:
    """Have this process end without a word when it has written the checkpoint of a round."""
    save = files.save_checkpoint

    def saved(folder: Path, state: Any, *rest: Any) -> Path:
        path = save(folder, state, *rest)
        if state.round_num == round_num:
            os._exit(9)
        return path

    files.save_checkpoint = saved


def test_resumes_of_killed_runs_are_counted(fedamm_run: Path, command: Any, tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    for round_num in (0, 2, 3):
        assert ended(fork(command("FedAMM", folder), log, functools.partial(die_after, round_num))) == 9
    assert ended(fork(command("FedAMM", folder), log)) == 0
    assert resumes(folder) == 3
    assert_same_run(folder, fedamm_run)
