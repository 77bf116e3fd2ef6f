"""A GPU computes what the CPU does. Where there is none, all of this is skipped."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from fedamm_pl import FedAMM, FedAvg, FederatedModule, Orchestrator
from fedamm_pl.federation.executors import Executor, Processes, Ray, Vectorized
from fedamm_pl.federation.executors import cluster as clusters
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.protocol.messages import State
from tests.algorithms.test_methods import METHODS, Method
from tests.federation.small import assert_equal, federation
from tests.tiny import TinyData, tiny_data

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

CPU = TrainerConfig(accelerator="cpu", precision="64-true")
GPU = TrainerConfig(accelerator="gpu", precision="64-true")
EXACT = replace(GPU, deterministic=True)
FEDAMM: dict[str, Method] = {
    "FedAMM, higher": (FedAMM, {"differentiation": "higher"}),
    "FedAMM, functional": (FedAMM, {"differentiation": "functional"}),
    "FedAMM, forward": (FedAMM, {}),
    "FedAMM, every step": (FedAMM, {"meta_update": "synchronous"}),
    "FedAMM, class-aware": (FedAMM, {"families": "fixed"}),
}
ALL: dict[str, Method] = {"FedAvg": (FedAvg, {}), **FEDAMM, **METHODS}


def trained(method: Method, trainer: TrainerConfig, data: TinyData | None = None, **options: Any) -> Orchestrator:
    """Two rounds of clients of different sizes, unless told otherwise."""
    algorithm, own = method
    data = data or tiny_data(partition="by_dirichlet", dirichlet_alpha=0.5)
    run = federation(algorithm, data, {"lr": 0.05, **own}, trainer=trainer, client_fraction=1.0, **options)
    run.run()
    return run


def assert_close(first: State, second: State, tolerance: float = 1e-7) -> None:
    torch.testing.assert_close(first, second, rtol=tolerance, atol=tolerance, check_device=False)


@pytest.mark.parametrize("method", ALL.values(), ids=list(ALL))
def test_every_method_computes_what_it_computes_on_a_cpu(method: Method) -> None:
    theirs, mine = (trained(method, trainer) for trainer in (CPU, GPU))
    assert mine.server.module.device.type == "cuda"
    assert_close(mine.state.shared, theirs.state.shared)
    for row, expected in zip(mine.state.history, theirs.state.history, strict=True):
        assert row["test/loss"] == pytest.approx(expected["test/loss"], rel=1e-6)
        assert row["test/acc"] == expected["test/acc"]


@pytest.mark.parametrize("method", ["FedAvg", "FedAMM, forward", "MetaFineTune", "CReFF"])
@pytest.mark.parametrize(
    "executor", [Vectorized(), Processes(2, threads_per_worker=1)], ids=["Vectorized", "Processes"]
)
def test_executors_agree(method: str, executor: Executor) -> None:
    one, other = trained(ALL[method], GPU), trained(ALL[method], GPU, executor=executor)
    assert_close(other.state.shared, one.state.shared)


def test_workers_of_ray_share_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in clusters.LOOPBACK.items():
        monkeypatch.setenv(name, value)
    workers = Ray(num_workers=2, gpus_per_worker=0.5, threads_per_worker=1)
    one, other = trained(ALL["FedAMM, forward"], GPU), trained(ALL["FedAMM, forward"], GPU, executor=workers)
    assert_close(other.state.shared, one.state.shared)


@pytest.mark.parametrize("method", ["FedAvg", "FedAMM, forward", "Moon", "CReFF"])
def test_a_run_that_is_continued_ends_in_the_same_bits(method: str, tmp_path: Path) -> None:
    """Continued from its checkpoint, with deterministic kernels."""
    whole = trained(ALL[method], EXACT, num_rounds=3)
    again = trained(ALL[method], EXACT, num_rounds=3)
    assert_equal(again.state.shared, whole.state.shared)
    trained(ALL[method], EXACT, num_rounds=2, output_dir=tmp_path)
    assert_equal(trained(ALL[method], EXACT, num_rounds=3, output_dir=tmp_path).state.shared, whole.state.shared)


@pytest.mark.parametrize("precision", ["32-true", "auto", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("method", ["FedAvg", "FedAMM, higher", "FedAMM, forward", "FedAMM, every step"])
def test_every_precision_learns(method: str, precision: Any) -> None:
    data = tiny_data(partition="iid", augmentation="none", num_clients=2)
    run = trained(ALL[method], replace(GPU, precision=precision), data, num_rounds=3, local_epochs=4)
    assert run.state.history[-1]["test/acc"] > 0.6  # chance is 0.25
    assert all(value.isfinite().all() for value in run.state.shared.values())


@pytest.mark.parametrize("method", ["FedAvg", "FedAMM, forward"])
def test_a_compiled_network_computes_the_same_for_all_clients_and_rounds(method: str) -> None:
    one, other = (trained(ALL[method], replace(GPU, compile=compiled), num_rounds=3) for compiled in (False, True))
    assert_close(other.state.shared, one.state.shared, 1e-6)


class NeverWaits(FedAvg):
    """Fails in a training step in which the processor waits for the GPU."""

    def training_step(self, *args: Any) -> Any:
        return _without_waiting(self.trainer, super().training_step, *args)


class NeverWaitsEither(FedAMM):
    """The same, the meta step of each training step included."""

    def training_step(self, *args: Any) -> Any:
        return _without_waiting(self.trainer, super().training_step, *args)


def _without_waiting(trainer: pl.Trainer, step: Any, *args: Any) -> Any:
    # before the first step it is looked up once how the network can be differentiated
    torch.cuda.set_sync_debug_mode("error" if trainer.global_step else "default")
    try:
        return step(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("algorithm", "method"),
    [(NeverWaits, {}), *((NeverWaitsEither, FEDAMM[name][1]) for name in ("FedAMM, forward", "FedAMM, every step"))],
    ids=["FedAvg", "FedAMM", "FedAMM, every step"],
)
def test_the_processor_does_not_wait_for_the_gpu_within_a_step(
    algorithm: type[FederatedModule], method: dict[str, Any]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        run = trained((algorithm, method), GPU)
    assert run.state.counts == dict.fromkeys(run.state.counts, 0)
