"""One round of FedAMM against a plain re-implementation of the method, its limit cases, and the plain Trainer."""

import copy
import inspect
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils.data import DataLoader

from fedamm_pl import FedAMM, FedAvg, FederatedModule, Orchestrator
from fedamm_pl.algorithms.meta.tallies import described
from fedamm_pl.data.client import BatchLoader
from fedamm_pl.federation.trainer import TrainerConfig, quiet
from fedamm_pl.models import WeightNet
from fedamm_pl.protocol.messages import Question
from fedamm_pl.seeding import derive_seed
from tests.one_round import Round
from tests.tiny import NUM_CLASSES, TinyData, tiny_data, tiny_resnet

LR, META_LR, MOMENTUM, DECAY = 0.05, 0.3, 0.9, 5e-4
DOUBLE = TrainerConfig(accelerator="cpu", precision="64-true")
State = dict[str, Tensor]


def make(algorithm: type[FederatedModule], data: TinyData, **options: Any) -> Any:
    """Build a module with the same float64 weights for every algorithm."""
    torch.manual_seed(0)
    options = {"lr": LR, "info": data.info, **({"meta_lr": META_LR} if algorithm is FedAMM else {}), **options}
    module = algorithm(NUM_CLASSES, 1, model="tests.tiny.tiny_resnet", **options).double()
    if isinstance(module, FedAMM):
        for parameter in module.weight_net.parameters():
            parameter.data.mul_(2)
    return module


class Reference:
    """Section 2 of the method with nothing but torch: explicit loops, hand-written Nesterov momentum."""

    def __init__(self, module: FedAMM) -> None:
        self.model = copy.deepcopy(module.model).train()
        self.v = {name: value.detach().clone() for name, value in module.weight_net.named_parameters()}
        self.velocity: State = {}
        self.v_velocity: State = {}
        self.mean, self.std = module.mean, module.std

    def prepare(self, images: Tensor) -> Tensor:
        return (images.double() / 255 - self.mean.view(1, -1, 1, 1)) / self.std.view(1, -1, 1, 1)

    @staticmethod
    def weigh(v: State, losses: Tensor) -> Tensor:
        hidden = torch.relu(losses[:, None] @ v["layers.0.weight"].T + v["layers.0.bias"])
        raw = torch.sigmoid(hidden @ v["layers.2.weight"].T + v["layers.2.bias"])[:, 0]
        return raw / raw.sum()

    def losses(self, params: State, images: Tensor, labels: Tensor) -> Tensor:
        buffers = {name: value.clone() for name, value in self.model.named_buffers()}
        logits = functional_call(self.model, {**params, **buffers}, (self.prepare(images),))
        return -torch.log_softmax(logits, 1)[torch.arange(len(labels)), labels]

    def weight_net_gradient(self, support: tuple[Tensor, Tensor], meta: tuple[Tensor, Tensor]) -> State:
        """Back-propagate the meta loss through the virtual step."""
        v = {name: value.clone().requires_grad_() for name, value in self.v.items()}
        w = {name: value.detach().clone().requires_grad_() for name, value in self.model.named_parameters()}
        losses = self.losses(w, *support)
        grads = torch.autograd.grad((self.weigh(v, losses) * losses).sum(), list(w.values()), create_graph=True)
        w_hat = {name: value - LR * grad for (name, value), grad in zip(w.items(), grads, strict=True)}
        return dict(zip(v, torch.autograd.grad(self.losses(w_hat, *meta).mean(), list(v.values())), strict=True))

    @staticmethod
    def nesterov(value: Tensor, grad: Tensor, velocity: State, name: str, lr: float) -> Tensor:
        grad = grad + DECAY * value
        velocity[name] = MOMENTUM * velocity[name] + grad if name in velocity else grad
        return value - lr * (grad + MOMENTUM * velocity[name])

    def train_step(self, images: Tensor, labels: Tensor) -> None:
        logits = self.model(self.prepare(images))  # moves the BatchNorm statistics
        losses = -torch.log_softmax(logits, 1)[torch.arange(len(labels)), labels]
        omega = self.weigh(self.v, losses.detach())
        params = dict(self.model.named_parameters())
        grads = torch.autograd.grad((omega * losses).sum(), list(params.values()))
        with torch.no_grad():
            for (name, value), grad in zip(params.items(), grads, strict=True):
                value.copy_(self.nesterov(value, grad, self.velocity, name, LR))

    def update_v(self, h: State) -> None:
        self.v = {
            name: self.nesterov(value, h[name], self.v_velocity, f"v.{name}", META_LR) for name, value in self.v.items()
        }

    def result(self, v: State) -> State:
        state = {f"model.{name}": value.detach().clone() for name, value in self.model.state_dict().items()}
        return {**state, **{f"weight_net.{name}": value for name, value in v.items()}}


