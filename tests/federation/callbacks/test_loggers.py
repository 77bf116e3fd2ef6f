"""What a Lightning logger gets of a run."""

import errno
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedamm_pl import FedAMM, FedAvg
from fedamm_pl.federation.callbacks import FederationCallback, LogTo, RoundRecord
from fedamm_pl.federation.callbacks.loggers import check_loggers, images_per_second, round_scalars, weight_net_scalars
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
    expected = {"test/acc", "test/loss", "test/acc_many", "test/acc_class_3", "client/loss", "client/loss_std"}
    expected |= {"client/meta_loss", "weight_net/at_loss_0", "weight_net/at_loss_10", "weight_net/relative_weight_few"}
    expected |= {"bytes/total", "seconds/clients", "seconds/evaluate", "seconds/other", "seconds/images_per_second"}
    expected |= {"client_seconds/train", "client_seconds/meta", "failures/failed_clients", "failures/refused_updates"}
    assert expected <= tags
    assert set(history[-1]) - {"round"} <= tags  # by their names in metrics.csv
    shown = run.state.diagnostics[-1]
    assert log.Scalars("weight_net/at_loss_1")[-1].value == pytest.approx(shown["weight_curve"][4])
    assert log.Scalars("bytes/total")[-1].value == shown["bytes"]
    assert log.Scalars("test/acc_few")[-1].value == pytest.approx(history[-1]["test/acc_few"])
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


# Where loggers write


class Remote(Logger):
    """A logger that names folders, or none."""

    def __init__(self, log_dir: str | None = None, save_dir: str | None = None) -> None:
        super().__init__()
        self._dirs = log_dir, save_dir

    name, version = "remote", "0"

    @property
    def log_dir(self) -> str | None:
        return self._dirs[0]

    @property
    def save_dir(self) -> str | None:
        return self._dirs[1]

    def log_metrics(self, *_: Any, **__: Any) -> None:
        """Nothing."""

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing."""


class Shy(Remote):
    """A logger that does not say where it writes."""

    @property
    def log_dir(self) -> str | None:
        raise RuntimeError("ask the service")


@pytest.mark.parametrize(
    ("make", "place"),
    [
        (lambda run: CSVLogger(run, "", ""), "."),
        (lambda run: CSVLogger(run.parent, run.name, ""), "."),
        (lambda run: CSVLogger(run, "x", "../"), "."),
        (lambda run: CSVLogger(run, "figures", ""), "figures"),
        (lambda run: CSVLogger(run, "", "checkpoints"), "checkpoints"),
        (lambda run: Remote(save_dir=str(run)), "."),
        (lambda run: Shy(save_dir=str(run / "clients")), "clients"),
    ],
)
def test_a_logger_that_would_write_among_the_files_of_a_run_is_refused_before_anything_is_written(
    make: Any, place: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    logger = make(folder)
    message = rf"^Expected `logger` to write into a folder of its own, got \w+ in {(folder / place).resolve()}, where the run "
    with pytest.raises(ValueError, match=message):
        federation(callbacks=[LogTo(logger)], output_dir=folder).run()
    assert not folder.exists()
    federation(callbacks=[LogTo(logger)], num_rounds=0).run()  # without a folder there is nothing in its way


@pytest.mark.parametrize(
    "make",
    [
        lambda run: [TensorBoardLogger(run, "", "")],
        lambda run: [CSVLogger(run, "csv", "")],
        lambda run: [CSVLogger(run.parent, "", "")],
        lambda run: [Remote(), Remote(), Shy(), Shy()],
        lambda run: [Remote(save_dir=str(run.parent)), Remote(save_dir=str(run.parent))],
        lambda run: [CSVLogger(run, "csv", "a"), CSVLogger(run, "csv", "b")],
        lambda run: [TensorBoardLogger(run, "logs", "a"), CSVLogger(run, "logs", "a")],
    ],
)
def test_other_loggers_are_nobodys_business(make: Any, tmp_path: Path) -> None:
    check_loggers(make(tmp_path / "run"), tmp_path / "run")


def test_two_loggers_that_write_the_same_files_are_refused(tmp_path: Path) -> None:
    twice = [CSVLogger(tmp_path), CSVLogger(tmp_path)]  # both take the next version that is free
    with pytest.raises(
        ValueError, match=rf"^Expected each `logger` .*, got two CSVLogger in {tmp_path}/\S+/version_0: "
    ):
        check_loggers(twice, None)
    with pytest.raises(ValueError, match="got two Plain in"):
        federation(callbacks=[LogTo(Plain(tmp_path)), LogTo(CSVLogger(tmp_path, "", ""))]).run()
    with pytest.raises(ValueError, match="got two TensorBoardLogger in"):
        check_loggers([TensorBoardLogger(tmp_path, "", ""), TensorBoardLogger(tmp_path, "", "")], tmp_path)


# Loggers that fail


class Unreliable(CSVLogger):
    """A logger that fails where it is told to."""

    def __init__(self, folder: Path, method: str, error: Exception) -> None:
        super().__init__(folder, "", "")
        self.told: list[str] = []
        self._fails, self._error = method, error

    def _tell(self, method: str) -> None:
        self.told.append(method)
        if method == self._fails:
            raise self._error

    def log_metrics(self, *_: Any, **__: Any) -> None:
        self._tell("log_metrics")

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        self._tell("log_hyperparams")

    def save(self) -> None:
        self._tell("save")

    def finalize(self, status: str) -> None:
        self._tell("finalize")

    @property
    def experiment(self) -> Any:
        self._tell("experiment")


@pytest.mark.parametrize(
    ("method", "times"),
    [("experiment", 1), ("log_metrics", 3), ("save", 4), ("log_hyperparams", 1), ("finalize", 1)],
)
@pytest.mark.parametrize(
    "error", [RuntimeError("no\n \x1b[31mnetwork"), ConnectionResetError(104, "no network"), OSError("HTTP 500")]
)
def test_a_logger_that_fails_costs_the_run_nothing(
    method: str, times: int, error: Exception, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = Unreliable(tmp_path / "log", method, error)
    run = federation(callbacks=[LogTo(logger)], output_dir=tmp_path / "run")
    history = run.run()
    assert history == federation().run()
    assert logger.told.count("log_metrics") == 3
    assert logger.told.count("finalize") == 1
    assert (tmp_path / "run/final.ckpt").exists()
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert re.match(rf"Unreliable failed .*, the run continues without it \({type(error).__name__}: ", lines[0])
    assert all(line.isprintable() for line in lines)
    again = [f"Unreliable failed {times} times in this run and lacks these entries"] if times > 1 else []
    assert lines[1:] == again


@pytest.mark.parametrize("method", ["experiment", "log_metrics", "save", "log_hyperparams", "finalize"])
def test_a_full_disk_ends_the_run_wherever_a_logger_meets_it(method: str, tmp_path: Path) -> None:
    error = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space left"):
        federation(callbacks=[LogTo(Unreliable(tmp_path, method, error))]).run()
