"""What every method owes: its limit case, learning, the plain Trainer, a resume in the same bits, its bytes, its options."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

import fedamm_pl.algorithms
from fedamm_pl import FederatedModule, Orchestrator
from fedamm_pl.algorithms import (
    CCVR,
    CRT,
    FEDIC,
    LWS,
    RUCR,
    BalanceFL,
    ClassBalanced,
    Climb,
    CReFF,
    FedAvg,
    FedDyn,
    FedETF,
    FedFocal,
    FedGraB,
    FedLC,
    FedLoGe,
    FedNH,
    FedNova,
    FedNPC,
    FedProx,
    FedReLa,
    FedRoD,
    FedRS,
    FedYoYo,
    LogitAdjusted,
    MetaFineTune,
    Moon,
    RatioLoss,
    Scaffold,
    TauNormalized,
)
from fedamm_pl.algorithms.class_prior import ClassPriorModule
from fedamm_pl.federation.callbacks import FederationCallback
from fedamm_pl.federation.run import Run
from fedamm_pl.federation.trainer import TrainerConfig, quiet
from fedamm_pl.protocol.messages import ClientResult, State
from tests.tiny import NUM_CLASSES, TinyData, tiny_data

HIDDEN = 16
PARTITIONS = ["by_num_classes", "by_dirichlet", "by_shards", "iid"]
CPU = TrainerConfig(accelerator="cpu", precision="32-true")
Method = tuple[type[FederatedModule], dict[str, Any]]

METHODS: dict[str, Method] = {
    "BalanceFL": (BalanceFL, {}),
    "RUCR": (RUCR, {"mu": 1.0, "rectify_round": 1, "rectify_epochs": 5, "num_features": 20}),
    "FedYoYo": (FedYoYo, {"warmup": 2, "rotation": 5.0}),
    "FedReLa": (FedReLa, {"relabel_round": 2}),
    "FedReLa, balanced softmax": (FedReLa, {"relabel_round": 2, "rate": 10.0, "base": "balanced_softmax"}),
    "FedProx": (FedProx, {"mu": 0.1}),
    "FedNova": (FedNova, {}),
    "Scaffold": (Scaffold, {}),
    "Moon": (Moon, {}),
    "Moon, no projection": (Moon, {"projection": None}),
    "FedFocal": (FedFocal, {}),
    "ClassBalanced, local": (ClassBalanced, {"counts": "local"}),
    "ClassBalanced, global": (ClassBalanced, {"counts": "global"}),
    "ClassBalanced, estimated": (ClassBalanced, {"counts": "estimated"}),
    "LogitAdjusted, local": (LogitAdjusted, {"counts": "local"}),
    "LogitAdjusted, global": (LogitAdjusted, {"counts": "global"}),
    "LogitAdjusted, estimated": (LogitAdjusted, {"counts": "estimated"}),
    "LogitAdjusted, local, mask": (LogitAdjusted, {"counts": "local", "absent": "mask"}),
    "FedLC": (FedLC, {}),
    "FedLC, one": (FedLC, {"absent": "one"}),
    "FedRS": (FedRS, {}),
    "FedRS, frequency": (FedRS, {"scaling": "frequency"}),
    "RatioLoss": (RatioLoss, {}),
    "MetaFineTune": (MetaFineTune, {}),
    "Climb": (Climb, {"dual_lr": 0.5, "tolerance": 0.01}),
    "FedDyn": (FedDyn, {"alpha": 0.1}),
    "FedETF": (FedETF, {}),
    "FedGraB": (FedGraB, {}),
    "FedGraB, global": (FedGraB, {"ranks": "global_counts"}),
    "CReFF": (CReFF, {"num_features": 10, "match_steps": 20, "retrain_steps": 50}),
    "FedNH": (FedNH, {"scale": 10.0}),
    "FEDIC": (FEDIC, {"finetune_steps": 5, "calibration_steps": 5, "distill_steps": 10, "num_draws": 2}),
    "FedLoGe": (FedLoGe, {"simplex_steps": 500}),
    "FedRoD": (FedRoD, {}),
    "FedRoD, hypernetwork": (FedRoD, {"head": "hypernetwork"}),
    "TauNormalized": (TauNormalized, {}),
    "TauNormalized, chosen": (TauNormalized, {"tau": None}),
    "FedNPC": (FedNPC, {"num_features": 100, "noise_steps": 3}),
    "CCVR": (CCVR, {"num_features": 50, "calibrate": "evaluations"}),
    "CRT": (CRT, {"retrain_steps": 30}),
    "CRT, clients": (CRT, {"where": "clients", "stage2_start": 2}),
    "LWS": (LWS, {"retrain_steps": 30}),
    "LWS, clients": (LWS, {"where": "clients", "stage2_start": 2}),
}
POST_HOC = ["TauNormalized", "TauNormalized, chosen", "FedNPC", "CCVR", "CRT", "LWS"]
"""They train as FedAvg does, and evaluate the model with another classifier."""
NOT_HERE = {"FedAMM", "FedAvg"}  # with a file of its own; what the others differ from
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))


def test_no_method_is_left_out() -> None:
    assert {algorithm.__name__ for algorithm, _ in METHODS.values()} == set(fedamm_pl.algorithms.__all__) - NOT_HERE


def mlp() -> nn.Sequential:
    """A network without BatchNorm."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, NUM_CLASSES))


