"""A mistake of the user ends in one line that names it, with exit status 2, and damages nothing."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn
from urllib.error import URLError

import numpy as np
import pytest
from torch import Tensor, nn

from fedamm_pl.cli.main import main
from fedamm_pl.data.sources.in_memory import DOWNLOADABLE
from fedamm_pl.federation.trainer import TrainerConfig

NOISE = ("Traceback", "compute_fn", "Parser key", "Namespace", "class 'str'", "NoneType")
ALLOWED_MODELS = "small_cnn, resnet20, resnet32, resnet44, resnet56"

MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "unknown option": (["--nonsense", "3"], ["unknown option", "nonsense"]),
    "misspelt option": (["--federation.num_round", "3"], ["num_round;", "--federation.num_rounds"]),
    "abbreviated option": (["--data.num_client", "3"], ["num_client;", "--data.num_clients"]),
    "option of the other method": (["--algorithm", "FedAvg", "--algorithm.meta_lr", "1"], ["meta_lr"]),
    "stray word": (["stray"], ["stray"]),
    "misspelt class": (["--algorithm", "FedAM"], ["--algorithm", "got FedAM", "FedAMM", "FedAvg"]),
    "class that is no algorithm": (["--algorithm", f"{__name__}.OneChannel"], ["--algorithm", "OneChannel"]),
    "missing class": (["--algorithm", "nowhere.FedNone"], ["--algorithm", "nowhere.FedNone"]),
    "text for a whole number": (
        ["--federation.num_rounds", "many"],
        ["--federation.num_rounds", "int", "got many"],
    ),
    "fraction for a whole number": (["--data.num_clients", "2.5"], ["--data.num_clients", "int", "got 2.5"]),
    "text for a number": (["--algorithm.lr", "fast"], ["--algorithm.lr", "float", "got fast"]),
    "unknown choice": (["--data.partition", "by_magic"], ["--data.partition", "got by_magic", "by_num_classes", "iid"]),
    "imbalance factor 0": (["--data.imbalance_factor", "0"], ["--data.imbalance_factor", "(0, 1]", "got 0.0"]),
    "imbalance factor 2": (["--data.imbalance_factor", "2"], ["--data.imbalance_factor", "(0, 1]", "got 2.0"]),
    "more clients than images": (["--data.num_clients", "1000"], ["--data.num_clients", "at most", "136", "got 1000"]),
    "no client": (["--data.num_clients", "0"], ["--data.num_clients", "1 or more", "got 0"]),
    "no client in a round": (
        ["--federation.client_fraction", "0"],
        ["--federation.client_fraction", "(0, 1]", "got 0.0"],
    ),
    "negative rounds": (["--federation.num_rounds", "-1"], ["--federation.num_rounds", "0 or more", "got -1"]),
    "no local epoch": (["--federation.local_epochs", "0"], ["--federation.local_epochs", "1 or more", "got 0"]),
    "negative seed": (["--seed", "-1"], ["--seed", "0 to 4294967295", "got -1"]),
    "learning rate 0": (["--algorithm.lr", "0"], ["--algorithm.lr", "above 0", "got 0.0"]),
    "no checkpoint to keep": (["--output.keep_checkpoints", "0"], ["--output.keep_checkpoints", "1 or more", "got 0"]),
    "no meta set for FedAMM": (
        ["--data.num_meta_per_class", "0"],
        ["--data.num_meta_per_class", "1 or more", "FedAMM", "got 0"],
    ),
    "meta set larger than a class": (
        ["--data.num_meta_per_class", "60"],
        ["--data.num_meta_per_class", "61", "got 60"],
    ),
    "loss scaling": (
        ["--trainer.precision", "16-mixed"],
        ["--trainer.precision", "got 16-mixed", "32-true", "bf16-mixed"],
    ),
    "alpha without a partition": (
        # six classes, each at one client: four of ten clients are left with nothing
        ["--data.partition", "by_dirichlet", "--data.dirichlet_alpha", "0.0001", "--data.num_clients", "10"],
        ["--data.dirichlet_alpha", "--data.min_client_size", "0.0001", "raise"],
    ),
    "unknown model": (["--algorithm.model", "resnet33"], ["--algorithm.model", ALLOWED_MODELS, "'resnet33'"]),
    "unknown module of a model": (["--algorithm.model", "nowhere.Net"], ["--algorithm.model", "'nowhere.Net'"]),
    "unknown attribute of a model": (
        ["--algorithm.model", f"{__name__}.Net"],
        ["--algorithm.model", f"{__name__}.Net"],
    ),
    "network for other channels": (
        ["--algorithm.model", f"{__name__}.OneChannel"],
        ["--algorithm.model", "OneChannel", "(3, 12, 12)"],
    ),
    "network for other classes": (
        ["--algorithm.model", f"{__name__}.TwoClasses"],
        ["--algorithm.model", "TwoClasses", "(B, 6)", "(1, 2)"],
    ),
    "network that returns a pair": (
        ["--algorithm.model", f"{__name__}.Pair"],
        ["--algorithm.model", "logits", "tuple of float32 (1, 6), float32 (1, 6)"],
    ),
    "network for other sizes": (
        ["--algorithm.model", f"{__name__}.Asserts"],
        ["--algorithm.model", "(3, 12, 12)", "Asserts", "AssertionError: Wrong image height!", "test_user_errors.py:"],
    ),
    "network of torchvision for other sizes": (
        ["--algorithm.model", "torchvision.models.squeezenet1_0"],
        ["--algorithm.model", "(3, 12, 12)", "squeezenet1_0", "RuntimeError"],
    ),
    "network that fails in training": (
        ["--algorithm.model", f"{__name__}.FailsInTraining"],
        ["--algorithm.model", "train on", "IndexError: no such layer", "test_user_errors.py:"],
    ),
    "weights that are missing": (
        ["--algorithm.model", f"{__name__}.without_weights"],
        ["--algorithm.model", "without_weights", "OSError: weights.pth not found", "test_user_errors.py:"],
    ),
    "builder that looks up what is not there": (
        ["--algorithm.model", f"{__name__}.looks_up"],
        ["--algorithm.model", "looks_up", "KeyError: 6", "test_user_errors.py:"],
    ),
    "number of classes where weights are asked for": (
        ["--algorithm.model", f"{__name__}.pretrained_first"],
        ["--algorithm.model", "pretrained_first", "cannot be called like this", "taken for pretrained"],
    ),
    "table as data": (["--data", "skin.csv"], ["; for a table: --data.root FOLDER --data.dataset skin.csv", "cifar10"]),
    "misspelt data": (["--data", "cifr10"], ["--data.dataset cifr10", "did you mean cifar10?"]),
    "data set without its option": (["--data", "hospitals"], ["for data of this name", "--data.dataset hospitals"]),
    "class of data that is missing": (["--data", "nowhere.Data"], ["import path of your own", "nowhere.Data"]),
    "name of a configuration": (["quickstart"], ["quickstart is a configuration: fedamm --config quickstart"]),
    "name of a shipped method": (["scaffold"], ["scaffold is a configuration: --method scaffold"]),
    "file of a configuration": (["mine.yaml"], ["mine.yaml is a configuration: --config mine.yaml"]),
    "misspelt configuration": (
        ["--config", "quickstrat"],
        ["got quickstrat and no such file; did you mean quickstart?"],
    ),
    "misspelt file of a configuration": (["--config=configs/quikstart.yaml"], ["did you mean quickstart?"]),
    "data as a configuration": (["--config", "cifar10"], ["cifar10 is a configuration: --data cifar10"]),
    "unknown data set": (["--data.dataset", "nothing"], ["--data.dataset", "cifar10", "nothing.npz", "'nothing'"]),
    "missing configuration": (["--config", "nowhere.yaml"], ["--config", "nowhere.yaml", "quickstart"]),
    "folder as configuration": (["--config", "run"], ["--config", "run"]),
    "word for loggers": (["--logger", "loud"], ["Expected --logger to be bool or list[Logger], got loud"]),
    "misspelt logger": (["--logger+=CSVLoger"], ["Expected --logger to be list[Logger] or bool, got CSVLoger"]),
    "word for a number or none": (
        ["--federation.max_update_norm", "much"],
        ["Expected --federation.max_update_norm to be float or null, got much"],
    ),
}
CONFIGURATIONS = {
    "misspelt key of the data": ("data:\n  imbalance_facto: 0.1\n", ["imbalance_facto;", "--data.imbalance_factor"]),
    "misspelt key of the federation": ("federation:\n  num_round: 3\n", ["num_round;", "--federation.num_rounds"]),
    "misspelt group": ("federatoin:\n  num_rounds: 3\n", ["federatoin"]),
    "wrong type": ("federation:\n  num_rounds: many\n", ["--federation.num_rounds", "int", "got many"]),
    "no YAML": ("seed: [0\ndata: {\n", ["mistaken.yaml"]),
    "no mapping": ("just words\n", ["mistaken.yaml"]),
    "empty": ("", ["mistaken.yaml"]),
}


class OneChannel(nn.Sequential):
    """Takes grey images whatever it is asked for."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))


