"""Whole runs on images that are decoded when they are needed: the same run, and one line for a file that is damaged."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedamm_pl import FedAvg, FederatedDataModule, Orchestrator
from fedamm_pl.cli.main import main
from fedamm_pl.federation.executors import Processes
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.protocol.messages import State
from tests.federation.small import assert_equal

Command = Callable[..., list[str]]
OPTIONS = {
    "num_clients": 3,
    "partition": "iid",
    "imbalance_profile": "none",
    "num_meta_per_class": 1,
    "batch_size": 8,
    "test_batch_size": 8,
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of two classes with 20 training and 10 test images each."""
    rng = np.random.default_rng(0)
    for part, number in (("train", 20), ("test", 10)):
        for name, colour in (("a", 60), ("b", 180)):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for i in range(number):
                noise = rng.integers(-40, 40, (9, 9, 3))
                Image.fromarray((colour + noise).astype(np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "images"


def damage(path: Path) -> None:
    """Cut off what comes behind the header."""
    path.write_bytes(path.read_bytes()[:120])


def orchestrator(root: Path, executor: Processes | None = None, **options: object) -> Orchestrator:
    torch.manual_seed(0)
    data = FederatedDataModule("image_folder", str(root), **{**OPTIONS, **options})  # type: ignore[arg-type]
    module = FedAvg(data.num_classes, data.in_channels, "small_cnn", info=data.info)
    trainer = TrainerConfig(accelerator="cpu", precision="32-true")
    return Orchestrator(
        module,
        data,
        num_rounds=2,
        client_fraction=1.0,
        local_epochs=1,
        eval_interval=1,
        trainer=trainer,
        executor=executor,
    )


def trained(run: Orchestrator) -> State:
    run.run()
    return run.state.shared


@pytest.mark.parametrize("image_size", [None, 8])
def test_run_is_the_same_as_in_memory(root: Path, image_size: int | None) -> None:
    runs = [orchestrator(root, in_memory=held, image_size=image_size) for held in (True, False)]
    assert_equal(*(trained(run) for run in runs))


def test_run_in_several_processes_is_the_same(root: Path) -> None:
    runs = [orchestrator(root, executor, in_memory=False) for executor in (None, Processes(2, threads_per_worker=1))]
    assert_equal(*(trained(run) for run in runs))


def test_damaged_file_costs_its_client_and_is_named(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = orchestrator(root, in_memory=False)
    victim = run.data.client(1)
    damage(path := victim.images.file(int(victim.images.rows[victim.indices[3]])))  # type: ignore[attr-defined]
    run.run()
    assert (run.state.round_num, run.state.counts["failed_clients"]) == (2, 2)
    said = [message for message in caplog.messages if str(path) in message]
    assert len(said) == 2
    assert all(
        "client 1 failed (data): UnusableFileError: Expected " in message and len(message.splitlines()) == 1
        for message in said
    )


def run_command(command: Command, root: Path, folder: Path) -> list[str]:
    options = {**OPTIONS, "dataset": "image_folder", "root": root, "in_memory": False}
    more = [word for name, value in options.items() for word in (f"--data.{name}", str(value))]
    return command("FedAvg", folder, "--data.imbalance_factor", "1", *more)


def test_damaged_test_image_ends_the_run_in_one_line(
    root: Path, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = root / "test/b/7.png"
    damage(path)
    with pytest.raises(SystemExit) as stop:
        main(run_command(command, root, tmp_path / "run"))
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert stop.value.code != 0
    assert len(errors) == 1
    assert f"Expected {path} to be a PNG" in errors[0]


def test_command_line_reads_files_when_they_are_needed(
    root: Path, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(run_command(command, root, tmp_path / "run"))
    assert f"60 images of 9 x 9 pixels in {root} are decoded on demand" in capsys.readouterr().err