def make(method: Method, data: TinyData, model: str | None = None, **options: Any) -> Any:
    """Build a module with the same initial weights for every method; by default an MLP."""
    algorithm, own = method
    torch.manual_seed(0)
    network: Any = model or mlp()
    lr = 0.1 if algorithm is Scaffold else 0.05  # it has no momentum
    return algorithm(NUM_CLASSES, 1, network, **{"lr": lr, "info": data.info, **own, **options})


def federate(module: FederatedModule, data: TinyData, num_rounds: int, **options: Any) -> Orchestrator:
    options = {"client_fraction": 1.0, "local_epochs": 1, "trainer": CPU, **options}
    orchestrator = Orchestrator(module, data, num_rounds=num_rounds, **options)
    orchestrator.run()
    return orchestrator


def of_the_model(state: State) -> State:
    return {name: value for name, value in state.items() if name.startswith("model.")}


def assert_equal(first: State, second: State) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


# Limit cases.


LIMITS: dict[str, Method] = {
    "RUCR, mu 0, too late": (RUCR, {"mu": 0.0, "rectify_round": 3}),
    "FedYoYo, one view, tau 0": (FedYoYo, {"tau": 0.0, "strong_view": False, "rotation": 0.0}),
    "FedReLa, too late": (FedReLa, {"relabel_round": 3}),
    "FedReLa, rate 0, the same learning rate": (FedReLa, {"relabel_round": 1, "rate": 0.0, "lr_factor": 1.0}),
    "FedProx, mu 0": (FedProx, {"mu": 0.0}),
    "Moon, no projection, mu 0": (Moon, {"mu": 0.0, "projection": None}),
    "FedFocal, gamma 0": (FedFocal, {"gamma": 0.0}),
    "ClassBalanced, local, beta 0": (ClassBalanced, {"counts": "local", "beta": 0.0}),
    "ClassBalanced, global, beta 0": (ClassBalanced, {"counts": "global", "beta": 0.0}),
    "ClassBalanced, estimated, beta 0": (ClassBalanced, {"counts": "estimated", "beta": 0.0}),
    "LogitAdjusted, estimated, tau 0": (LogitAdjusted, {"counts": "estimated", "tau": 0.0}),
    "LogitAdjusted, local, tau 0": (LogitAdjusted, {"counts": "local", "tau": 0.0}),
    "LogitAdjusted, global, tau 0": (LogitAdjusted, {"counts": "global", "tau": 0.0}),
    "FedLC, one, tau 0": (FedLC, {"absent": "one", "tau": 0.0}),
    "FedRS, alpha 1": (FedRS, {"alpha": 1.0}),
    "FedRS, frequency, alpha 1": (FedRS, {"alpha": 1.0, "scaling": "frequency"}),
    "FedRoD, gamma 0": (FedRoD, {"gamma": 0.0, "absent": "one"}),
    "RatioLoss, alpha 1, beta 0": (RatioLoss, {"alpha": 1.0, "beta": 0.0}),
    "MetaFineTune, 0 steps": (MetaFineTune, {"finetune_steps": 0}),
    "FEDIC, 0 steps": (FEDIC, {"distill_steps": 0}),
    "Climb, dual_lr 0": (Climb, {"dual_lr": 0.0, "tolerance": 0.0}),
    "FedNPC, 0 steps": (FedNPC, {"noise_steps": 0}),
    "CCVR, 0 features": (CCVR, {"num_features": 0}),
    "CCVR, 0 epochs": (CCVR, {"retrain_epochs": 0, "calibrate": "evaluations"}),
    "CRT, 0 steps": (CRT, {"retrain_steps": 0}),
    "CRT, clients, never": (CRT, {"where": "clients", "stage2_start": 3}),
    "LWS, 0 steps": (LWS, {"retrain_steps": 0}),
    "LWS, lr 0": (LWS, {"retrain_lr": 0.0}),
    "LWS, clients, never": (LWS, {"where": "clients", "stage2_start": 3}),
}