class TwoClasses(nn.Sequential):
    """Knows two classes whatever it is asked for."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channels, 2))


class Pair(TwoClasses):
    """Returns its logits twice."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__(num_classes, in_channels)
        self[2] = nn.Linear(in_channels, num_classes)

    def forward(self, images: Tensor) -> Any:
        logits = super().forward(images)
        return logits, logits


class Asserts(Pair):
    """Takes images of one size alone."""

    def forward(self, images: Tensor) -> Any:
        if images.shape[-1] != 224:
            raise AssertionError("Wrong image height!\nExpected 224")


class FailsInTraining(Pair):
    """Fails in training mode alone."""

    def forward(self, images: Tensor) -> Any:
        if self.training:
            raise IndexError("no such layer")
        return super().forward(images)[0]


def without_weights(num_classes: int, in_channels: int) -> nn.Module:
    raise OSError("weights.pth not found")


def looks_up(num_classes: int, in_channels: int) -> nn.Module:
    return {1: nn.Flatten()}[num_classes]


def pretrained_first(pretrained: bool = False, progress: bool = True) -> nn.Module:
    raise URLError("asked for weights")


def snapshot(folder: Path) -> dict[Path, bytes | None]:
    """Return every path below a folder with its content; None for folders."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def refuse(
    tmp_path: Path,
    fedamm_run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[list[str]], str]:
    """Run the program beside a finished run of FedAMM, ``run``: it must refuse, in one line, which is returned."""
    monkeypatch.chdir(tmp_path)  # where runs/ would appear
    shutil.copytree(fedamm_run, tmp_path / "run")

    def refuse(arguments: list[str]) -> str:
        before = snapshot(tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        printed = capsys.readouterr()
        assert stop.value.code == 2
        assert printed.out == ""
        lines = printed.err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("fedamm: error: ")
        assert not [noise for noise in NOISE if noise in lines[0]], lines[0]
        assert snapshot(tmp_path) == before
        return lines[0]

    return refuse


def assert_names(line: str, parts: list[str]) -> None:
    assert not [part for part in parts if part not in line], line


@pytest.mark.parametrize("folder", ["run", "new"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_an_option_is_refused(mistake: str, folder: str, refuse: Any, command: Any) -> None:
    options, parts = MISTAKES[mistake]
    assert_names(refuse([*command("FedAMM", folder), *options]), parts)


@pytest.mark.parametrize("mistake", CONFIGURATIONS)
def test_a_configuration_is_refused(mistake: str, refuse: Any, command: Any) -> None:
    text, parts = CONFIGURATIONS[mistake]
    Path("mistaken.yaml").write_text(text)
    assert_names(refuse([*command("FedAMM", "run"), "--config", "mistaken.yaml"]), parts)


def test_a_process_ends_with_status_2_and_one_line(command: Any, tmp_path: Path) -> None:
    arguments = command("FedAMM", tmp_path / "run", "--data.imbalance_factor", "2")
    program = [sys.executable, str(Path(__file__).parent.parent.parent / "orchestrate.py")]
    child = subprocess.run([*program, *arguments], capture_output=True, text=True, check=False)
    assert (child.returncode, child.stdout) == (2, "")
    assert child.stderr == "fedamm: error: Expected --data.imbalance_factor to be in (0, 1], got 2.0.\n"
    assert not (tmp_path / "run").exists()


def test_required_options_are_named(refuse: Any) -> None:
    assert refuse([]) == (
        "fedamm: error: required, but not given: --algorithm, --federation.num_rounds; start with: fedamm --config quickstart; "
        "help: fedamm --help"
    )
    assert refuse(["--algorithm", "FedAvg"]) == "fedamm: error: required, but not given: --federation.num_rounds"


# Data


def test_missing_data_without_network_name_three_ways(
    refuse: Any, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(root: Path, train: bool, download: bool) -> NoReturn:
        raise URLError("no route to host") if download else RuntimeError("Dataset not found")

    monkeypatch.setitem(DOWNLOADABLE, "cifar10", offline)
    line = refuse(command("FedAMM", "run", "--data.dataset", "cifar10", "--data.root", "here"))
    assert_names(line, ["cifar10", "--data.root", "here", "no route to host", "network", "copy", "cifar10.npz"])


@pytest.mark.parametrize("root", ["data", "new/data", "run"])
def test_a_download_that_fails_leaves_no_folder(
    root: str, refuse: Any, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(folder: Path, train: bool, download: bool) -> NoReturn:
        if download:
            (folder / "Offline/raw").mkdir(parents=True, exist_ok=True)  # as torchvision does
            raise URLError("no route to host")
        raise RuntimeError("Dataset not found")

    offline.__name__ = "Offline"
    monkeypatch.setitem(DOWNLOADABLE, "fashion_mnist", offline)
    line = refuse(command("FedAMM", "run", "--data.dataset", "fashion_mnist", "--data.root", root, "--dry_run"))
    assert_names(line, ["got neither", "no route to host"])


def test_a_table_that_is_named_with_its_folder(refuse: Any, command: Any) -> None:
    Path("mine").mkdir()
    Path("mine/skin.csv").write_text("a,label\n1,x\n")
    line = refuse(command("FedAvg", "new", "--data.dataset", "mine/skin.csv", "--data.root", "data"))
    assert_names(line, ["data/mine/skin.csv", "for mine/skin.csv, give --data.dataset skin.csv and --data.root mine"])


def test_columns_of_words_are_offered_for_the_clients(refuse: Any, command: Any) -> None:
    Path("skin.csv").write_text("a,hospital,label,sex\n1,north,x,f\n2,south,y,m\n")
    words = command("FedAvg", "new", "--data.dataset", "skin.csv", "--data.root", ".", "--data.partition", "by_client")
    assert refuse(words).endswith("options of their own; for its clients: --data.client_column hospital or sex.")
    assert refuse([*words, "--data.client_column", "hospital"]).endswith("options of their own.")


@pytest.mark.parametrize("damage", ["truncated", "one byte differs", "empty", "text"])
def test_a_corrupt_npz_is_named(damage: str, refuse: Any, command: Any, data_root: Path) -> None:
    content = bytearray((data_root / "tiny.npz").read_bytes())
    content[3000] ^= 255
    contents = {"truncated": content[:5000], "one byte differs": content, "empty": b"", "text": b"no archive at all"}
    Path("corrupt.npz").write_bytes(contents[damage])
    line = refuse(command("FedAMM", "run", "--data.dataset", "corrupt", "--data.root", "."))
    assert_names(line, ["corrupt.npz", "npz file"])


def test_an_npz_without_labels_is_named(refuse: Any, command: Any, data_root: Path) -> None:
    with np.load(data_root / "tiny.npz") as archive:
        np.savez("unlabelled.npz", x_train=archive["x_train"], x_test=archive["x_test"])
    line = refuse(command("FedAMM", "run", "--data.dataset", "unlabelled", "--data.root", "."))
    assert_names(line, ["unlabelled.npz", "y_train", "got x_train, x_test"])


# The run directory


@pytest.mark.parametrize("folder", ["file", "file/run"])
def test_an_output_folder_that_cannot_be_is_named(folder: str, refuse: Any, command: Any) -> None:
    Path("file").touch()
    assert_names(refuse(command("FedAMM", folder)), ["--output.dir", "folder that can be written", f"got {folder} "])


def test_a_run_is_not_continued_by_another_method(refuse: Any, fedavg_run: Path) -> None:
    line = refuse(["--config", str(fedavg_run / "config.yaml"), "--output.dir", "run"])
    assert_names(line, ["--output.dir run", "algorithm is 'FedAvg' but was 'FedAMM'"])


@pytest.mark.parametrize(
    ("option", "value", "difference"),
    [
        ("--seed", "1", "seed is 1 but was 0"),
        ("--algorithm.lr", "0.1", "algorithm.lr is 0.1 but was 0.05"),
        ("--data.batch_size", "9", "data.batch_size is 9 but was 8"),
        ("--federation.local_epochs", "2", "federation.local_epochs is 2 but was 1"),
        (
            "--trainer.precision",
            "64-true",
            "trainer.precision is '64-true' but was '" + TrainerConfig("cpu").resolved_precision,
        ),
    ],
)
def test_a_run_is_not_continued_by_other_options(
    option: str, value: str, difference: str, refuse: Any, command: Any
) -> None:
    assert_names(refuse(command("FedAMM", "run", option, value)), ["--output.dir run", difference])


def test_fewer_rounds_than_a_run_has_are_refused(refuse: Any, command: Any) -> None:
    line = refuse(command("FedAMM", "run", "--federation.num_rounds", "3"))
    assert_names(line, ["--federation.num_rounds", "5", "got 3"])


def test_a_truncated_checkpoint_alone_is_refused(refuse: Any, command: Any) -> None:
    *others, newest = sorted(Path("run/checkpoints").iterdir())
    for path in others:
        path.unlink()
    newest.write_bytes(newest.read_bytes()[:1000])
    assert_names(refuse(command("FedAMM", "run")), ["run/checkpoints", "intact checkpoint", "--output.dir"])


BROKEN = {
    "exits.py": "raise SystemExit('bye')",
    "divides.py": "1 / 0",
    "made.py": """
