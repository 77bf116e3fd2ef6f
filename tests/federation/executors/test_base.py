"""What is sent to workers: little, and all that they need."""

import pickle
from typing import Any

import pytest
import torch

from fedamm_pl import FedAMM, FedAvg, FederatedDataModule
from fedamm_pl.federation.executors import RunSpec
from fedamm_pl.federation.executors.base import copied
from fedamm_pl.federation.trainer import quiet
from fedamm_pl.protocol.codec import encode
from fedamm_pl.protocol.messages import ClientTask
from fedamm_pl.seeding import derive_seed
from tests.federation.executors.methods import Scripted
from tests.federation.small import CPU, assert_equal, make, spec
from tests.tiny import tiny_data, tiny_resnet


@pytest.fixture(scope="module")
def shipped() -> FederatedDataModule:
    """The data set of the package with 20 clients, set up."""
    data = FederatedDataModule(num_clients=20)
    data.setup()
    return data


def test_a_task_is_less_than_a_kilobyte() -> None:
    task = ClientTask(10**6, derive_seed(0, "client", 1, 0))
    assert len(pickle.dumps(task)) < 1000
    assert len(encode(task)) < 1000


def test_a_description_holds_no_images_and_no_weights(shipped: FederatedDataModule) -> None:
    module = FedAMM(shipped.num_classes, shipped.in_channels, "resnet32", info=shipped.info)
    assert len(pickle.dumps(shipped)) < 20_000
    assert sum(value.nbytes for value in module.state_dict().values()) > 1_000_000
    content = spec(module, shipped).pickled()  # type: ignore[arg-type]
    assert len(content) < 100_000


def test_a_description_in_another_process_makes_the_same(shipped: FederatedDataModule) -> None:
    module = FedAMM(shipped.num_classes, shipped.in_channels, "small_cnn", info=shipped.info, meta_lr=0.5)
    before = torch.random.get_rng_state()
    content = RunSpec(module, shipped, CPU, 7, 3).pickled()
    assert torch.equal(torch.random.get_rng_state(), before)
    found: RunSpec = pickle.loads(content)
    assert (found.seed, found.threads, found.trainer) == (7, 3, CPU)
    assert found.data.content_hash == shipped.content_hash
    assert [found.data.client_size(client) for client in range(20)] == [shipped.client_size(c) for c in range(20)]
    assert type(found.module) is FedAMM
    assert dict(found.module.hparams) == dict(module.hparams)
    assert list(found.module.state_dict()) == list(module.state_dict())


def test_a_network_that_is_a_module_is_sent_with_its_weights() -> None:
    data = tiny_data()
    module = make(FedAvg, data, model=tiny_resnet(4, 1))
    module.model.conv1.weight.requires_grad = False
    found: RunSpec = pickle.loads(spec(module, data).pickled())
    assert_equal(dict(found.module.state_dict()), dict(module.state_dict()))
    assert not found.module.model.conv1.weight.requires_grad  # type: ignore[union-attr]


def test_options_of_a_class_of_ones_own_arrive() -> None:
    data = tiny_data()
    module = make(Scripted, data, folder="somewhere", meta_update="synchronous")
    found: RunSpec = pickle.loads(spec(module, data).pickled())
    assert found.module.hparams["folder"] == "somewhere"
    assert found.module.asks_in_fit


class Frozen(FedAvg):
    """Trains all but the first layer, as its options say."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.model.conv1.weight.requires_grad = False  # type: ignore[union-attr]


@pytest.mark.parametrize("change", ["frozen", "more", "less"])
def test_a_module_that_its_options_do_not_make_is_refused_by_name(change: str) -> None:
    data = tiny_data()
    module = make(Frozen if change == "frozen" else FedAvg, data)
    if change == "frozen":
        spec(module, data).pickled()  # a class of one's own that freezes is as its options make it
        module.model.conv1.weight.requires_grad = True
    elif change == "more":
        module.model.register_buffer("conv1a", torch.zeros(1))
    else:
        module.model.conv1 = torch.nn.Conv2d(1, 5, 3)
    with pytest.raises(ValueError, match=r"differs in model\.conv1.*\. Pass the network as a Module"):
        spec(module, data).pickled()


def test_another_layer_without_weights_is_a_difference() -> None:
    data = tiny_data()
    module = FedAvg(data.num_classes, 1, "small_cnn", info=data.info)
    spec(module, data).pickled()
    module.model.features[2] = torch.nn.Tanh()  # type: ignore[index,union-attr]
    with pytest.raises(ValueError, match=r"differs in model\.features\.2 "):
        spec(module, data).pickled()


def test_changed_weights_are_no_difference() -> None:
    data = tiny_data()
    module = make(FedAvg, data)
    for value in module.state_dict().values():
        value.zero_()
    spec(module, data).pickled()  # they come with the broadcast


def test_a_copy_has_no_trainer_and_no_compiled_network() -> None:
    data = tiny_data()
    module = make(FedAvg, data)
    module.compiled = lambda images: module.model(images)
    trainer = CPU.build(max_epochs=1)
    with quiet():
        trainer.fit(module, data.client(0).train_loader(0))
    found = copied(module)
    assert found._trainer is None
    assert found.compiled is None
    assert module.trainer is trainer
    assert_equal(dict(found.state_dict()), dict(module.state_dict()))
    assert found.model.conv1.weight is not module.model.conv1.weight  # type: ignore[union-attr]
