"""Which options there are, and whose they are."""

from typing import Any

import pytest

from fedamm_pl import FedAMM, FedAvg, FederatedModule, algorithms
from fedamm_pl.cli.options import GROUPS, LINKED, OFFERED, find_class, group_of, imported, options_of
from fedamm_pl.federation.executors import Processes, Sequential


class Outer(FedAvg):
    """Passes on what it does not know."""

    def __init__(self, strength: "float | None" = None, **options: Any) -> None:
        super().__init__(**options)


class Inner(Outer):
    """Takes what its base takes."""


class Closed(FedAvg):
    """Takes one option alone."""

    def __init__(self, num_classes: int, strength: int, info: Any = None) -> None:
        super().__init__(num_classes, lr=strength, info=info)


def test_options_are_those_of_the_class() -> None:
    assert list(options_of(FedAvg)) == ["model", "lr", "momentum", "weight_decay", "local_optimizer", "rho"]
    assert {"meta_lr", *options_of(FedAvg)} <= set(options_of(FedAMM))
    assert options_of(Sequential) == {}
    assert options_of(Processes)["num_workers"].annotation is int


@pytest.mark.parametrize("owner", [Outer, Inner])
def test_options_that_are_passed_on_are_options(owner: type) -> None:
    assert set(options_of(owner)) == {"strength", *options_of(FedAvg)}
    assert options_of(owner)["strength"].annotation == float | None


def test_options_that_are_not_passed_on_are_none() -> None:
    assert list(options_of(Closed)) == ["strength"]


def test_type_that_exists_for_type_checkers_only_is_any() -> None:
    class Typed:
        def __init__(self, name: "Missing", lr: float) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    assert {name: parameter.annotation for name, parameter in options_of(Typed).items()} == {"name": Any, "lr": Any}


def test_what_comes_from_elsewhere_is_no_option() -> None:
    for group, names in LINKED.items():
        for kind in imported(group):
            assert not set(names) & set(options_of(kind))


@pytest.mark.parametrize("group", GROUPS)
def test_class_belongs_to_one_group(group: str) -> None:
    for kind in OFFERED.get(group, [GROUPS[group]]):
        assert group_of(kind) == group


def test_class_is_found_by_name_and_by_import_path() -> None:
    assert find_class("algorithm", "FedAMM") is find_class("algorithm", "fedamm_pl.FedAMM") is FedAMM
    assert find_class("algorithm", "Outer") is find_class("algorithm", f"{__name__}.Outer") is Outer
    assert Outer in imported("algorithm")
    assert Outer not in OFFERED["algorithm"]


@pytest.mark.parametrize(
    "name", ["", ".", "Nothing", "nowhere.Net", "os.path", "os.getcwd", "torch.nn.Linear", "a b", "fedamm_pl."]
)
def test_what_is_no_class_of_the_group_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="^" + name.replace(".", r"\.")):
        find_class("algorithm", name)


def test_base_classes_are_not_offered() -> None:
    names = {kind.__name__ for kind in OFFERED["algorithm"]}
    assert names.isdisjoint({"FederatedModule", "ClassPriorModule"})
    assert all(issubclass(kind, FederatedModule) for kind in OFFERED["algorithm"])
    assert names == set(algorithms.__all__)