from fedamm_pl import FedAvg
class Own(FedAvg):
    def __init__(self, num_classes: int, in_channels: int, model: str = "small_cnn"):
        raise RuntimeError("no\\nluck")
""",
}


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--algorithm", "exits.Own"], ["SystemExit: bye", "exits.py, line 1"]),
        (["--algorithm", "divides.Own"], ["ZeroDivisionError: division by zero", "divides.py, line 1"]),
        (["--algorithm", "made.Own"], ["RuntimeError: no luck", "made.py, line 5"]),
        (["--algorithm.help", "exits.Own"], ["--algorithm", "exits.Own (SystemExit: bye)"]),
        (["--data.help", "divides.Own"], ["--data", "divides.Own (ZeroDivisionError: division by zero)"]),
    ],
)
def test_whatever_a_class_of_ones_own_raises_is_one_line(
    words: list[str],
    parts: list[str],
    command: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, text in BROKEN.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([*command("FedAvg", tmp_path / "run"), *words])
    printed = capsys.readouterr()
    assert (stop.value.code, printed.out, printed.err.count("\n")) == (2, "", 1)
    assert printed.err.startswith("fedamm: error: ")
    for part in parts:
        assert part in printed.err


def test_whatever_a_class_of_a_comparison_raises_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "made.py").write_text(BROKEN["made.py"])
    (tmp_path / "table.yaml").write_text("methods: {made.Own: }\nbase: {federation: {num_rounds: 1}}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit):
        main(["compare", "--config", "table.yaml"])
    assert capsys.readouterr().err.startswith("fedamm: error: made.Own: RuntimeError: no luck (")
