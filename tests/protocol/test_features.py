"""Modules that take the raw features of a table: standardised once, whatever the precision, in a Trainer and out of it."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fedamm_pl import FedAMM, FedAvg, Orchestrator
from fedamm_pl.algorithms import FedETF
from fedamm_pl.data.sources import ImageInfo
from tests.federation.small import CPU
from tests.tiny import FEATURES, NUM_CLASSES, TinyTable, tiny_table

MEAN, STD = [3e6, 0.0, -5.0], [100.0, 1e-3, 2.0]
INFO = ImageInfo(image_size=[], mean=MEAN, std=STD)


@pytest.fixture(scope="module")
def data() -> TinyTable:
    return tiny_table()


def raw(number: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.tensor(MEAN) + torch.tensor(STD) * torch.randn(number, 3, generator=generator)


def standardised(features: Tensor) -> Tensor:
    return (features.double() - torch.tensor(MEAN).double()) / torch.tensor(STD).double()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_features_are_standardised_before_they_take_the_type_of_the_weights(dtype: torch.dtype) -> None:
    module = FedAvg(2, 3, "mlp", info=INFO).to(dtype)
    prepared = module.prepare(raw())
    assert prepared.dtype == dtype
    expected = standardised(raw())
    torch.testing.assert_close(
        prepared.double(), expected, rtol=2.0**-8 if dtype == torch.bfloat16 else 1e-4, atol=1e-6
    )
    assert module(raw()).dtype == dtype


def test_statistics_go_where_the_module_goes_and_keep_their_type() -> None:
    module = FedAvg(2, 3, "mlp", info=INFO).to(torch.bfloat16).to("meta")
    assert module.prepare(raw().to("meta")).device.type == "meta"
    assert module.takes_features
    kept = [value for value in vars(module).values() if isinstance(value, Tensor)]
    assert {(value.device.type, value.dtype) for value in kept} == {("meta", torch.float32)}


def test_features_without_statistics_are_taken_as_they_are() -> None:
    module = FedAvg(2, 3, "mlp", info=ImageInfo(image_size=[]))
    assert torch.equal(module.prepare(raw()), raw())


@pytest.mark.parametrize("shape", [(5, 2), (3,), (5, 1, 3), (5, 4, 4, 3)])
def test_examples_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    module = FedAvg(2, 3, "mlp", info=INFO)
    with pytest.raises(ValueError, match=r"^Expected features of shape \(B, 3\), got \("):
        module(torch.zeros(shape))


class Noting(nn.Module):
    """Notes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.seen = nn.Linear(3, 2), list[Tensor]()

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen.append(inputs.detach().clone())
        return self.linear(inputs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_a_plain_trainer_of_any_precision_gives_the_network_what_was_standardised_once(
    stage: str, precision: Any
) -> None:
    network = Noting()
    module, loader = (
        FedAvg(2, 3, network, info=INFO),
        DataLoader(TensorDataset(raw(), torch.arange(40) % 2), batch_size=40),
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        precision=precision,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    getattr(trainer, stage)(module, loader)
    (seen,) = network.seen
    torch.testing.assert_close(
        seen.double(), standardised(raw()), rtol=2.0**-8 if "bf16" in precision else 1e-4, atol=1e-6
    )
    images = torch.ones(1)
    converted = trainer.precision_plugin.convert_input(images)  # of the next module, as it was before
    assert converted.dtype == {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(precision, torch.float32)


@pytest.mark.parametrize("network", ["mlp", "mlp-7"])
def test_a_run_on_features_leaves_a_model_that_stands_alone(network: str, data: TinyTable, tmp_path: Path) -> None:
    module = FedAvg(NUM_CLASSES, data.in_channels, network, lr=0.1, info=data.info)
    run = Orchestrator(module, data, num_rounds=3, client_fraction=1.0, output_dir=tmp_path, trainer=CPU)
    run.run()
    assert data.in_channels == FEATURES
    assert run.state.history[-1]["test/acc"] > 0.6
    loaded = FedAvg.load_from_checkpoint(tmp_path / "final.ckpt").eval()
    features, labels = data.images.test_images[:], data.images.test_labels
    chances = loaded.predict_step(features)
    assert torch.equal(chances, run.module.eval().predict_step((features, labels)))
    accuracy = float((chances.argmax(1) == labels).float().mean())
    assert accuracy > 0.6
    with torch.no_grad():
        expected = loaded.model((features - torch.tensor(data.info["mean"])) / torch.tensor(data.info["std"]))
    torch.testing.assert_close(loaded(features), expected)


def test_low_precision_learns_features_as_well_as_full(data: TinyTable) -> None:
    found = []
    for precision in ("32-true", "bf16-true"):
        torch.manual_seed(0)
        module = FedAvg(NUM_CLASSES, FEATURES, "mlp", lr=0.1, info=data.info)
        trainer: Any = type(CPU)(accelerator="cpu", precision=precision)
        run = Orchestrator(module, data, num_rounds=3, client_fraction=1.0, trainer=trainer)
        run.run()
        found.append(run.state.history[-1]["test/acc"])
    assert found[1] == pytest.approx(found[0], abs=0.1)
    assert min(found) > 0.6


def test_a_network_for_images_is_refused_before_the_first_round_with_one_that_does(data: TinyTable) -> None:
    module = FedAvg(NUM_CLASSES, FEATURES, "small_cnn", info=data.info)
    line = (
        r"^Expected `model` to take features of shape \(6,\), got small_cnn, which raises .*; mlp and mlp-256-128 do\.$"
    )
    with pytest.raises(ValueError, match=line):
        Orchestrator(module, data, num_rounds=1, trainer=CPU).run()
    with pytest.raises(ValueError, match=line.replace("small_cnn", "SmallCNN")):
        FedETF(NUM_CLASSES, FEATURES, "small_cnn", info=data.info)


@pytest.mark.parametrize("kind", [FedAvg, FedAMM])
def test_an_mlp_must_know_what_it_takes(kind: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^Expected `info` to hold image_size .*\(\[\] if it takes features\), got none"
    ):
        kind(2, 3, "mlp")
    torch.manual_seed(0)
    images = kind(2, 3, "mlp", info=ImageInfo(image_size=[4, 5]))
    assert images.model.features[0].weight.shape == (64, 60)
    assert images(torch.zeros(2, 3, 4, 5, dtype=torch.uint8)).shape == (2, 2)


@pytest.mark.filterwarnings("ignore")
def test_meta_weight_net_on_features_in_a_plain_trainer_learns(data: TinyTable) -> None:
    torch.manual_seed(0)
    module = FedAMM(NUM_CLASSES, FEATURES, "mlp", lr=0.1, info=data.info)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=4, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module, datamodule=data)
    (found,) = trainer.test(module, datamodule=data, verbose=False)
    assert found["test/acc"] > 0.6
    chances = trainer.predict(module, datamodule=data)
    assert sum(len(part) for part in chances or []) == len(data.images.test_labels)
