"""What is chosen for speed: precision, layout, compilation, batches of the evaluation; the plain way gives the same."""

import logging
import pickle
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities import registry
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedamm_pl import FedAMM, FedAvg, FederatedModule, Orchestrator
from fedamm_pl.federation.trainer import TrainerConfig, computes_in_bfloat16, quiet
from fedamm_pl.models import SmallCNN
from tests.tiny import NUM_CLASSES, tiny_data

State = dict[str, Tensor]


def trained(algorithm: type[FederatedModule] = FedAMM, model: str = "tests.tiny.tiny_resnet", **options: Any) -> State:
    """The server's state after two rounds of two clients, with options of the trainer."""
    data = tiny_data(num_clients=2)
    torch.manual_seed(0)
    more = {"differentiation": "forward"} if algorithm is FedAMM else {}
    module = algorithm(NUM_CLASSES, 1, model, lr=0.05, info=data.info, **more)  # type: ignore[arg-type]
    trainer = TrainerConfig("cpu", **{"precision": "32-true", **options})
    run = Orchestrator(module, data, num_rounds=2, client_fraction=1.0, local_epochs=2, trainer=trainer)
    run.run()
    assert run.state.counts == dict.fromkeys(run.state.counts, 0)
    return run.state.shared


def distance(state: State, reference: State) -> float:
    """Length of the difference of the weights, relative to what two rounds of training changed."""
    data = tiny_data(num_clients=2)
    torch.manual_seed(0)
    start = FedAMM(NUM_CLASSES, 1, "tests.tiny.tiny_resnet", info=data.info).shared_state()
    names = [name for name, value in reference.items() if value.is_floating_point()]
    difference = torch.cat([(state[name] - reference[name]).double().flatten() for name in names])
    update = torch.cat([(start[name] - reference[name]).double().flatten() for name in names])
    return float(difference.norm() / update.norm())


# Precision


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, "bf16-mixed"),
        ({"avx512_bf16": False, "amx_bf16": True}, "bf16-mixed"),
        ({"avx512_bf16": False, "amx_bf16": False}, "32-true"),
        ({"avx2": True}, "32-true"),
    ],
)
def test_auto_takes_bfloat16_where_the_processor_multiplies_in_it(
    capabilities: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    config = TrainerConfig("cpu")
    assert config.precision == "auto"
    assert config.resolved_precision == config.build().precision == expected
    assert TrainerConfig("cpu", precision="64-true").resolved_precision == "64-true"


def test_a_torch_that_knows_no_capabilities_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert TrainerConfig("cpu").resolved_precision == "32-true"


@pytest.mark.parametrize("native", [True, False])
def test_auto_asks_a_gpu_for_bfloat16_of_its_own(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    assert computes_in_bfloat16(torch.device("cuda")) == native
    assert not computes_in_bfloat16(torch.device("mps"))


def test_bfloat16_goes_the_way_of_float32() -> None:
    assert 0 < distance(trained(precision="bf16-mixed"), trained()) < 0.4


def test_no_precision_makes_lightning_talk(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    data = tiny_data()
    module = FedAvg(NUM_CLASSES, 1, "tests.tiny.tiny_resnet", info=data.info)
    Orchestrator(module, data, num_rounds=1, trainer=TrainerConfig("cpu", precision="bf16-mixed")).evaluate()
    assert capfd.readouterr() == ("", "")
    assert caplog.text == ""


# Layout


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-3), ("64-true", 1e-11)])
def test_both_layouts_agree_to_rounding(precision: str, tolerance: float) -> None:
    plain = trained(precision=precision, memory_format="contiguous_format")
    assert distance(trained(precision=precision, memory_format="channels_last"), plain) < tolerance


def test_the_layout_is_that_of_the_option() -> None:
    seen: list[bool] = []
    network = SmallCNN(NUM_CLASSES, 1)
    network.features[3].register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    data = tiny_data()
    module = FedAvg(NUM_CLASSES, 1, network, info=data.info)
    for memory_format in ("channels_last", "contiguous_format"):
        TrainerConfig("cpu", memory_format=memory_format).place(module)  # type: ignore[arg-type]
        module(data.images.test_images[:4])
    assert seen == [True, False]


def test_an_attribute_of_another_kind_is_left_alone() -> None:
    class Own(nn.Module):
        memory_format = torch.channels_last

        def __init__(self) -> None:
            super().__init__()
            self.network = perceptron(NUM_CLASSES, 1)

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.network(images.to(memory_format=self.memory_format))
            return logits

    data = tiny_data()
    module = FedAvg(NUM_CLASSES, 1, Own(), info=data.info)
    Orchestrator(module, data, num_rounds=1, local_epochs=1, trainer=TrainerConfig("cpu")).run()


# Compilation