def different_clients(**options: Any) -> TinyData:
    """Clients of different sizes and classes, with a real augmentation."""
    return tiny_data(partition="by_dirichlet", dirichlet_alpha=0.5, **options)


@pytest.fixture(scope="module")
def fedavg() -> Orchestrator:
    data = different_clients()
    return federate(make((FedAvg, {}), data, "tests.tiny.tiny_resnet"), data, 2, eval_interval=1)


@pytest.mark.parametrize("method", LIMITS.values(), ids=list(LIMITS))
def test_limit_case_is_fedavg_bit_for_bit(method: Method, fedavg: Orchestrator) -> None:
    data = different_clients()
    run = federate(make(method, data, "tests.tiny.tiny_resnet"), data, 2, eval_interval=1)
    assert_equal(of_the_model(run.state.shared), fedavg.state.shared)
    for mine, theirs in zip(run.state.history, fedavg.state.history, strict=True):
        for name in ("round", "client/loss", "test/loss", "test/acc"):
            assert mine.get(name) == theirs.get(name)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fednova_with_equal_local_steps_is_fedavg_to_rounding(momentum: float) -> None:
    data = tiny_data()
    assert len({len(data.client(client).train_loader(0)) for client in range(4)}) == 1
    options: dict[str, Any] = {"momentum": momentum, "model": "tests.tiny.tiny_resnet"}
    theirs = federate(make((FedAvg, {}), data, **options), data, 2)
    mine = federate(make((FedNova, {}), data, **options), data, 2)
    assert_is_not_the_start(mine, make((FedNova, {}), data, **options))
    torch.testing.assert_close(mine.state.shared, theirs.state.shared, rtol=1e-5, atol=1e-6)


def assert_is_not_the_start(run: Orchestrator, fresh: FederatedModule) -> None:
    start = fresh.shared_state()
    assert max(float((run.state.shared[name] - value).abs().max()) for name, value in start.items()) > 1e-2


def test_fednova_with_different_local_steps_is_not_fedavg(fedavg: Orchestrator) -> None:
    data = different_clients()
    assert len({len(data.client(client).train_loader(0)) for client in range(4)}) > 1
    run = federate(make((FedNova, {}), data, "tests.tiny.tiny_resnet"), data, 2)
    name = "model.classifier.weight"
    assert (run.state.shared[name] - fedavg.state.shared[name]).abs().max() > 1e-3


def test_first_round_of_scaffold_is_fedavg_without_momentum_and_later_ones_are_not() -> None:
    data = different_clients()
    options: dict[str, Any] = {"momentum": 0.0, "lr": 0.1, "model": "tests.tiny.tiny_resnet"}
    for num_rounds in (1, 2):
        theirs = federate(make((FedAvg, {}), data, **options), data, num_rounds)
        mine = federate(make((Scaffold, {}), data, **options), data, num_rounds)
        if num_rounds == 1:
            assert_equal(of_the_model(mine.state.shared), theirs.state.shared)
        else:
            assert not torch.equal(*(run.state.shared["model.classifier.weight"] for run in (mine, theirs)))


def test_scaffold_with_a_single_client_is_fedavg_in_every_round() -> None:
    data = tiny_data(num_clients=1, partition="iid")
    options: dict[str, Any] = {"momentum": 0.0, "lr": 0.1}
    theirs = federate(make((FedAvg, {}), data, **options), data, 3)
    mine = federate(make((Scaffold, {}), data, **options), data, 3)
    assert_equal(of_the_model(mine.state.shared), theirs.state.shared)


def test_first_participation_in_moon_is_fedavg_and_the_second_is_not(fedavg: Orchestrator) -> None:
    data = different_clients()
    model = "tests.tiny.tiny_resnet"
    moon = METHODS["Moon, no projection"]
    first, theirs = (federate(make(method, data, model), data, 1) for method in (moon, (FedAvg, {})))
    assert_equal(first.state.shared, theirs.state.shared)
    second = federate(make(moon, data, model), data, 2)
    assert not torch.equal(second.state.shared["model.conv1.weight"], fedavg.state.shared["model.conv1.weight"])
    assert second.state.history[-1]["client/contrast"] > 0


