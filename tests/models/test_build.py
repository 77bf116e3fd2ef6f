"""Builders of networks: found by an import path, called as their signature says, and what they raise in one line."""

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedamm_pl.models import build_model, logits_of

MINE = """
import functools
from torch import nn


def named(in_channels, num_classes):
    return nn.Linear(in_channels, num_classes)


def any_name(pretrained=False, **kwargs):
    assert pretrained is False
    return nn.Linear(1, kwargs.pop("num_classes"), **kwargs)


def classes_alone(num_classes):
    return nn.Linear(1, num_classes)


def by_position(classes, channels):
    return nn.Linear(channels, classes)


def by_position_and_any_name(classes, channels, **kwargs):
    return nn.Linear(channels, classes, **kwargs)


def half_by_name(n, in_channels):
    return nn.Linear(in_channels, n)


def keyword_only(*, num_classes, in_channels):
    return nn.Linear(in_channels, num_classes)


@functools.wraps(named)
def wrapped(*args, **kwargs):
    return named(*args, **kwargs)


def pretrained_first(pretrained=False, progress=True):
    raise AssertionError("called")


def weights_first(weights=None, channels=3):
    raise AssertionError("called")


def swapped(in_channels, classes):
    raise AssertionError("called")


def three(a, b, c):
    raise AssertionError("called")


def asks_for_weights(num_classes, in_channels):
    raise OSError("weights.pth\\nnot found")


def looks_up(num_classes, in_channels):
    return {"resnet": 1}[num_classes]


def calls_wrongly(num_classes, in_channels):
    return nn.Linear(num_classes)


def no_network(num_classes, in_channels):
    return "network"


constant = 3
"""


@pytest.fixture(autouse=True)
def _mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "builders_of_mine.py").write_text(MINE)
    (tmp_path / "broken_builders.py").write_text("from torch import nn\n\nNETS = {}['small']\n")
    (tmp_path / "misspelt_builders.py").write_text("def net(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("builders_of_mine", "broken_builders", "misspelt_builders"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize(
    ("name", "in_features"),
    [
        ("named", 2),
        ("any_name", 1),
        ("classes_alone", 1),
        ("by_position", 2),
        ("by_position_and_any_name", 2),
        ("half_by_name", 2),
        ("keyword_only", 2),
        ("wrapped", 2),
    ],
)
def test_a_builder_is_called_as_its_signature_says(name: str, in_features: int) -> None:
    network = build_model(f"builders_of_mine.{name}", 5, 2)
    assert (network.out_features, network.in_features) == (5, in_features)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("pretrained_first", "has no num_classes, which would be taken for pretrained"),
        ("weights_first", "has no num_classes, which would be taken for weights"),
        ("swapped", "multiple values for argument 'in_channels'"),
        ("three", "missing a required argument: 'c'"),
        ("constant", "it is a int"),
    ],
)
def test_a_builder_that_cannot_be_called_so_is_not_called(name: str, problem: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^Expected `model` to be one of .* which cannot be called like this \(.*{problem}"
    ):
        build_model(f"builders_of_mine.{name}", 5, 2)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("asks_for_weights", "OSError: weights.pth not found"),
        ("looks_up", "KeyError: 5"),
        ("calls_wrongly", r"TypeError: .*missing 1 required positional argument: 'out_features'"),
    ],
)
def test_what_a_builder_raises_is_said_with_its_place(name: str, problem: str, tmp_path: Path) -> None:
    line = next(n for n, text in enumerate(MINE.splitlines(), 1) if f"def {name}(" in text) + 1
    place = re.escape(f"({tmp_path / 'builders_of_mine.py'}:{line}).")
    with pytest.raises(
        ValueError, match=rf"^Expected `model` to build a network, got '.*', which raises {problem} {place}$"
    ):
        build_model(f"builders_of_mine.{name}", 5, 2)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("broken_builders.NETS", r"raises KeyError: 'small' \(.*broken_builders\.py:3\)"),
        ("misspelt_builders.net", "SyntaxError"),
    ],
)
def test_what_an_import_raises_is_said(name: str, problem: str) -> None:
    with pytest.raises(ValueError, match=rf"^Expected `model` to be one of .*{problem}"):
        build_model(name, 5, 2)


# torchvision


@pytest.fixture
def _no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", lambda *_, **__: pytest.fail("asked for weights"))


@pytest.mark.usefixtures("_no_download")
@pytest.mark.filterwarnings("ignore:The default weight initialization")  # of GoogLeNet and Inception
@pytest.mark.parametrize(
    ("name", "size", "train_size"),
    [("resnet18", 32, 32), ("mobilenet_v3_small", 32, 32), ("googlenet", 64, 224), ("vit_b_16", 224, 224)],
)
def test_networks_of_torchvision_are_built_by_name(name: str, size: int, train_size: int) -> None:
    with torch.device("meta"):
        network = build_model(f"torchvision.models.{name}", 7, 3)
        assert logits_of(network.eval()(torch.zeros(1, 3, size, size))).shape == (1, 7)
        assert logits_of(network.train()(torch.zeros(2, 3, train_size, train_size))).shape == (2, 7)


@pytest.mark.slow
@pytest.mark.usefixtures("_no_download")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_all_classifiers_of_torchvision_are_built_by_name() -> None:
    models: Any = pytest.importorskip("torchvision.models")
    for name in models.list_models(module=models):
        if name.startswith("regnet"):  # draw their weights in NumPy's way, which needs memory
            assert "num_classes" not in inspect.signature(models.get_model_builder(name)).parameters
            continue
        size = 299 if name == "inception_v3" else 224
        with torch.device("meta"):
            network: nn.Module = build_model(f"torchvision.models.{name}", 7, 3)
            assert logits_of(network.eval()(torch.zeros(1, 3, size, size))).shape == (1, 7), name
            assert logits_of(network.train()(torch.zeros(2, 3, size, size))).shape == (2, 7), name
