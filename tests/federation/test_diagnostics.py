"""What figures show beside the metrics: tallies of clients, the weight net, the confusion matrix, and where they go."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from fedamm_pl import FedAMM, FedAvg, FederatedModule, Orchestrator
from fedamm_pl.protocol import module as base
from fedamm_pl.algorithms.fedamm import LOSS_GRID
from fedamm_pl.federation import callbacks
from fedamm_pl.federation.callbacks import FederationCallback, FigureFiles, LogTo, RoundRecord
from fedamm_pl.federation.callbacks.files import diagnostics
from fedamm_pl.federation.executors import SequentialExecutor
from fedamm_pl.federation.orchestrator import FederationError
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.protocol.messages import ClientFailure, ClientResult
from tests.tiny import NUM_CLASSES, TinyData, tiny_data

CPU = TrainerConfig(accelerator="cpu", precision="32-true")
FEDAMM_FIGURES = {
    "class_counts",
    "partition",
    "accuracy",
    "class_accuracy",
    "confusion",
    "weight_mapping",
    "class_weights",
}


def make(algorithm: type[FederatedModule], data: TinyData, **options: Any) -> FederatedModule:
    torch.manual_seed(0)
    return algorithm(NUM_CLASSES, 1, "tests.tiny.tiny_resnet", info=data.info, **options)


def federation(algorithm: type[FederatedModule] = FedAMM, data: TinyData | None = None, **options: Any) -> Orchestrator:
    data = data or tiny_data()
    more = {"differentiation": "forward"} if algorithm is FedAMM else {}
    defaults: dict[str, Any] = {"num_rounds": 2, "local_epochs": 2, "eval_interval": 1, "trainer": CPU}
    return Orchestrator(make(algorithm, data, **more), data, **{**defaults, **options})


class Spy(SequentialExecutor):
    """Keeps the results that pass."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.results: list[ClientResult] = []

    def run(self, *args: Any) -> Iterator[ClientResult | ClientFailure]:
        for outcome in super().run(*args):
            if isinstance(outcome, ClientResult):
                self.results.append(outcome)
            yield outcome


# Tallies


def test_tallies_count_each_example_of_the_last_epoch_once() -> None:
    spy, data = Spy(), tiny_data()
    federation(data=data, num_rounds=1, executor=spy).run()
    for result in spy.results:
        assert result.tallies["examples"].tolist() == data.client_class_counts[result.client_id].tolist()
        assert float(result.tallies["losses"].sum()) == result.num_examples
        # relative weights have mean 1 in each batch, whatever the weight net
        assert float(result.tallies["weights"].sum()) == pytest.approx(result.num_examples)
        assert not torch.allclose(result.tallies["weights"], result.tallies["examples"])


def test_a_constant_weight_net_gives_every_class_the_weight_1() -> None:
    run = federation()
    assert isinstance(run.module, FedAMM)
    nn.init.zeros_(run.module.weight_net.layers[2].weight)  # type: ignore[arg-type]
    run.state.shared = run.module.shared_state()
    run.num_rounds = 1
    run.run()
    seen = [weight for weight in run.state.diagnostics[-1]["weight_per_class"] if weight is not None]
    assert seen == pytest.approx([1.0] * len(seen))


def test_diagnostics_are_sums_over_the_clients() -> None:
    spy = Spy()
    run = federation(num_rounds=1, executor=spy)
    run.run()
    weights, examples, losses = (
        sum(result.tallies[name] for result in spy.results) for name in ("weights", "examples", "losses")
    )
    row = run.state.diagnostics[-1]
    expected = [float(w / n) if n else None for w, n in zip(weights, examples, strict=True)]  # type: ignore[arg-type]
    assert row["weight_per_class"] == pytest.approx(expected)
    assert row["loss_histogram"] == pytest.approx((losses / losses.sum()).tolist())  # type: ignore[union-attr]
    assert isinstance(run.module, FedAMM)
    with torch.no_grad():
        assert row["weight_curve"] == pytest.approx(run.module.weight_net(torch.tensor(LOSS_GRID)).tolist())