def test_creff_trains_the_model_of_fedavg_and_evaluates_it_with_another_classifier(fedavg: Orchestrator) -> None:
    data = different_clients()
    module = make(METHODS["CReFF"], data, "tests.tiny.tiny_resnet")
    run = federate(module, data, 2)
    assert_equal(of_the_model(run.state.shared), fedavg.state.shared)
    delivered = module.shared_state()
    replaced = {"model.classifier.weight": "retrained.weight", "model.classifier.bias": "retrained.bias"}
    for name, value in delivered.items():
        assert torch.equal(value, run.state.shared[replaced.get(name, name)])
    assert not torch.equal(delivered["model.classifier.weight"], run.state.shared["model.classifier.weight"])


@pytest.mark.parametrize("name", POST_HOC)
def test_what_is_trained_is_fedavgs_and_what_is_evaluated_has_another_classifier(
    name: str, fedavg: Orchestrator
) -> None:
    data = different_clients()
    algorithm, options = METHODS[name]
    module = make((algorithm, {**options, "calibrate": "evaluations"}), data, "tests.tiny.tiny_resnet")
    run = federate(module, data, 2, eval_interval=1)
    assert_equal(of_the_model(run.state.shared), fedavg.state.shared)
    losses = [[row["test/loss"] for row in one.state.history] for one in (run, fedavg)]
    assert losses[0][0] == losses[1][0]  # round 0: nothing is trained
    assert all(mine != theirs for mine, theirs in zip(losses[0][1:], losses[1][1:], strict=True))
    classifier = {"model.classifier.weight", "model.classifier.bias"}
    assert {name for name in run.state.shared if not name.startswith("model.")} == {
        f"calibrated.{n}" for n in classifier
    }
    for entry, value in module.shared_state().items():
        replaced = f"calibrated.{entry}" if entry in classifier else entry
        assert torch.equal(value, run.state.shared[replaced])


DIFFERENT = {
    name: method for name, method in METHODS.items() if name not in ("FedETF", "FedNH", "CReFF", "Moon", *POST_HOC)
}


@pytest.fixture(scope="module")
def plain_fedavg() -> State:
    data = different_clients()
    return federate(make((FedAvg, {}), data, momentum=0.0, lr=0.1), data, 2).state.shared


@pytest.mark.parametrize("method", DIFFERENT.values(), ids=list(DIFFERENT))
def test_away_from_its_limit_a_method_is_not_fedavg(method: Method, plain_fedavg: State) -> None:
    data = different_clients()
    mine = federate(make(method, data, momentum=0.0, lr=0.1), data, 2).state.shared
    difference = mine["model.3.weight"] - plain_fedavg["model.3.weight"]
    assert difference.abs().max() > 1e-5


# Learning.


@every_method
@pytest.mark.parametrize("partition", PARTITIONS)
def test_learns_under_every_partition(method: Method, partition: str) -> None:
    data = tiny_data(augmentation="none", partition=partition, num_clients=2)
    module = make(method, data)
    run = federate(module, data, 2, eval_interval=2, local_epochs=3)
    start, end = run.state.history
    assert start["test/acc"] < 0.4
    assert end["test/acc"] > 0.6  # chance is 0.25
    assert run.state.counts == dict.fromkeys(run.state.counts, 0)
    assert_equal(module.shared_state(), module.deployed(run.state.shared))
    assert run.evaluate()["test/acc"] == end["test/acc"]


OWN_ARITHMETIC = [name for name in METHODS if name not in ("FedFocal", "LogitAdjusted, local", "FedLC, one")]


@pytest.mark.parametrize("name", OWN_ARITHMETIC)
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_trains_in_half_precision_too(name: str, precision: Any) -> None:
    data = tiny_data(num_clients=2, batch_size=40)
    run = federate(make(METHODS[name], data), data, 2, trainer=TrainerConfig(accelerator="cpu", precision=precision))
    assert run.state.counts == dict.fromkeys(run.state.counts, 0)
    assert run.state.history[-1]["test/loss"] < 3
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {value.dtype for value in of_the_model(run.state.shared).values()} == {dtype}