@pytest.mark.usefixtures("fresh_compiler")
def test_the_compiled_network_agrees_and_keeps_its_names() -> None:
    plain = trained(model="tests.federation.test_trainer.perceptron")
    compiled = trained(model="tests.federation.test_trainer.perceptron", compile=True)
    assert list(plain) == list(compiled)
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-5)


def perceptron(num_classes: int, in_channels: int) -> nn.Module:
    """A network that is quick to compile."""
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * 64, 8), nn.ReLU(), nn.Linear(8, num_classes))


def compiling(monkeypatch: pytest.MonkeyPatch, backend: Any) -> list[nn.Module]:
    """Let torch compile with a backend; the networks that are compiled are noted."""
    compiled: list[nn.Module] = []
    compile_ = torch.compile

    def compile_noted(network: nn.Module) -> Any:
        compiled.append(network)
        return compile_(network, backend=backend)

    monkeypatch.setattr(torch, "compile", compile_noted)
    return compiled


@pytest.mark.usefixtures("fresh_compiler")
def test_the_network_is_compiled_once_for_all_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compiling(monkeypatch, "eager")
    trained(FedAvg, model="tests.federation.test_trainer.perceptron", compile=True)
    assert [type(module) for module in compiled] == [nn.Sequential] * 2  # the server's, and that of all clients


