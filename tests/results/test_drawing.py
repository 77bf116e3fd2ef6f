"""Figures of a run while it runs: for loggers, as files, within their share of the time, and never at the run's expense."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedamm_pl import FedAMM, FedAvg, FederatedModule, Orchestrator
from fedamm_pl.federation.callbacks import LogTo
from fedamm_pl.federation.run import Run
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.results import drawing
from fedamm_pl.results.drawing import FigureFiles, LogFigures
from tests.tiny import NUM_CLASSES, tiny_data

CPU = TrainerConfig(accelerator="cpu", precision="32-true")
FEDAVG_FIGURES = {"class_counts", "partition", "accuracy", "class_accuracy", "confusion"}
FEDAMM_FIGURES = FEDAVG_FIGURES | {"weight_mapping", "class_weights"}


def federation(algorithm: type[FederatedModule] = FedAMM, **options: Any) -> Orchestrator:
    torch.manual_seed(0)
    data = tiny_data()
    more = {"differentiation": "forward"} if algorithm is FedAMM else {}
    module = algorithm(NUM_CLASSES, 1, "tests.tiny.tiny_resnet", info=data.info, **more)
    defaults: dict[str, Any] = {"num_rounds": 2, "local_epochs": 1, "eval_interval": 1, "trainer": CPU}
    return Orchestrator(module, data, **{**defaults, **options})


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"images": 0})
    accumulator.Reload()
    return accumulator


class ImageLogger(CSVLogger):
    """A logger that takes images, like that of Weights and Biases."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "", "")
        self.seen: dict[str, tuple[Any, int]] = {}

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        self.seen[key.removeprefix("figures/")] = images[0], step


# For loggers


def test_tensorboard_has_figures(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, "", "")
    federation(callbacks=[LogFigures(logger), LogTo(logger)]).run()
    log = events(tmp_path)
    assert {tag.removeprefix("figures/") for tag in log.Tags()["images"]} == FEDAMM_FIGURES
    assert [image.step for image in log.Images("figures/partition")] == [2]
    assert log.Images("figures/confusion")[-1].step == 2
    assert log.Scalars("test/acc")
    assert len(list(tmp_path.glob("events.*"))) == 1  # a log that is closed would be opened again


def test_a_logger_with_log_image_gets_pixels(tmp_path: Path) -> None:
    logger = ImageLogger(tmp_path)
    federation(callbacks=[LogFigures(logger)]).run()
    assert set(logger.seen) == FEDAMM_FIGURES
    image, step = logger.seen["accuracy"]
    assert step == 2
    assert image.dtype == np.uint8
    assert image.shape[2] == 4
    assert image[..., :3].std() > 0


def test_a_logger_without_images_costs_no_drawing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(_: Run) -> None:
        raise AssertionError

    monkeypatch.setattr(drawing, "figures", forbidden)
    federation(FedAvg, callbacks=[LogFigures(CSVLogger(tmp_path, "", ""))]).run()


def test_figures_for_a_logger_keep_to_their_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    logger = LogFigures(TensorBoardLogger(tmp_path, "", ""))
    draw = logger._draw

    def counted(run: Run) -> None:
        drawn.append(run.state.round_num)
        draw(run)

    monkeypatch.setattr(logger, "_draw", counted)
    federation(num_rounds=6, callbacks=[logger]).run()
    assert drawn == [6]  # six rounds last too short for more
    monkeypatch.setattr(drawing, "DRAWING_SHARE", 1e9)
    drawn.clear()
    federation(num_rounds=3, callbacks=[logger]).run()
    assert drawn == [0, 1, 2, 3]
    assert len(events(tmp_path).Images("figures/partition")) == 2  # of two runs: the data do not change


def test_figures_are_drawn_once_a_round_for_all_who_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def counted(history: Any, diagnostics: Any) -> Any:
        drawn.append(int(history[-1]["round"]))
        return draw(history, diagnostics)

    draw: Callable[..., Any] = drawing.run_figures
    monkeypatch.setattr(drawing, "run_figures", counted)
    monkeypatch.setattr(drawing, "DRAWING_SHARE", 1e9)
    callbacks = [LogFigures(ImageLogger(tmp_path)), LogFigures(ImageLogger(tmp_path)), FigureFiles(tmp_path)]
    federation(FedAvg, callbacks=callbacks).run()
    assert drawn == [0, 1, 2]


# As files


def test_figure_files_are_pdf_and_png(tmp_path: Path) -> None:
    federation(callbacks=[FigureFiles(tmp_path / "new/figures")]).run()
    found = {path.name for path in (tmp_path / "new/figures").iterdir()}
    assert found == {f"{name}.{kind}" for name in FEDAMM_FIGURES for kind in ("pdf", "png")}
    assert (tmp_path / "new/figures/accuracy.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "new/figures/accuracy.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["accuracy.pdf", "accuracy.png", ".accuracy.pdf.tmp", ".accuracy.png.tmp"])
def test_figure_files_are_written_to_no_link(name: str, tmp_path: Path) -> None:
    folder, target = tmp_path / "figures", tmp_path / "outside"
    target.write_text("precious")
    folder.mkdir()
    (folder / name).symlink_to(target)
    federation(FedAvg, callbacks=[FigureFiles(folder)]).run()
    assert target.read_text() == "precious"
    assert {path.name for path in folder.iterdir()} == {
        f"{n}.{kind}" for n in FEDAVG_FIGURES for kind in ("pdf", "png")
    }
    assert not [path for path in folder.iterdir() if path.is_symlink()]


# What goes wrong


def test_figures_that_cannot_be_drawn_cost_a_warning_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(drawing, "run_figures", fail)
    logger = TensorBoardLogger(tmp_path, "", "")
    callbacks = [LogFigures(logger), LogTo(logger), FigureFiles(tmp_path / "figures")]
    federation(callbacks=callbacks, output_dir=tmp_path).run()
    assert (tmp_path / "summary.json").exists()
    assert (tmp_path / "final.ckpt").exists()
    for what in (tmp_path / "figures", "figures for the logger"):
        assert f"{what}: could not be drawn, the run goes on without (RuntimeError: no fonts)" in caplog.text
    assert events(tmp_path).Scalars("test/acc")


def test_a_disk_that_fails_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(drawing, "write_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        federation(FedAvg, callbacks=[FigureFiles(tmp_path)]).run()
