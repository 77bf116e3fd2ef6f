"""What a run shows: lines or a bar while it runs, a table at the end; and your own classes in it, by import path."""

import csv
import fcntl
import json
import os
import pty
import re
import shlex
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn

from fedamm_pl import FedAMM, FedAvg, FederatedDataModule, cores
from fedamm_pl.cli.main import main
from fedamm_pl.cli.parser import build_parser
from fedamm_pl.cli.run import callbacks
from fedamm_pl.data.sources import ImageData
from fedamm_pl.federation.callbacks import LogTo, Progress
from fedamm_pl.files import lock_folder
from fedamm_pl.losses import example_losses
from fedamm_pl.results.drawing import FigureFiles, LogFigures

ROOT = Path(__file__).parent.parent.parent
COLUMNS = {"all": "test/acc", "many": "test/acc_many", "medium": "test/acc_medium", "few": "test/acc_few"}
GROUPS = r"all \d+\.\d%  many \d+\.\d%  medium \d+\.\d%  few \d+\.\d%"


def closing_table(text: str) -> dict[str, dict[str, float]]:
    """Return row -> column -> percent of the table that ends a run's output."""
    *_, head, final, best, mean, _ = text.splitlines()
    assert head.startswith("test accuracy, %")
    columns = head.removeprefix("test accuracy, %").split()
    table = {}
    for line in (final, best, mean):
        row, numbers = re.fullmatch(r"(\D+(?:last \d+)?) +((?: *\d+\.\d\d)+)", line).groups()  # type: ignore[union-attr]
        table[row.strip()] = dict(zip(columns, map(float, numbers.split()), strict=True))
    return table


def assert_table_of(text: str, folder: Path) -> None:
    """Require the closing table to show summary.json."""
    summary = json.loads((folder / "summary.json").read_text())
    best = {metric: entry["value"] for metric, entry in summary["best"].items()}
    expected = {
        "final": summary["final"],
        "best (on test)": best,
        f"mean of last {summary['num_averaged']}": summary["mean_last_10"],
    }
    assert closing_table(text) == {
        row: {column: pytest.approx(100 * metrics[metric], abs=0.0051) for column, metric in COLUMNS.items()}
        for row, metrics in expected.items()
    }