def test_losses_fall_into_the_bins_of_numpy() -> None:
    module = make(FedAMM, tiny_data())
    assert isinstance(module, FedAMM)
    losses = torch.tensor([0.0, 0.2499, 0.25, 0.26, 3.0, 9.99, 10.0, 25.0])
    module._seen = [(torch.zeros(8, dtype=torch.int64), losses, torch.ones(8))]
    edges = [*LOSS_GRID, np.inf]
    assert module.tallies()["losses"].tolist() == np.histogram(losses.numpy(), edges)[0].tolist()


def test_a_class_that_no_client_holds_has_no_weight() -> None:
    module = make(FedAMM, tiny_data())
    tallies = {
        "weights": torch.tensor([2.0, 0, 3, 0]),
        "examples": torch.tensor([1.0, 0, 2, 0]),
        "losses": torch.ones(len(LOSS_GRID)),
    }
    assert module.diagnostics(tallies)["weight_per_class"] == [2.0, None, 1.5, None]
    assert set(module.diagnostics({})) == {"weight_curve"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tallies: {}, "it lacks examples and 2 more"),
        (lambda tallies: {**tallies, "more": torch.zeros(1)}, "what was not asked for: more"),
        (lambda tallies: {**tallies, "weights": torch.zeros(3)}, r"weights has shape \(3,\), expected \(4,\)"),
        (lambda tallies: {**tallies, "weights": torch.zeros(4)}, "weights is of type torch.float32"),
        (lambda tallies: {**tallies, "losses": tallies["losses"] * float("nan")}, "its tally losses is NaN"),
        (lambda tallies: [1], "its tallies are a list"),
        (lambda tallies: {**tallies, "weights": None}, "weights is a NoneType"),
    ],
)
def test_unsound_tallies_are_refused(
    change: Callable[[dict[str, Any]], Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Malicious(SequentialExecutor):
        def run(self, *args: Any) -> Iterator[ClientResult | ClientFailure]:
            for index, outcome in enumerate(super().run(*args)):
                assert isinstance(outcome, ClientResult)
                yield outcome if index else dataclasses.replace(outcome, tallies=change(outcome.tallies))

    run = federation(num_rounds=1, executor=Malicious(CPU))
    run.run()
    assert run.state.counts["refused_updates"] == 1
    (message,) = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert re.search(reason, message)


# Confusion matrix and diagnostics.json


def test_the_confusion_matrix_is_that_of_the_last_evaluation(fedamm_run: Path) -> None:
    content = json.loads((fedamm_run / "diagnostics.json").read_text())
    final = json.loads((fedamm_run / "summary.json").read_text())["final"]
    matrix = np.array(content["confusion"])
    assert matrix.sum(1).tolist() == [20] * 6
    assert np.trace(matrix) / matrix.sum() == pytest.approx(final["test/acc"])
    assert np.diag(matrix) / 20 == pytest.approx([final[f"test/acc_class_{label}"] for label in range(6)])


def test_a_plain_trainer_leaves_the_confusion_matrix_in_the_module() -> None:
    data = tiny_data()
    module = make(FedAvg, data)
    trainer = CPU.build()
    for _ in range(2):  # the second test counts anew
        trainer.test(module, data.test_dataloader(), verbose=False)
    assert module.test_confusion is not None
    assert int(module.test_confusion.compute().sum()) == 80


def test_with_many_classes_there_is_no_confusion_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "CONFUSION_CLASSES", 3)
    run = federation(FedAvg)
    run.run()
    assert run.module.test_confusion is None
    assert diagnostics(run)["confusion"] is None


def test_the_file_describes_data_and_rounds(fedamm_run: Path) -> None:
    content = json.loads((fedamm_run / "diagnostics.json").read_text())
    assert np.array(content["client_class_counts"]).sum(0) == pytest.approx(content["class_counts"])
    assert [row["round"] for row in content["rounds"]] == [0, 2, 4, 5]
    total = json.loads((fedamm_run / "summary.json").read_text())["bytes_per_round"]
    assert content["rounds"][-1]["bytes"] == pytest.approx(5 * (total["received"] + total["sent"]))
    assert [set(row) >= {"weight_per_class", "loss_histogram"} for row in content["rounds"]] == [
        False,
        True,
        True,
        True,
    ]


def without_seconds(folder: Path) -> dict[str, Any]:
    content = dict(json.loads((folder / "diagnostics.json").read_text()))
    for row in content["rounds"]:
        del row["seconds"]
    return content


def test_a_continued_run_writes_the_file_of_an_uninterrupted_one(tmp_path: Path) -> None:
    federation(num_rounds=4, eval_interval=2, output_dir=tmp_path / "whole").run()
    federation(num_rounds=2, eval_interval=2, output_dir=tmp_path / "halves").run()
    (tmp_path / "halves/diagnostics.json").write_text("mangled")
    federation(num_rounds=4, eval_interval=2, output_dir=tmp_path / "halves").run()
    assert without_seconds(tmp_path / "halves") == without_seconds(tmp_path / "whole")


# Loggers


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"images": 0})
    accumulator.Reload()
    return accumulator


