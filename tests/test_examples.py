"""The examples run as they stand, and come to what they say."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_fedamm_in_a_lightning_project() -> None:
    assert example("lightning_project").main() > 0.8


def test_a_table_of_ones_own() -> None:
    found = example("own_table").main()
    assert found["test/acc"] > 0.7
    assert found["test/acc_class_2"] > 0.5


def test_a_method_of_ones_own() -> None:
    found = example("own_method").main()
    assert all(accuracy > 0.5 for accuracy in found.values())
    assert found["Cautious"] != found["FedAvg"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_model_that_is_exported_and_served(capsys: pytest.CaptureFixture[str]) -> None:
    answer = example("export_and_serve").main()
    assert 0.1 < float(answer["probability"]) <= 1  # of ten classes
    assert f"answers {answer}; the image shows {answer['class']}\n" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_checkpoint_that_is_exported_and_served(fedamm_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = example("export_and_serve").main(checkpoint=fedamm_run / "final.ckpt")
    assert f"answers {answer}; the image shows noise\n" in capsys.readouterr().out


def test_every_example_is_in_the_list() -> None:
    text = (EXAMPLES / "README.md").read_text()
    names = {path.name for path in EXAMPLES.iterdir() if path.name not in ("README.md", "__pycache__")}
    assert [name for name in names if f"({name}" not in text] == []