def reference_round(module: FedAMM, data: TinyData, synchronous: bool, interval: int, epochs: int) -> State:
    """Run round 1 over all clients."""
    results, sizes = [], []
    for client in range(data.num_clients):
        mine, reference, step = data.client(client), Reference(module), 0
        seed = derive_seed(0, "client", 1, client)

        def meta(step: int, client: int = client) -> tuple[Tensor, Tensor]:
            return data.meta_batch(derive_seed(0, "meta", 1, client, step))

        v_k = dict(reference.v)
        if not synchronous:
            h = reference.weight_net_gradient(mine.support(seed), meta(0))
            v_k = {n: v - (1 + MOMENTUM) * META_LR * (h[n] + DECAY * v) for n, v in reference.v.items()}
        loader = mine.train_loader(seed)
        for _ in range(epochs):
            for images, labels in loader:
                if synchronous and step % interval == 0:
                    reference.update_v(reference.weight_net_gradient((images, labels), meta(step)))
                reference.train_step(images, labels)
                step += 1
        results.append(reference.result(reference.v if synchronous else v_k))
        sizes.append(mine.num_examples)
    average = {}
    for name, first in results[0].items():
        mean = sum(size * result[name].double() for size, result in zip(sizes, results, strict=True)) / sum(sizes)
        average[name] = mean if first.is_floating_point() else mean.round().to(first.dtype)
    return average


@pytest.mark.parametrize("differentiation", ["higher", "functional", "forward"])
@pytest.mark.parametrize(("meta_update", "interval"), [("asynchronous", 1), ("synchronous", 1), ("synchronous", 3)])
def test_round_equals_plain_implementation(meta_update: str, interval: int, differentiation: str) -> None:
    data = tiny_data(partition="by_dirichlet", dirichlet_alpha=1.0)
    options = {"meta_update": meta_update, "meta_interval": interval, "differentiation": differentiation}
    module = make(FedAMM, data, **options)
    expected = reference_round(module, data, meta_update == "synchronous", interval, epochs=2)
    before = module.shared_state()
    run = Orchestrator(module, data, num_rounds=1, client_fraction=1.0, local_epochs=2, trainer=DOUBLE)
    run.run()
    assert set(run.state.shared) == set(expected)
    assert (run.state.shared["weight_net.layers.2.weight"] - before["weight_net.layers.2.weight"]).abs().max() > 1e-4
    torch.testing.assert_close(run.state.shared, expected, rtol=1e-8, atol=1e-8)