def test_tensorboard_has_grouped_scalars_a_layout_and_figures(tmp_path: Path) -> None:
    run = federation(callbacks=[LogTo(TensorBoardLogger(tmp_path, "", ""))])
    history = run.run()
    log = events(tmp_path)
    tags = set(log.Tags()["scalars"])
    expected = {"test/acc", "test/loss", "test_shots/many", "test_per_class/acc_3", "client/loss", "client/loss_std"}
    expected |= {"client/meta_loss", "weight_net/at_loss_0", "weight_net/at_loss_10", "weight_net/relative_weight_few"}
    expected |= {"bytes/total", "seconds/train", "seconds/images_per_second", "failures/failed_clients"}
    assert expected <= tags
    assert "test/acc_many" not in tags
    shown = run.state.diagnostics[-1]
    assert log.Scalars("weight_net/at_loss_1")[-1].value == pytest.approx(shown["weight_curve"][4])
    assert log.Scalars("bytes/total")[-1].value == shown["bytes"]
    assert log.Scalars("test_shots/few")[-1].value == pytest.approx(history[-1]["test/acc_few"])
    assert {tag.removeprefix("figures/") for tag in log.Tags()["images"]} == FEDAMM_FIGURES
    assert [image.step for image in log.Images("figures/partition")] == [2]
    assert log.Images("figures/confusion")[-1].step == 2
    assert "custom_scalars__config__" in log.Tags()["tensors"]


def test_scalars_count_what_went_wrong(tmp_path: Path) -> None:
    class Failing(SequentialExecutor):
        def run(self, *args: Any) -> Iterator[ClientResult | ClientFailure]:
            for index, outcome in enumerate(super().run(*args)):
                yield ClientFailure(outcome.client_id, "training", "it rains") if index == 0 else outcome

    federation(FedAvg, executor=Failing(CPU), callbacks=[LogTo(TensorBoardLogger(tmp_path, "", ""))]).run()
    log = events(tmp_path)
    assert [event.value for event in log.Scalars("failures/failed_clients")] == [1, 1]
    assert [event.value for event in log.Scalars("failures/failed_rounds")] == [0, 0]


def test_a_logger_without_images_costs_no_drawing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(_: Orchestrator) -> None:
        raise AssertionError

    monkeypatch.setattr(callbacks, "figures", forbidden)
    federation(FedAvg, callbacks=[LogTo(CSVLogger(tmp_path, "", ""))]).run()
    federation(FedAvg, callbacks=[LogTo(TensorBoardLogger(tmp_path, "", ""), figures=False)]).run()