@pytest.mark.usefixtures("fresh_compiler")
def test_nothing_is_compiled_after_the_first_rounds_and_nothing_without_the_option(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graphs: list[int] = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(1)
        return graph.forward

    compiling(monkeypatch, count)
    data = tiny_data()

    def run(module: FedAvg, num_rounds: int, compiled: bool) -> int:
        torch.compiler.reset()
        trainer = TrainerConfig("cpu", precision="32-true", compile=compiled)
        before = len(graphs)
        Orchestrator(module, data, num_rounds=num_rounds, local_epochs=1, eval_interval=1, trainer=trainer).run()
        return len(graphs) - before

    few, many = (FedAvg(NUM_CLASSES, 1, perceptron(NUM_CLASSES, 1), info=data.info) for _ in range(2))
    assert run(few, 3, True) == run(many, 6, True) > 0
    assert run(many, 1, False) == 0


@pytest.mark.usefixtures("fresh_compiler")
def test_what_cannot_be_compiled_is_said_before_the_first_round(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("No working C++ compiler found\nmore")

    compiling(monkeypatch, refuse)
    with pytest.raises(ValueError, match=r"`compile` to be false, .*: No working C\+\+ compiler found"):
        trained(FedAvg, model="tests.federation.test_trainer.perceptron", compile=True)


@pytest.mark.usefixtures("fresh_compiler")
def test_the_compiled_network_is_for_plain_forward_passes_and_no_second_submodule(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiling(monkeypatch, "eager")
    data = tiny_data()
    module = FedAvg(NUM_CLASSES, 1, perceptron(NUM_CLASSES, 1), info=data.info)
    names = list(module.state_dict())
    TrainerConfig("cpu", compile=True).place(module)
    assert list(module.state_dict()) == names
    images = data.images.test_images[:4]
    torch.testing.assert_close(module(images), module.model(module.prepare(images)))
    module.compiled = lambda _: torch.full((4, NUM_CLASSES), 7.0)
    assert (module(images) == 7).all()
    TrainerConfig("cpu").place(module)
    assert module.compiled is None


# A configuration in another process


def test_auto_is_resolved_once_and_for_all_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    config = TrainerConfig("cpu").resolved()
    assert config == TrainerConfig("cpu", precision="bf16-mixed")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    config.build()
    config.precision_plugin  # noqa: B018  looked up here, and no part of what is sent
    content = pickle.dumps(config)
    assert len(content) < 300
    assert pickle.loads(content) == config
    assert pickle.loads(content).resolved_precision == "bf16-mixed"
    assert pickle.loads(content).build().precision == "bf16-mixed"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": 2}, r"`devices` to be 1 or the number of one GPU like \[2\], got 2"),
        ({"devices": [0, 1]}, r"`devices` to be 1 or the number of one GPU like \[2\], got \[0, 1\]"),
        ({"accelerator": "mps"}, "`accelerator` and `devices` to be available, got 'mps' and 1"),
    ],
)
def test_what_is_not_there_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainerConfig(**options).resolved()


def test_what_lightning_says_of_every_fit_is_silenced_for_the_time(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    level = logger.level
    with pytest.raises(KeyError), quiet():  # noqa: PT012
        logger.info("a tip")
        warnings.warn("GPU available but not used", stacklevel=1)
        raise KeyError
    assert caplog.text == ""
    assert logger.level == level


# Evaluation


def test_evaluation_does_not_depend_on_its_batches() -> None:
    measured = []
    for size in (7, 80, 1000):
        data = tiny_data(test_batch_size=size)
        torch.manual_seed(0)
        module = FedAvg(NUM_CLASSES, 1, "tests.tiny.tiny_resnet", info=data.info)
        measured.append(
            Orchestrator(module, data, num_rounds=1, trainer=TrainerConfig("cpu", precision="64-true")).evaluate()
        )
    for metrics in measured[1:]:
        assert metrics == pytest.approx(measured[0], rel=1e-6)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_how_often_is_evaluated_changes_no_bit(precision: Any) -> None:
    states = []
    for eval_interval in (1, 3):
        data = tiny_data()
        torch.manual_seed(0)
        module = FedAMM(NUM_CLASSES, 1, "tests.tiny.tiny_resnet", info=data.info, differentiation="forward")
        trainer = TrainerConfig("cpu", precision=precision)
        run = Orchestrator(module, data, num_rounds=3, local_epochs=1, eval_interval=eval_interval, trainer=trainer)
        run.run()
        states.append(run.state.shared)
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []


# A GPU that waits


def test_weights_stay_at_their_addresses() -> None:
    # what a captured graph, or a compiled network, relies on
    data = tiny_data()
    module = FedAMM(NUM_CLASSES, 1, "tests.tiny.tiny_resnet", info=data.info, differentiation="forward")
    run = Orchestrator(module, data, num_rounds=2, local_epochs=1, trainer=TrainerConfig("cpu"))
    before = {name: value.data_ptr() for name, value in module.state_dict(keep_vars=True).items()}
    run.run()
    assert {name: value.data_ptr() for name, value in module.state_dict(keep_vars=True).items()} == before


class Waits(TorchDispatchMode):
    """Counts what makes a processor wait for a GPU: a value read back, and a shape that depends on values."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if any(waiting in name for waiting in self.WAITING):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [(FedAvg, {}), (FedAMM, {}), (FedAMM, {"meta_update": "synchronous", "differentiation": "forward"})],
)
def test_nothing_waits_for_the_device_in_an_epoch(
    algorithm: type[FederatedModule], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[str] = []
    steps: list[int] = []
    step = algorithm.training_step

    def watched(module: Any, batch: Any, batch_idx: int) -> Any:
        with Waits() as mode:
            result = step(module, batch, batch_idx)
        waits.extend(mode.found if steps else [])  # the first one of a process may look at the network
        steps.append(batch_idx)
        return result

    monkeypatch.setattr(algorithm, "training_step", watched)
    data = tiny_data()
    module = algorithm(NUM_CLASSES, 1, "tests.tiny.tiny_resnet", info=data.info, **options)
    Orchestrator(module, data, num_rounds=1, local_epochs=1, trainer=TrainerConfig("cpu", precision="32-true")).run()
    assert len(steps) > 1
    assert waits == []


# Trainers


def test_a_trainer_is_fresh_and_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainerConfig("cpu", precision="32-true").resolved()
    config.build()
    built: list[dict[str, Any]] = []
    make = pl.Trainer.__init__

    def counted(self: pl.Trainer, *args: Any, **options: Any) -> None:
        built.append(options)
        make(self, *args, **options)

    monkeypatch.setattr(pl.Trainer, "__init__", counted)
    one, other, longer = config.build(max_epochs=2), config.build(max_epochs=2), config.build(max_epochs=3)
    assert len(built) == 2  # of each kind of options one; the rest is unpickled: Lightning's Trainer can be pickled
    assert (one.max_epochs, other.max_epochs, longer.max_epochs) == (2, 2, 3)
    assert one.fit_loop is not other.fit_loop
    assert one.strategy is not other.strategy
    assert one.strategy.precision_plugin is not other.strategy.precision_plugin
    assert one.fit_loop.trainer is one
    data = tiny_data(num_clients=2)
    with quiet():
        one.fit(FedAvg(NUM_CLASSES, 1, "tests.tiny.tiny_resnet", info=data.info), data.client(0).train_loader(0))
    assert (one.current_epoch, other.current_epoch, config.build(max_epochs=2).current_epoch) == (2, 0, 0)


class Unpicklable(pl.Callback):
    def __init__(self) -> None:
        self.handle = lambda: None


def test_a_callback_that_another_package_plugs_in_is_new_for_each_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainerConfig("cpu", precision="32-true").resolved()
    monkeypatch.setattr(registry, "entry_points", lambda group: [SimpleNamespace(name="x", load=lambda: Unpicklable)])
    callbacks = [next(c for c in config.build().callbacks if isinstance(c, Unpicklable)) for _ in range(2)]  # type: ignore[attr-defined]
    assert callbacks[0] is not callbacks[1]


def test_determinism_is_set_each_time() -> None:
    config = TrainerConfig("cpu", precision="32-true", deterministic=True).resolved()
    try:
        config.build()
        torch.use_deterministic_algorithms(False)
        config.build()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_quiet_within_quiet_ends_with_the_outer_one() -> None:
    logger = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    before = logger.level
    with quiet():
        with quiet():
            pass
        assert logger.level == logging.WARNING
    assert logger.level == before