def test_constant_weight_net_is_fedavg() -> None:
    data = tiny_data()
    fedamm, fedavg = make(FedAMM, data, meta_lr=0.0), make(FedAvg, data)
    for parameter in fedamm.weight_net.parameters():
        parameter.data.zero_()
    states = []
    for module in (fedamm, fedavg):
        run = Orchestrator(module, data, num_rounds=1, client_fraction=1.0, local_epochs=1, trainer=DOUBLE)
        run.run()
        states.append({name: value for name, value in run.state.shared.items() if name.startswith("model.")})
    torch.testing.assert_close(*states, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("meta_update", ["asynchronous", "synchronous"])
def test_meta_lr_0_returns_the_weight_net_exactly(meta_update: str) -> None:
    data = tiny_data()
    module = make(FedAMM, data, meta_lr=0.0, meta_update=meta_update)
    before = module.shared_state()
    run = Orchestrator(module, data, num_rounds=1, client_fraction=0.25, local_epochs=1, trainer=DOUBLE)
    run.run()
    for name, value in before.items():
        if name.startswith("weight_net."):
            assert torch.equal(run.state.shared[name], value)


class Modes(FedAMM):
    """Records whether the network is in training mode at each step."""

    modes: ClassVar[list[bool]] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.modes.append(all(part.training for part in self.model.modules()))
        super().training_step(batch, batch_idx)


def test_clients_train_in_training_mode_after_an_evaluation_too() -> None:
    data = tiny_data()
    module = make(Modes, data)
    Modes.modes.clear()
    module.eval()
    run = Orchestrator(module, data, num_rounds=2, local_epochs=1, eval_interval=1, trainer=DOUBLE)
    run.run()
    assert len(Modes.modes) > 4
    assert all(Modes.modes)
    assert run.state.shared["model.bn1.num_batches_tracked"] > 0


def test_bytes_of_a_client_are_counted_in_both_updates() -> None:
    data = tiny_data()
    sent = {}
    for meta_update in ("asynchronous", "synchronous"):
        module = make(FedAMM, data, meta_update=meta_update)
        run = Orchestrator(module, data, num_rounds=1, client_fraction=1.0, local_epochs=2, trainer=DOUBLE)
        sent[meta_update] = run.run()[-1]["client/bytes_sent"]
    state = sum(value.nbytes for value in run.state.shared.values())
    gradient = sum(value.nbytes for value in module.model.parameters())
    steps = 2 * len(data.client(0).train_loader(0))  # clients are of equal size
    assert sent["asynchronous"] == state + gradient
    assert sent["synchronous"] == state + steps * gradient


# In a plain Trainer it is Meta-Weight-Net.


def loaders(data: TinyData, num_meta_batches: int) -> dict[str, Any]:
    images = data.images
    train = BatchLoader(images.train_images, images.train_labels, torch.arange(50), 10, "none", seed=1)
    meta = DataLoader([data.meta_batch(step) for step in range(num_meta_batches)], batch_size=None)  # type: ignore[arg-type]
    return {"train": train, "meta": meta}


class Validations(pl.Callback):
    count = 0

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.count += 1


def plain_trainer(epochs: int, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs,
        **{"precision": "64-true", **options},
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@pytest.fixture
def silence() -> Iterator[None]:
    with quiet():
        yield


@pytest.mark.usefixtures("silence")
def test_plain_trainer_equals_meta_weight_net() -> None:
    data = tiny_data()
    module = make(FedAMM, data)
    reference, batches = Reference(module), loaders(data, num_meta_batches=3)
    for _ in range(2):
        meta = itertools.cycle(batches["meta"])
        for batch in batches["train"]:
            reference.update_v(reference.weight_net_gradient(batch, next(meta)))
            reference.train_step(*batch)
    plain_trainer(2).fit(module, loaders(data, num_meta_batches=3))
    torch.testing.assert_close(module.shared_state(), reference.result(reference.v), rtol=1e-8, atol=1e-8)


@pytest.mark.usefixtures("silence")
@pytest.mark.parametrize("differentiation", ["higher", "functional", "forward"])
def test_batch_is_weighted_by_the_updated_weight_net_under_autocast_too(differentiation: str) -> None:
    data = tiny_data()
    module = make(FedAMM, data, meta_lr=50.0, differentiation=differentiation).float()
    calls: list[tuple[Tensor, Tensor]] = []
    module.weight_net.register_forward_hook(lambda net, inputs, output: calls.append((inputs[0].detach(), output)))
    trainer = plain_trainer(1, precision="bf16-mixed", limit_train_batches=1)
    trainer.fit(module, loaders(data, num_meta_batches=1))
    losses, weights = calls[-1]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(weights, module.weight_net(losses))


def test_loss_scaling_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FedAMM, "trainer", SimpleNamespace(precision="16-mixed"))
    with pytest.raises(ValueError, match=r"precision` to be one without loss scaling for FedAMM, .* got '16-mixed'"):
        make(FedAMM, tiny_data()).on_fit_start()


@pytest.mark.usefixtures("silence")
def test_train_loader_sets_the_length_of_an_epoch() -> None:
    data, validations = tiny_data(), Validations()
    module = make(FedAMM, data)
    trainer = plain_trainer(2, callbacks=[validations], num_sanity_val_steps=0)
    trainer.fit(module, loaders(data, num_meta_batches=40), data.test_dataloader())
    assert trainer.global_step == 2 * 5  # epochs x train batches
    assert validations.count == 2
    assert "val/acc" in trainer.callback_metrics


@pytest.mark.usefixtures("silence")
@pytest.mark.parametrize(
    ("options", "steps", "validations"),
    [
        ({"val_check_interval": 2}, 5, 2),
        ({"val_check_interval": 0.5}, 5, 2),
        ({"limit_train_batches": 0.6}, 3, 1),
        ({"limit_train_batches": 2}, 2, 1),
        ({"reload_dataloaders_every_n_epochs": 1}, 5, 1),
    ],
)
def test_options_of_the_trainer_count_train_batches(options: dict[str, Any], steps: int, validations: int) -> None:
    data, counter = tiny_data(), Validations()
    trainer = plain_trainer(2, callbacks=[counter], num_sanity_val_steps=0, **options)
    trainer.fit(make(FedAMM, data), loaders(data, num_meta_batches=40), data.test_dataloader())
    assert trainer.global_step == 2 * steps
    assert counter.count == 2 * validations


@pytest.mark.usefixtures("silence")
def test_data_module_without_meta_set_is_refused() -> None:
    data = tiny_data(num_meta_per_class=0)
    with pytest.raises(ValueError, match="`num_meta_per_class` to be 1 or more for a meta set, got 0"):
        plain_trainer(1).fit(make(FedAMM, data), datamodule=data)


def test_support_and_meta_set_on_another_device_are_moved() -> None:
    data = tiny_data()
    module = make(FedAMM, data).to("meta")  # a device without arithmetic, but with its errors
    images, labels = module._on_device(*data.meta_batch(0))
    assert images.device == labels.device == torch.device("meta")
    question = {f"model.{name}": value.detach() for name, value in module.model.named_parameters()}
    answer = module.answer(Question(1, 0, 0, question), Round(make(FedAMM, data), data, DOUBLE).server.session)
    assert answer.payload.keys() == question.keys()


@pytest.mark.usefixtures("silence")
def test_plain_trainer_takes_the_data_module() -> None:
    data = tiny_data()
    for algorithm in (FedAMM, FedAvg):
        trainer = plain_trainer(1)
        module = make(algorithm, data)
        trainer.fit(module, datamodule=data)
        batches = -(-sum(data.info["class_counts"]) // 16)
        assert trainer.global_step == batches
        assert 0 < trainer.callback_metrics["train/loss"] < 2
        predictions = trainer.predict(module, datamodule=data)
        assert torch.cat(predictions).shape == (80, NUM_CLASSES)


@pytest.mark.usefixtures("silence")
def test_plain_trainer_without_meta_loader_is_refused() -> None:
    data = tiny_data()
    with pytest.raises(ValueError, match=r'loaders \{"train": ..., "meta": ...\} for FedAMM in a plain Trainer, got'):
        plain_trainer(1).fit(make(FedAMM, data), loaders(data, 1)["train"])


def test_defaults_are_those_of_fedavg() -> None:
    ours, base = (inspect.signature(algorithm).parameters for algorithm in (FedAMM, FedAvg))
    assert {name: ours[name].default for name in base} == {name: base[name].default for name in base}


@pytest.mark.parametrize(
    ("option", "value"),
    [("lr", 0.0), ("meta_lr", -1.0), ("meta_interval", 0), ("momentum", -0.1), ("lr", float("nan"))],
)
def test_options_out_of_range_are_refused(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"Expected `{option}` to be a number"):
        FedAMM(NUM_CLASSES, 1, tiny_resnet(NUM_CLASSES, 1), **{option: value})  # type: ignore[arg-type]


def test_tallies_that_a_client_has_made_up_are_described_by_numbers_that_can_be() -> None:
    lies = {"weights": torch.tensor([1.0, 4.0, -1.0, 2.0**53]), "examples": torch.tensor([0.0, 2.0, 1.0, 1e-300])}
    lies = {name: value.double() for name, value in lies.items()}
    shown = described(
        WeightNet(), {**lies, "losses": torch.tensor([-5.0, 0.0, 3.0, 1.0]).double()}, [0.0, 1.0, 2.0, 3.0]
    )
    assert shown["weight_per_class"] == [None, 2.0, None, None]
    assert shown["loss_histogram"] == [0.0, 0.0, 0.75, 0.25]
    nothing = described(WeightNet(), {**lies, "losses": -torch.ones(4).double()}, [0.0, 1.0, 2.0, 3.0])
    assert nothing["loss_histogram"] == [0.0] * 4
