"""Logits are taken out of what networks return where it is clear, and refused by name where it is not."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedamm_pl.models import classifier_of, complete_lazy_layers, features_and_logits, logits_of

LOGITS, FEATURES, MAP = torch.ones(2, 3), torch.ones(2, 5), torch.ones(2, 4, 8, 8)
Named = namedtuple("Named", ["logits", "aux_logits2", "aux_logits1"])  # as torchvision's


@dataclass
class Output:
    loss: Any
    logits: Any


class LikeADict(OrderedDict[str, Any]):
    @property
    def logits(self) -> Any:
        return self["logits"]


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        (LOGITS,),
        [LOGITS],
        (LOGITS, None),
        (LOGITS, MAP, torch.ones(()), {"more": 1}),
        (torch.zeros(2, 3, dtype=torch.int64), LOGITS),
        {"logits": LOGITS},
        {"logits": LOGITS, "features": FEATURES},
        {"out": LOGITS, "map": MAP},
        Named(LOGITS, FEATURES, FEATURES),
        Output(None, LOGITS),
        SimpleNamespace(logits=LOGITS),
        LikeADict(loss=torch.ones(()), logits=LOGITS, hidden_states=FEATURES),
    ],
)
def test_logits_are_found(output: Any) -> None:
    assert logits_of(output) is LOGITS


@pytest.mark.parametrize(
    ("output", "described"),
    [
        ((LOGITS, FEATURES), r"tuple of float32 \(2, 3\), float32 \(2, 5\)"),
        ((LOGITS, LOGITS), r"tuple of float32 \(2, 3\), float32 \(2, 3\)"),
        ({"a": LOGITS, "b": LOGITS}, r"dict of float32 \(2, 3\), float32 \(2, 3\)"),
        ((MAP,), r"tuple of float32 \(2, 4, 8, 8\)"),
        ({"logits": "text"}, "dict of str"),
        (Output(None, "text"), "Output"),
        ((None,) * 9, "tuple of NoneType, NoneType, NoneType, NoneType, NoneType, ..."),
        ((), "tuple"),
        ({}, "dict"),
        (None, "NoneType"),
        ("text", "str"),
    ],
)
def test_what_is_not_clear_is_refused_by_what_came_back(output: Any, described: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^Expected `model` to return logits of shape \(B, C\), .* got {described}\.$"
    ):
        logits_of(output)


# The linear layer that gives the logits


class Net(nn.Module):
    """Registers its layers in the order of their names."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


class AuxLast(Net):
    """Uses an auxiliary head in training alone, and registers it last."""

    def __init__(self) -> None:
        super().__init__(body=nn.Linear(64, 6), head=nn.Linear(6, 3), aux=nn.Linear(6, 3))

    def forward(self, images: Tensor) -> Any:
        hidden = self.body(images.flatten(1))
        return (self.head(hidden), self.aux(hidden)[:, :, None]) if self.training else self.head(hidden)


class HeadFirst(Net):
    """Registers its head before its body."""

    def __init__(self) -> None:
        super().__init__(head=nn.Linear(6, 3), body=nn.Linear(64, 6))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.body(images.flatten(1)))}


class AuxAfterwards(AuxLast):
    """Calls its auxiliary head after its head."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        hidden = self.body(images.flatten(1))
        return {"logits": self.head(input=hidden), "aux": self.aux(hidden)}


class Twice(Net):
    """Uses one linear layer twice."""

    def __init__(self) -> None:
        super().__init__(body=nn.Linear(64, 3), head=nn.Linear(3, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.head(self.body(images.flatten(1))).relu())


class Scaled(HeadFirst):
    """Scales what its head gives."""

    def forward(self, images: Tensor) -> Any:
        return 2 * super().forward(images)["logits"]


class Alias(HeadFirst):
    """Has its head under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.same = self.head


class Tied(HeadFirst):
    """Ties the weights of its head to another layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(6, 3)
        self.other.weight = self.head.weight


IMAGES = torch.linspace(-1, 1, 2 * 64).view(2, 1, 8, 8)


@pytest.mark.parametrize(
    ("network", "name"),
    [
        (AuxLast, "head"),
        (HeadFirst, "head"),
        (AuxAfterwards, "head"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Linear(6, 3)), "2"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Flatten()), "1"),
        (lambda: nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(64, 3))), "1"),
    ],
)
def test_the_classifier_is_found_by_what_runs(network: Any, name: str) -> None:
    model = network()
    assert classifier_of(model, IMAGES[:1], 3) == name
    model.eval()
    features, logits = features_and_logits(model, IMAGES)
    torch.testing.assert_close(model.get_submodule(name)(features), logits)
    assert torch.equal(logits, logits_of(model(IMAGES)))


def test_features_of_training_are_those_of_the_head_not_of_the_auxiliary_one() -> None:
    model = AuxAfterwards()
    model.aux = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    features, logits = features_and_logits(model, IMAGES)
    assert torch.equal(features, model.body(IMAGES.flatten(1)))
    assert torch.equal(logits, model.head(features))


def test_of_a_layer_that_is_called_twice_the_features_are_those_of_the_last_call() -> None:
    model = Twice()
    features, logits = features_and_logits(model, IMAGES)
    assert torch.equal(model.head(features), logits)


@pytest.mark.parametrize(
    ("network", "problem"),
    [
        (Twice, "for nothing else, got Twice, which uses head more than once"),
        (Alias, "for nothing else, got Alias, which uses head under other names too: same"),
        (Tied, r"for nothing else, got Tied, which uses head under other names too: .*other\.weight"),
        (
            Scaled,
            r"to return the output of a linear layer, got Scaled, whose logits .* \(its linear layers: head, body\)",
        ),
        (
            lambda: nn.Sequential(nn.Conv2d(1, 3, 8), nn.Flatten()),
            "to return the output of a linear layer, got Sequential, whose logits come without one",
        ),
    ],
)
def test_a_network_without_a_classifier_of_its_own_is_refused_by_name(network: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=rf"^Expected `model` .*{problem}"):
        classifier_of(network(), IMAGES[:1], 3)


@pytest.mark.parametrize(
    ("network", "found"),
    [(AuxLast, None), (HeadFirst, None), (lambda: nn.Sequential(nn.Linear(64, 6), nn.Linear(6, 3)), "1")],
)
def test_without_an_image_the_classifier_must_be_clear(network: Any, found: str | None) -> None:
    if found is not None:
        assert classifier_of(network(), None, 3) == found
        return
    with pytest.raises(
        ValueError, match=r"Expected `info` to hold image_size, which shows what layer of .* gives its logits"
    ):
        classifier_of(network(), None, 3)


def test_looking_for_the_classifier_changes_nothing() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(64, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    classifier_of(model, IMAGES[:1], 3)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(part.training and not part._forward_hooks for part in model.modules())


# Lazy layers


def test_lazy_layers_take_their_sizes_and_nothing_else_changes() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), nn.LazyConv2d(2, 3), nn.Flatten(), nn.LazyLinear(3))
    model[0].eval()
    complete_lazy_layers(model, IMAGES[:1])
    assert model[3].weight.shape == (3, 72)
    assert [part.training for part in model] == [False, True, True, True]
    assert torch.equal(model[0].running_mean, torch.zeros(1))
    complete_lazy_layers(model, None)  # has none any more


def test_lazy_layers_without_an_image_are_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match=r"`info` to hold image_size for a network with lazy layers.* the size of 1\.weight"
    ):
        complete_lazy_layers(nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), None)