def test_a_logger_with_log_image_gets_pixels(tmp_path: Path) -> None:
    class ImageLogger(CSVLogger):
        seen: dict[str, Any] = {}  # noqa: RUF012

        def log_image(self, key: str, images: list[Any], step: int) -> None:
            self.seen[key] = images[0], step

    federation(callbacks=[LogTo(ImageLogger(tmp_path, "", ""))]).run()
    assert {key.removeprefix("figures/") for key in ImageLogger.seen} == FEDAMM_FIGURES
    image, step = ImageLogger.seen["figures/accuracy"]
    assert step == 2
    assert image.dtype == np.uint8
    assert image.shape[2] == 4
    assert image[..., :3].std() > 0


def test_figures_for_a_logger_keep_to_their_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    logger = LogTo(TensorBoardLogger(tmp_path, "", ""))
    draw = logger._draw

    def counted(orchestrator: Orchestrator, round_num: int) -> None:
        drawn.append(round_num)
        draw(orchestrator, round_num)

    monkeypatch.setattr(logger, "_draw", counted)
    federation(num_rounds=6, local_epochs=1, callbacks=[logger]).run()
    assert drawn == [6]  # six rounds last too short for more
    monkeypatch.setattr(callbacks, "DRAWING_SHARE", 1e9)
    drawn.clear()
    federation(num_rounds=3, local_epochs=1, callbacks=[logger]).run()
    assert drawn == [0, 1, 2, 3]
    assert len(events(tmp_path).Images("figures/partition")) == 2  # of two runs: the data do not change


def test_figure_files_are_pdf_and_png(tmp_path: Path) -> None:
    federation(callbacks=[FigureFiles(tmp_path / "new/figures")]).run()
    found = {path.name for path in (tmp_path / "new/figures").iterdir()}
    assert found == {f"{name}.{kind}" for name in FEDAMM_FIGURES for kind in ("pdf", "png")}
    assert (tmp_path / "new/figures/accuracy.pdf").read_bytes().startswith(b"%PDF")


def test_figures_that_cannot_be_drawn_cost_a_warning_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr("fedamm_pl.results.figures.run_figures", fail)
    logger = LogTo(TensorBoardLogger(tmp_path, "", ""))
    federation(callbacks=[logger, FigureFiles(tmp_path / "figures")], output_dir=tmp_path).run()
    assert (tmp_path / "summary.json").exists()
    assert (tmp_path / "final.ckpt").exists()
    assert (
        f"{tmp_path / 'figures'}: could not be drawn, the run goes on without (RuntimeError: no fonts)" in caplog.text
    )
    assert events(tmp_path).Scalars("test/acc")


# The estimate


@pytest.mark.parametrize("algorithm", [FedAvg, FedAMM])
def test_the_estimate_counts_the_bytes_of_a_round_and_leaves_the_run_alone(algorithm: type[FederatedModule]) -> None:
    run, plain = (federation(algorithm, tiny_data(partition="iid"), num_rounds=1, eval_interval=1) for _ in range(2))
    cost = run.estimate()
    assert run.run() == plain.run()
    assert cost["received"] == run.state.bytes_total["received"]
    assert cost["sent"] == run.state.bytes_total["sent"]
    assert all(cost[name] > 0 for name in ("train", "evaluate"))
    assert (cost["meta"] > 0) == (algorithm is FedAMM)


def test_the_estimate_says_why_a_client_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no memory")

    run = federation(FedAvg)
    monkeypatch.setattr(FedAvg, "training_step", fail)
    with pytest.raises(FederationError, match=r"client \d failed \(training\): RuntimeError: no memory"):
        run.estimate()


def test_callbacks_see_the_diagnostics_of_their_round() -> None:
    class Watch(FederationCallback):
        rounds: list[int] = []  # noqa: RUF012

        def on_round_end(self, orchestrator: Orchestrator, record: RoundRecord) -> None:
            self.rounds.append(orchestrator.state.diagnostics[-1]["round"])

    federation(FedAvg, num_rounds=3, eval_interval=2, callbacks=[Watch()]).run()
    assert Watch.rounds == [0, 0, 2, 3]