def test_elsewhere_than_on_a_terminal_each_evaluation_is_a_line(
    command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(command("FedAMM", tmp_path))
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "\r" not in printed.out
    lines = [line for line in printed.out.splitlines() if line.startswith("round ")]
    patterns = [
        rf"round 0/5  {GROUPS}",
        rf"round 2/5  {GROUPS}  client_loss \d\.\d{{3}}  [\d,]+ examples/s  \d+ s left",
        rf"round 4/5  {GROUPS}  client_loss \d\.\d{{3}}  [\d,]+ examples/s  \d+ s left",
        rf"round 5/5  {GROUPS}  client_loss \d\.\d{{3}}  [\d,]+ examples/s",
    ]
    assert len(lines) == len(patterns)
    assert all(re.fullmatch(pattern, line) for pattern, line in zip(patterns, lines, strict=True)), lines


def test_a_run_says_what_it_is_about(command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(command("FedAvg", tmp_path, "--federation.num_rounds", "0"))
    head = capsys.readouterr().out.split("round 0/0")[0]
    parts = [
        "FedAvg with small_cnn (94,246 parameters) on cpu",
        "tiny: 136 training examples",
        "imbalance factor 0.0909 (IF 11), ",
    ]
    parts += ["4 clients of 34 examples each\n"]
    parts += ["55 34 21 13 8 5", "share", "many 0, 1; medium 2, 3; few 4, 5"]
    assert not [part for part in parts if part not in head]


@pytest.mark.parametrize("dry", [False, True])
def test_a_run_says_which_images_nobody_uses(
    command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], dry: bool
) -> None:
    options = ["--data.partition", "by_shards", "--data.num_clients", "5", "--data.shards_per_client", "20"]
    main(command("FedAvg", tmp_path, "--federation.num_rounds", "0", *options, *(["--dry_run"] if dry else [])))
    found = capsys.readouterr()
    assert "tiny: 100 training examples, " in found.out
    assert "5 clients of 20 examples each" in found.out
    left_over = (
        "36 of 136 training examples (26 %) are left over, since all clients hold equally many, and used by nobody"
    )
    assert found.out.count(left_over) == 1
    assert f"partition by_shards: {left_over}" in found.err
    if not dry:
        written = json.loads((tmp_path / "summary.json").read_text())
        assert (written["unused_images"], sum(written["class_counts"])) == (36, 100)


def test_clients_of_different_sizes_are_told_as_a_range(
    command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data.partition", "by_dirichlet", "--data.min_client_size", "2", "--federation.num_rounds", "0"]
    main(command("FedAvg", tmp_path, *options))
    found = re.search(r"4 clients of (\d+) to (\d+) examples\n", capsys.readouterr().out)
    assert found
    least, most = map(int, found.groups())
    assert 2 <= least < 34 < most < 136


def test_the_closing_table_shows_the_summary(command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(command("FedAMM", tmp_path))
    text = capsys.readouterr().out
    assert_table_of(text, tmp_path)
    assert text.splitlines()[-1] == f"results in {tmp_path}"


def test_without_progress_only_head_and_table_are_shown(
    command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(command("FedAvg", tmp_path, "--output.progress", "none"))
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "round" not in printed.out
    assert_table_of(printed.out, tmp_path)


@pytest.mark.parametrize("configured", [True, False])
def test_the_default_folder_is_named_by_configuration_or_algorithm_and_time(
    configured: bool, fedavg_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text((fedavg_run / "config.yaml").read_text())
    arguments = ["--config", "mine.yaml"] if configured else command("FedAvg", "null")
    main([*arguments, "--federation.num_rounds", "0"])
    (folder,) = (path.parent for path in tmp_path.rglob("summary.json"))
    assert folder.parent == tmp_path / "runs" / ("mine" if configured else "FedAvg")
    assert re.match(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", folder.name)


@pytest.mark.parametrize("figures", [True, False])
def test_figures_come_before_the_log_that_ends_with_them(figures: bool, tmp_path: Path) -> None:
    first, second = (CSVLogger(tmp_path, name) for name in ("first", "second"))
    words = ["--algorithm=FedAvg", "--federation.num_rounds=1", f"--output.figures={str(figures).lower()}"]
    config = build_parser().parse_args(words)
    found = callbacks([first, second], config, "seed: 0", tmp_path)
    kinds = [LogFigures, LogTo, LogFigures, LogTo, FigureFiles, Progress] if figures else [LogTo, LogTo, Progress]
    assert [type(callback) for callback in found] == kinds
    loggers = [callback.logger for callback in found if isinstance(callback, LogTo | LogFigures)]
    assert loggers == ([first, first, second, second] if figures else [first, second])
    assert list(tmp_path.iterdir()) == []


def test_starting_loads_nothing_that_draws() -> None:
    code = (
        "import sys, fedamm_pl.cli.main; print([name for name in sys.modules if name.startswith('fedamm_pl.results')])"
    )
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert child.stdout == "[]\n"


def test_an_executor_does_not_change_the_result(command: Any, fedamm_run: Path, tmp_path: Path) -> None:
    main(command("FedAMM", tmp_path, "--executor", "Processes", "--executor.threads_per_worker", "1"))
    assert (tmp_path / "metrics.csv").read_text() == (fedamm_run / "metrics.csv").read_text()
    executor = yaml.safe_load((tmp_path / "config.yaml").read_text())["executor"]
    assert executor["class_path"] == "fedamm_pl.federation.executors.Processes"


@pytest.mark.parametrize("busy", [0.0, 7.5])
def test_threads_follow_the_cores_in_one_line(
    busy: float, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (*cores.CHOSEN, "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cores, "usable_cores", lambda: 2)
    monkeypatch.setattr(cores, "busy_cores", lambda: busy)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "getloadavg", lambda: (8.0, 8.0, 8.0), raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        main(command("FedAvg", tmp_path, "--federation.num_rounds", "1"))
        printed = capsys.readouterr()
        lines = [
            "torch has 3 threads, but may use 2 of 8 cores: it computes with 2 (OMP_NUM_THREADS sets another number)"
        ]
        if busy:
            lines += [
                "other programs keep 7.5 of 8 cores busy, and threads that wait for each other are slow then: "
                "OMP_WAIT_POLICY=passive, or OMP_NUM_THREADS=1, helps"
            ]
        assert printed.err.splitlines() == lines
        assert printed.out.splitlines()[0].endswith(", 2 threads")
        assert json.loads((tmp_path / "summary.json").read_text())["hardware"]["threads"] == 2
    finally:
        torch.set_num_threads(before)


# The dry run


def test_a_dry_run_says_what_a_round_costs(command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(command("FedAMM", tmp_path / "run", "--dry_run"))
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "FedAMM with small_cnn" in printed.out
    assert re.search(r"^classes per client: \d to \d$", printed.out, re.MULTILINE)
    assert re.search(r"a round: 2 clients, 1 local epochs; clients receive 1\.\d\d MB and send 1\.\d\d MB", printed.out)
    assert re.search(r"round: \d+\.\d\d s \(train .* s, meta .* s, evaluate .* s\).*; 5 rounds: 0:00:\d\d", printed.out)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_touches_no_folder(command: Any, fedavg_run: Path, tmp_path: Path) -> None:
    loggers = [{"class_path": "pytorch_lightning.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path / "log")}}]
    (tmp_path / "loggers.yaml").write_text(yaml.safe_dump({"logger": loggers}))
    shutil.copytree(fedavg_run, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with lock_folder(tmp_path / "run"):  # of a run in progress, and with other options
        options = ["--config", str(tmp_path / "loggers.yaml"), "--algorithm.lr", "0.1", "--dry_run"]
        before[tmp_path / "run"] = (tmp_path / "run").stat().st_mtime_ns
        main(command("FedAvg", tmp_path / "run", *options))
        after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if not path.name.startswith(".lock")}
    assert after == {path: time for path, time in before.items() if not path.name.startswith(".lock")}


def test_a_client_that_fails_in_a_dry_run_is_one_line(
    command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(command("FedAvg", tmp_path, "--algorithm", f"{__name__}.Failing", "--dry_run"))
    printed = capsys.readouterr()
    assert stop.value.code == 1
    assert printed.err.startswith("fedamm: error: ")
    assert "no luck" in printed.err
    assert printed.err.count("\n") == 1


# On a terminal


def on_a_terminal(arguments: list[str], folder: Path) -> tuple[int, str]:
    """Run a command with a terminal as its standard output and error; return its exit status and what it showed."""
    terminal, child_end = pty.openpty()
    fcntl.ioctl(child_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 140, 0, 0))  # rows, columns
    environment = {
        name: value for name, value in os.environ.items() if name != "COLUMNS"
    }  # it would hide the terminal's
    with subprocess.Popen(arguments, cwd=folder, stdout=child_end, stderr=child_end, env=environment) as child:
        os.close(child_end)
        shown = b""
        while chunk := read_until_closed(terminal):
            shown += chunk
    os.close(terminal)
    return child.returncode, shown.decode()


def read_until_closed(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux ends so when the last process has closed its end
        return b""


def test_on_a_terminal_a_bar_moves(command: Any, tmp_path: Path) -> None:
    arguments = [str(ROOT / "orchestrate.py"), *command("FedAMM", tmp_path / "run")]
    status, shown = on_a_terminal([sys.executable, *arguments], tmp_path)
    assert status == 0, shown
    *_, last = re.findall(r"\r[^\r\n]*round[^\r\n]*", shown)
    assert re.search(r"5/5 .*<00:00, all \d+% many \d+% medium \d+% few \d+% loss \d\.\d\d [\d,]+ examples/s", last)
    assert len(last.strip()) < 110
    assert re.search(r"client 1/2", shown)
    assert not re.search(r"^round \d/5", shown, re.MULTILINE)
    assert_table_of(shown, tmp_path / "run")
    assert "Warning" not in shown
    command_line = json.loads((tmp_path / "run/summary.json").read_text())["command"]
    assert shlex.split(command_line) == ["python", *arguments]


# By import path


class OwnNet(nn.Sequential):
    """A network for any images, not registered by name."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, 8, 3, stride=2, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, num_classes),
        )


class OwnData(FederatedDataModule):
    """Two classes of grey images, dark and bright, with an option of its own.

    Args:
        images_per_class: Images of each class, for training and for testing.
        options: Those of every data module.
    """

    def __init__(self, images_per_class: int = 30, **options: Any) -> None:
        super().__init__(**options)
        self.images_per_class = images_per_class

    def load_images(self) -> ImageData:
        labels = torch.arange(2).repeat_interleave(self.images_per_class)
        images = (200 * labels).to(torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8).contiguous()
        return ImageData(images, labels, images, labels, ["dark", "bright"])


class UnweightedSum(FedAvg):
    """FedAvg with another loss, by one overridden hook."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        losses = example_losses(self(images), labels)
        self.track(len(labels), loss=losses.sum())
        return losses.sum()


class Failing(FedAvg):
    """Fails in each client."""

    def on_train_start(self) -> None:
        raise RuntimeError("no luck")


def test_own_network_in_the_working_folder_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Any
) -> None:
    (tmp_path / "network_beside_me.py").write_text(
        "from torch import nn\n\n\ndef build(num_classes, in_channels):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * 144, num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    main(command("FedAvg", "run", "--algorithm.model", "network_beside_me.build", "--federation.num_rounds", "1"))
    assert (tmp_path / "run/final.ckpt").exists()


def test_an_own_network_comes_in_by_import_path(command: Any, tmp_path: Path) -> None:
    main(command("FedAMM", tmp_path, "--algorithm.model", f"{__name__}.OwnNet", "--federation.num_rounds", "1"))
    assert json.loads((tmp_path / "summary.json").read_text())["model"] == f"{__name__}.OwnNet"
    with pytest.raises(ValueError, match="pass the network as `model`, or `trust_model=True`"):
        FedAMM.load_from_checkpoint(tmp_path / "final.ckpt")
    module = FedAMM.load_from_checkpoint(tmp_path / "final.ckpt", weights_only=True, trust_model=True)
    assert isinstance(module.model, OwnNet)


def test_an_own_network_with_options_of_its_own_comes_in_by_class_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: Any
) -> None:
    network = {"class_path": f"{__name__}.OwnNet", "init_args": {"num_classes": 6, "in_channels": 3}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"algorithm": {"init_args": {"model": network}}}))
    main([*command("FedAvg", tmp_path / "run", "--federation.num_rounds", "1"), "--config", str(tmp_path / "own.yaml")])
    assert "FedAvg with OwnNet (" in capsys.readouterr().out
    kept = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert kept["algorithm"]["init_args"]["model"] == network


def test_an_own_algorithm_comes_in_by_import_path(command: Any, tmp_path: Path) -> None:
    main(command("FedAvg", tmp_path, "--algorithm", f"{__name__}.UnweightedSum", "--federation.num_rounds", "1"))
    content = json.loads((tmp_path / "summary.json").read_text())
    assert (content["method"], content["model"]) == ("UnweightedSum", "small_cnn")


def test_an_own_data_module_comes_in_by_class_path(tmp_path: Path) -> None:
    config = {
        "data": {
            "class_path": f"{__name__}.OwnData",
            "init_args": {"images_per_class": 25, "num_clients": 3, "num_meta_per_class": 5, "imbalance_factor": 0.5},
        },
        "algorithm": {"class_path": "FedAvg", "init_args": {"model": f"{__name__}.OwnNet"}},
        "federation": {"num_rounds": 1, "local_epochs": 1},
        "trainer": {"accelerator": "cpu"},
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    main(["--config", str(tmp_path / "own.yaml"), "--output.dir", str(tmp_path / "run")])
    assert json.loads((tmp_path / "run/summary.json").read_text())["class_counts"] == [20, 10]
    module = FedAvg.load_from_checkpoint(tmp_path / "run/final.ckpt", trust_model=True)
    assert module.info["class_names"] == ["dark", "bright"]
    assert module.hparams["in_channels"] == 1


def test_an_option_of_an_own_data_module_guards_its_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", f"{__name__}.OwnData", "--data.num_clients", "2", "--data.num_meta_per_class", "5"]
    options += ["--data.imbalance_factor", "1", "--algorithm", "FedAvg", "--algorithm.model", f"{__name__}.OwnNet"]
    options += ["--federation.num_rounds", "0", "--trainer.accelerator", "cpu", "--output.dir", str(tmp_path)]
    main(options)
    with pytest.raises(SystemExit) as stop:
        main([*options, "--data.images_per_class", "25"])
    assert stop.value.code == 2
    assert "data.images_per_class is 25 but was 30" in capsys.readouterr().err


def test_a_list_of_loggers_replaces_tensorboard(command: Any, tmp_path: Path) -> None:
    loggers = [
        {"class_path": "pytorch_lightning.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path), "name": name}}
        for name in ("first", "second")
    ]
    (tmp_path / "loggers.yaml").write_text(yaml.safe_dump({"logger": loggers}))
    run = tmp_path / "run"
    main([*command("FedAMM", run, "--federation.num_rounds", "2"), "--config", str(tmp_path / "loggers.yaml")])
    with (run / "metrics.csv").open() as file:
        expected = [float(row["test/acc"]) for row in csv.DictReader(file)]
    for name in ("first", "second"):
        with (tmp_path / name / "version_0/metrics.csv").open() as file:
            logged = [float(row["test/acc"]) for row in csv.DictReader(file) if row["test/acc"]]
        assert logged == expected
        hyperparameters = yaml.safe_load((tmp_path / name / "version_0/hparams.yaml").read_text())
        assert hyperparameters["algorithm.lr"] == 0.05
    assert not list(run.glob("events.*"))