@every_method
@pytest.mark.usefixtures("fresh_compiler")
def test_the_compiled_network_trains_alike(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[Any] = []

    def eagerly(graph: Any, inputs: Any) -> Any:
        """Compute what was traced as it was written."""
        graphs.append(graph)
        return graph.forward

    data = tiny_data(num_clients=2, batch_size=40)
    plain = federate(make(method, data), data, 2)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=eagerly))
    compiled = federate(make(method, data), data, 2, trainer=TrainerConfig("cpu", precision="32-true", compile=True))
    assert graphs
    assert compiled.state.counts == dict.fromkeys(compiled.state.counts, 0)
    for name, value in plain.state.shared.items():
        torch.testing.assert_close(compiled.state.shared[name], value)


# The plain Trainer.


@pytest.fixture
def silence() -> Iterator[None]:
    with quiet():
        yield


def fit(module: FederatedModule, *loaders: Any, epochs: int = 2, **options: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, *loaders, **options)
    return trainer


@pytest.mark.usefixtures("silence")
@every_method
def test_trains_in_a_plain_trainer(method: Method) -> None:
    data = tiny_data(augmentation="none")
    module = make(method, data)
    trainer = fit(module, data.train_dataloader(), data.test_dataloader(), epochs=4)
    assert trainer.global_step == 4 * -(-sum(data.info["class_counts"]) // 16)
    assert trainer.callback_metrics["val/acc"] > 0.6
    assert 0 < trainer.callback_metrics["train/loss"] < 2


@pytest.mark.usefixtures("silence")
@every_method
def test_plain_trainer_takes_the_data_module(method: Method) -> None:
    data = tiny_data(augmentation="none")
    module = make(method, data)
    trainer = fit(module, datamodule=data)
    assert trainer.global_step == 2 * -(-sum(data.info["class_counts"]) // 16)
    (tested,) = trainer.test(module, datamodule=data, verbose=False)
    assert tested["test/acc"] > 0.25
    assert torch.cat(trainer.predict(module, datamodule=data)).shape == (80, NUM_CLASSES)


ALONE_FEDAVG = [
    "FedDyn",
    "RUCR",
    "FedYoYo",
    "FedReLa",
    "BalanceFL",
    "FedRS",
    "FedDyn",
    "FedNova",
    "Scaffold",
    "Moon, no projection",
    "RatioLoss",
    "MetaFineTune",
    "Climb",
    "CReFF",
    "FEDIC",
    "CRT, clients",
    "LWS, clients",
    *POST_HOC,
]


@pytest.mark.usefixtures("silence")
@pytest.mark.parametrize("name", ALONE_FEDAVG)
def test_in_a_plain_trainer_it_is_fedavg(name: str) -> None:
    data = tiny_data(augmentation="none")
    states = []
    for method in (METHODS[name], (FedAvg, {})):
        module = make(method, data, momentum=0.0, lr=0.1)
        fit(module, data.train_dataloader())
        states.append(module.shared_state())
    assert_equal(*states)


COUNTING = [name for name, (method, _) in METHODS.items() if issubclass(method, ClassPriorModule)]


@pytest.mark.usefixtures("silence")
@pytest.mark.parametrize("name", COUNTING)
def test_class_counts_are_needed_in_a_plain_trainer(name: str) -> None:
    data = tiny_data(augmentation="none")
    module = make(METHODS[name], data, info=None)
    with pytest.raises(ValueError, match=r"Expected `info` of \w+ to hold class_counts, got none"):
        fit(module, [(torch.zeros(4, 1, 8, 8), torch.arange(4))])


# Resuming.


class Kept(FederationCallback):
    """Counts the clients that come again."""

    def __init__(self) -> None:
        self.again = 0
        self.seen: set[int] = set()

    def on_client_end(self, run: Run, result: ClientResult) -> None:
        self.again += result.client_id in self.seen
        self.seen.add(result.client_id)


@every_method
def test_resumed_run_equals_uninterrupted_run(method: Method, tmp_path: Path) -> None:
    data = different_clients(batch_size=40)

    def run(num_rounds: int, folder: str) -> Orchestrator:
        options: dict[str, Any] = {"client_fraction": 0.5, "eval_interval": 2, "output_dir": tmp_path / folder}
        return federate(make(method, data), data, num_rounds, callbacks=[again], **options)

    again = Kept()
    whole = run(4, "whole")
    assert again.again >= 2  # clients that come again make use of what they kept
    run(2, "halves")
    halves = run(4, "halves")
    assert halves.state.counts["resumes"] == 1
    assert_equal(halves.state.shared, whole.state.shared)
    assert halves.state.kept == whole.state.kept
    for client, kept in kept_by(whole).items():
        assert_equal(kept_by(halves)[client], kept)
    assert halves.state.history == whole.state.history
    assert_equal(halves.module.shared_state(), whole.module.shared_state())
    loaded = type(whole.module).load_from_checkpoint(tmp_path / "halves/final.ckpt", model=mlp())
    assert_equal(loaded.shared_state(), whole.module.shared_state())
    assert (tmp_path / "halves/metrics.csv").read_bytes() == (tmp_path / "whole/metrics.csv").read_bytes()


def kept_by(run: Orchestrator) -> dict[int, State]:
    """What each client that has taken part keeps to itself."""
    return {client: run._store.read(client, version) for client, version in run.state.kept.items()}


def test_what_a_run_must_remember_is_there_to_be_resumed() -> None:
    data = tiny_data()
    states, kept = {}, {}
    for name in ("Scaffold", "Moon, no projection", "Climb", "CReFF", "FedProx"):
        run = federate(make(METHODS[name], data), data, 2, client_fraction=0.5)
        states[name], kept[name] = run.state, kept_by(run)
    model = set(make((FedAvg, {}), data).shared_state())
    assert set(states["Scaffold"].shared) - model == {f"control.{name}" for name in model}
    assert set(states["Climb"].shared) - model == {"dual"}
    assert set(states["CReFF"].shared) - model == {"features", "retrained.weight", "retrained.bias"}
    for name in ("Scaffold", "Moon, no projection"):
        assert kept[name]
        assert {frozenset(state) for state in kept[name].values()} == {frozenset(model)}
    assert not kept["FedProx"]
    assert set(states["FedProx"].shared) == set(states["Moon, no projection"].shared) == model


# Bytes.


C, D = NUM_CLASSES, HIDDEN
PARAMETERS = 4 * (64 * D + D + D * C + C)
HEADS = {  # numbers more than in the network as it is
    "FedETF": 1,  # the learned factor
    "Moon": D * (D + 1) + 256 * (D + 1) + C * (256 - D),  # its projection head
}
HYPERNETWORK = 4 * (C * D + D + D * D * C + D * C)
EXTRA_BYTES = {  # received and sent beside the model
    "Scaffold": (PARAMETERS, PARAMETERS),
    "FedDyn": (8, 0),
    "FedNova": (0, 8),
    "ClassBalanced, global": (8 * C, 0),
    "LogitAdjusted, global": (8 * C, 0),
    "ClassBalanced, estimated": (8 * C, 0),
    "LogitAdjusted, estimated": (8 * C, 0),
    "RatioLoss": (4 * C, 0),
    "FedGraB, global": (8 * C, 0),
    "Climb": (0, 8),
    "FedYoYo": (4 * C, 8 * C),
    "RUCR": (4 * C * (D + 1) + 4 * C * D, 4 * C * D + 8 * C + 4 * C * (D + 1)),
    "CReFF": (4 * C * (D + 1), 4 * C * C * (D + 1) + 8 * C),
    "FedRoD, hypernetwork": (HYPERNETWORK, HYPERNETWORK),
    "FedNH": (4 - 4 * C, 4 + 4 * C),  # a scale and no bias; class counts
}


HEAD = 4 * (C * D + C)
LATE = dict.fromkeys(("CRT, clients", "LWS, clients"), (8, HEAD + 8 * C - PARAMETERS))  # in the second round
STATISTICS = {"CCVR": (PARAMETERS, 8 * C * (1 + D + D * (D + 1) // 2))}  # at each evaluation, of all clients


@every_method
def test_bytes_are_those_of_the_model_and_what_the_method_adds(method: Method, request: pytest.FixtureRequest) -> None:
    data = tiny_data()
    module = make(method, data)
    run = federate(module, data, 2, client_fraction=0.5)
    name = request.node.callspec.id
    received, sent = EXTRA_BYTES.get(name, LATE.get(name, (0, 0)))
    model = PARAMETERS + 4 * HEADS.get(name, 0)
    assert run.state.history[-1]["client/bytes_received"] == model + received
    assert run.state.history[-1]["client/bytes_sent"] == model + sent
    times = 2 if name in LATE else 4
    total = {"received": 4 * model + times * received, "sent": 4 * model + times * sent}
    for way, size in zip(total, STATISTICS.get(name, (0, 0)), strict=True):
        total[way] += 4 * size * (len(run.state.history) - 1)
    assert run.state.bytes_total == total


def test_scaffold_sends_no_control_variates_for_batchnorm_statistics() -> None:
    data = tiny_data()
    module = make(METHODS["Scaffold"], data, "tests.tiny.tiny_resnet")
    run = federate(module, data, 1)
    model = sum(value.nbytes for value in module.shared_state().values())
    trained = sum(value.nbytes for value in module.model.parameters())
    assert run.state.history[-1]["client/bytes_received"] == run.state.history[-1]["client/bytes_sent"]
    assert run.state.history[-1]["client/bytes_sent"] == model + trained


# Options.


@pytest.mark.parametrize(
    ("algorithm", "option", "value"),
    [
        (FedProx, "mu", -0.1),
        (FedProx, "mu", float("nan")),
        (FedNova, "momentum", -0.1),
        (FedNova, "momentum", 1.0),
        (FedNova, "momentum", 1.5),
        (Scaffold, "momentum", 0.9),
        (Scaffold, "momentum", -0.9),
        (Scaffold, "momentum", float("nan")),
        (Moon, "mu", -1.0),
        (Moon, "mu", float("inf")),
        (Moon, "temperature", 0.0),
        (Moon, "temperature", -0.5),
        (Moon, "projection", 0),
        (FedFocal, "gamma", -0.5),
        (FedFocal, "gamma", float("inf")),
        (ClassBalanced, "beta", -0.1),
        (ClassBalanced, "beta", 1.0),
        (ClassBalanced, "beta", float("nan")),
        (ClassBalanced, "counts", "both"),
        (LogitAdjusted, "tau", -1.0),
        (LogitAdjusted, "counts", "none"),
        (LogitAdjusted, "absent", "none"),
        (FedLC, "tau", -1.0),
        (FedLC, "absent", None),
        (FedRS, "alpha", -0.1),
        (FedRS, "alpha", 1.1),
        (FedRS, "scaling", "none"),
        (RatioLoss, "alpha", -1.0),
        (RatioLoss, "beta", -0.1),
        (RatioLoss, "max_ratio", 0.0),
        (MetaFineTune, "finetune_steps", -1),
        (MetaFineTune, "finetune_lr", -0.1),
        (FedGraB, "ranks", "index"),
        (FedGraB, "proportional", -1.0),
        (FedGraB, "integral", float("nan")),
        (FedGraB, "derivative", -0.1),
        (FEDIC, "finetune_steps", -1),
        (FEDIC, "calibration_steps", -1),
        (FEDIC, "distill_steps", -1),
        (FEDIC, "adam_lr", -0.1),
        (FEDIC, "distill_weight", -0.1),
        (FEDIC, "distill_weight", 1.1),
        (FEDIC, "temperature", 0.0),
        (FEDIC, "num_draws", 0),
        (Climb, "dual_lr", -0.1),
        (Climb, "tolerance", -0.1),
        (FedDyn, "alpha", -0.1),
        (FedDyn, "max_grad_norm", 0.0),
        (Climb, "primal_rounds", 0),
        (FedETF, "scale", 0.0),
        (FedLoGe, "sparsity", -0.1),
        (FedLoGe, "sparsity", 1.0),
        (FedLoGe, "simplex_steps", -1),
        (FedLoGe, "simplex_seed", -1),
        (FedRoD, "gamma", -0.1),
        (FedRoD, "absent", "two"),
        (FedRoD, "head", "both"),
        (FedNH, "smoothing", -0.1),
        (FedNH, "smoothing", 1.1),
        (FedNH, "scale", 0.0),
        (FedNH, "max_grad_norm", 0.0),
        (CReFF, "num_features", 0),
        (CReFF, "match_steps", -1),
        (CReFF, "match_lr", -0.1),
        (CReFF, "retrain_steps", -1),
        (CReFF, "retrain_lr", -0.1),
        (CReFF, "retrain_momentum", -0.1),
        (CReFF, "retrain_batch_size", 0),
        (FedYoYo, "tau", -1.0),
        (FedYoYo, "gamma", -0.1),
        (FedYoYo, "gamma", 1.1),
        (FedYoYo, "prior_mix", "never"),
        (FedYoYo, "kd_weight", -1.0),
        (FedYoYo, "temperature", 0.0),
        (FedYoYo, "warmup", -1),
        (FedYoYo, "rotation", -1.0),
        (RUCR, "mu", -1.0),
        (RUCR, "temperature", 0.0),
        (RUCR, "rectify_round", 0),
        (RUCR, "rectify_epochs", -1),
        (RUCR, "rectify_lr", -0.1),
        (RUCR, "rectify_batch_size", 0),
        (RUCR, "num_features", 0),
        (RUCR, "mix_low", -0.1),
        (RUCR, "mix_high", 1.1),
        (RUCR, "mix_high", 0.2),
        (FedReLa, "relabel_round", 0),
        (FedReLa, "rate", -1.0),
        (FedReLa, "rate", 101.0),
        (FedReLa, "rate", float("nan")),
        (FedReLa, "num_passes", 0),
        (FedReLa, "lr_factor", 0.0),
        (FedReLa, "base", "focal"),
        (FedReLa, "absent", "batch"),
        (BalanceFL, "absent", "round"),
        (BalanceFL, "kd_weight", -1.0),
        (BalanceFL, "temperature", 0.0),
        (BalanceFL, "entropy_weight", -0.1),
        (TauNormalized, "tau", -0.1),
        (TauNormalized, "tau", float("nan")),
        (TauNormalized, "calibrate", "never"),
        (FedNPC, "num_features", 0),
        (FedNPC, "noise_steps", -1),
        (FedNPC, "noise_lr", -0.1),
        (CCVR, "num_features", -1),
        (CCVR, "retrain_epochs", -1),
        (CCVR, "retrain_lr", -0.1),
        (CCVR, "retrain_batch_size", 0),
        (CRT, "where", "both"),
        (CRT, "stage2_start", 5),
        (LWS, "retrain_steps", -1),
        (LWS, "retrain_lr", -0.1),
    ],
)
def test_options_out_of_range_are_refused_by_name(algorithm: Any, option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"Expected `{option}` to be .*, got {value!r}"):
        algorithm(NUM_CLASSES, 1, mlp(), **{option: value})


@pytest.mark.parametrize("algorithm", [method for method, _ in METHODS.values()])
@pytest.mark.parametrize("option", ["lr", "momentum", "weight_decay"])
def test_options_of_the_base_are_refused_too(algorithm: Any, option: str) -> None:
    with pytest.raises(ValueError, match=f"Expected `{option}` to be a number"):
        algorithm(NUM_CLASSES, 1, mlp(), **{option: -1.0})


@pytest.mark.parametrize(
    ("algorithm", "option", "value"),
    [(FedETF, "scale", 10), (FedProx, "mu", 1), (FedLC, "tau", 1), (ClassBalanced, "beta", 0), (Scaffold, "lr", 1)],
)
def test_whole_numbers_do_for_real_ones(algorithm: Any, option: str, value: int) -> None:
    data = tiny_data()
    federate(make((algorithm, {option: value}), data), data, 1, client_fraction=0.25)


@pytest.mark.parametrize("algorithm", [RatioLoss, MetaFineTune, FEDIC, CRT, LWS])
def test_methods_with_a_meta_set_refuse_data_without_one(algorithm: Any) -> None:
    data = tiny_data(num_meta_per_class=0)
    with pytest.raises(ValueError, match=r"`num_meta_per_class` to be 1 or more"):
        federate(make((algorithm, {}), data), data, 1)


@pytest.mark.parametrize("algorithm", [FedETF, FedLoGe, FedNH, FedRoD, CReFF, TauNormalized, FedNPC, CCVR, CRT, LWS])
def test_networks_without_a_linear_layer_are_refused(algorithm: Any) -> None:
    network = nn.Sequential(nn.Conv2d(1, NUM_CLASSES, 8), nn.Flatten())
    with pytest.raises(ValueError, match="Expected `model` to end in a linear layer, got Sequential without any"):
        algorithm(NUM_CLASSES, 1, network)


@pytest.mark.parametrize(
    "name", ["FedETF", "CReFF", "Moon", "RatioLoss", "BalanceFL", "FedNH", "FedRoD", "FedLoGe", *POST_HOC]
)
def test_last_layer_without_a_bias_works_or_is_refused_at_once(name: str) -> None:
    data, (algorithm, options) = tiny_data(), METHODS[name]
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, NUM_CLASSES, bias=False))
    try:
        module = algorithm(NUM_CLASSES, 1, network, info=data.info, **options)
    except ValueError as error:
        assert "`model`" in str(error)  # noqa: PT017
        return
    run = federate(module, data, 2)
    assert run.state.counts == dict.fromkeys(run.state.counts, 0)
