"""What a Lightning logger gets of a run."""

import errno
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedamm_pl import FedAMM, FedAvg
from fedamm_pl.federation.callbacks import FederationCallback, LogTo, RoundRecord
from fedamm_pl.federation.callbacks.loggers import images_per_second, round_scalars, weight_net_scalars
from fedamm_pl.federation.run import Run
from tests.federation.executors.methods import HalfReadable
from tests.federation.small import Recorder, federation


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def test_tensorboard_has_grouped_scalars_a_layout_and_no_figures(tmp_path: Path) -> None:
    run = federation(FedAMM, callbacks=[LogTo(TensorBoardLogger(tmp_path, "", ""), config="a: 1\nb: 2")])
    history = run.run()
    log = events(tmp_path)
    tags = set(log.Tags()["scalars"])
    expected = {"test/acc", "test/loss", "test_shots/many", "test_per_class/acc_3", "client/loss", "client/loss_std"}
    expected |= {"client/meta_loss", "weight_net/at_loss_0", "weight_net/at_loss_10", "weight_net/relative_weight_few"}
    expected |= {"bytes/total", "seconds/clients", "seconds/evaluate", "seconds/other", "seconds/images_per_second"}
    expected |= {"client_seconds/train", "client_seconds/meta", "failures/failed_clients", "failures/refused_updates"}
    assert expected <= tags
    assert "test/acc_many" not in tags
    shown = run.state.diagnostics[-1]
    assert log.Scalars("weight_net/at_loss_1")[-1].value == pytest.approx(shown["weight_curve"][4])
    assert log.Scalars("bytes/total")[-1].value == shown["bytes"]
    assert log.Scalars("test_shots/few")[-1].value == pytest.approx(history[-1]["test/acc_few"])
    assert [event.step for event in log.Scalars("test/acc")] == [0, 1, 2]
    assert log.Tags()["images"] == []
    assert {"custom_scalars__config__", "config/text_summary"} <= set(log.Tags()["tensors"])
    assert b"    a: 1\n    b: 2" in log.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def test_scalars_count_what_went_wrong(tmp_path: Path) -> None:
    data = HalfReadable("tiny", num_clients=8, num_meta_per_class=2, imbalance_factor=0.2, partition="iid")
    federation(FedAvg, data, client_fraction=1.0, callbacks=[LogTo(TensorBoardLogger(tmp_path, "", ""))]).run()
    log = events(tmp_path)
    assert [event.value for event in log.Scalars("failures/failed_clients")] == [1, 1]
    assert [event.value for event in log.Scalars("failures/refused_updates")] == [0, 0]
    assert [event.value for event in log.Scalars("failures/failed_rounds")] == [0, 0]


class Plain(CSVLogger):
    """A logger that takes no metrics with its hyperparameters, and notes what it gets."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "", "")
        self.options: dict[str, Any] = {}
        self.status = ""

    def log_hyperparams(self, params: Any) -> None:  # type: ignore[override]
        self.options = dict(params)

    def finalize(self, status: str) -> None:
        self.status = status


@pytest.mark.parametrize("options", [None, {"mine": 1}])
def test_hyperparameters_are_the_options_of_the_run_unless_given(options: Any, tmp_path: Path) -> None:
    logger = Plain(tmp_path)
    federation(num_rounds=1, callbacks=[LogTo(logger, options)]).run()
    assert logger.options.get("mine") == (1 if options else None)
    assert logger.options.get("federation.num_rounds") == (None if options else 1)
    assert logger.status == "success"


def test_what_is_logged_of_a_round_is_there_when_its_checkpoint_is(tmp_path: Path) -> None:
    class Killed(FederationCallback):
        def on_round_end(self, run: Run, record: RoundRecord) -> None:
            if record.round_num == 2:
                assert [event.step for event in events(tmp_path / "log").Scalars("test/acc")] == [0, 1, 2]
                raise KeyboardInterrupt

    logger = TensorBoardLogger(tmp_path / "log", "", "")
    with pytest.raises(KeyboardInterrupt):
        federation(callbacks=[LogTo(logger), Killed()], output_dir=tmp_path / "run").run()


def test_a_full_disk_is_not_taken_for_a_wrong_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(CSVLogger):
        def log_metrics(self, *args: Any, **options: Any) -> None:
            try:
                raise OSError(errno.ENOSPC, "No space left on device")
            except OSError as error:
                raise ValueError("you tried to log -1") from error

    with pytest.raises(OSError, match="No space left"):
        federation(callbacks=[LogTo(Full(tmp_path, "", ""))]).run()


def test_numbers_of_ones_own_are_logged_under_their_names() -> None:
    scalars: list[dict[str, float]] = []

    class Own(FederationCallback):
        def on_round_end(self, run: Run, record: RoundRecord) -> None:
            run.log("own/number", record.round_num)
            scalars.append(round_scalars(run, record))

    federation(callbacks=[Own()]).run()
    assert [row["own/number"] for row in scalars] == [0, 1, 2]
    assert "bytes/total" not in scalars[0]
    assert "seconds/clients" not in scalars[0]


def test_a_method_without_a_weight_net_has_no_scalars_of_one() -> None:
    groups = {"many": [0], "few": [1, 2]}
    assert weight_net_scalars({}, groups) == {}
    found = weight_net_scalars({"weight_per_class": [2.0, None, 0.5]}, groups)
    assert found == {"weight_net/relative_weight_many": 2.0, "weight_net/relative_weight_few": 0.5}
    assert weight_net_scalars({"weight_per_class": [2.0, None, None]}, groups) == {
        "weight_net/relative_weight_many": 2.0
    }


def test_images_per_second_are_by_the_wall_time_of_the_clients() -> None:
    recorder = Recorder()
    speeds: list[float] = []

    class Watch(FederationCallback):
        def on_round_end(self, run: Run, record: RoundRecord) -> None:
            if record.results:
                speeds.append(images_per_second(run, record))

    federation(local_epochs=2, callbacks=[recorder, Watch()]).run()
    for speed, record in zip(speeds, recorder.records[1:], strict=True):
        images = 2 * sum(result.num_examples for result in record.results)
        assert speed == pytest.approx(images / record.seconds["clients"])
