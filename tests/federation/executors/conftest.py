"""A method whose rounds go as their numbers say, and how it goes with one client after the other."""

import multiprocessing
from collections.abc import Iterator

import pytest

from fedamm_pl.federation.executors import Runner, RunSpec, Sequential
from tests.federation.executors.methods import NUM_CLIENTS, HalfReadable, Scripted
from tests.federation.small import make, spec


@pytest.fixture(scope="class")
def scripted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunSpec:
    """A method whose rounds go as their numbers say."""
    tail = {"num_meta_per_class": 2, "imbalance_factor": 0.2}
    data = HalfReadable("tiny", num_clients=NUM_CLIENTS, partition="iid", batch_size=8, **tail)
    folder = str(tmp_path_factory.mktemp("scripted"))
    method = getattr(request.cls, "method", Scripted)
    return spec(make(method, data, differentiation="forward", folder=folder), data)


@pytest.fixture(scope="class")
def reference(scripted: RunSpec) -> Iterator[Runner]:
    """One client after the other, in this process."""
    with Sequential().open(scripted) as runner:
        yield runner


@pytest.fixture(scope="class")
def runner(request: pytest.FixtureRequest, scripted: RunSpec) -> Iterator[Runner]:
    """One of the class's executor for all its tests: to start it may take seconds."""
    with request.cls().executor().open(scripted) as runner:
        yield runner
    assert multiprocessing.active_children() == []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Compare runs of the methods that the class of an executor names."""
    if {"algorithm", "options"} <= set(metafunc.fixturenames) and hasattr(metafunc.cls, "bits"):
        names = ["-".join([algorithm.__name__, *options]) for algorithm, options in metafunc.cls.bits]
        metafunc.parametrize(("algorithm", "options"), metafunc.cls.bits, ids=names)
