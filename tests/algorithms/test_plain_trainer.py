"""FedAMM in a plain Lightning Trainer: what steps, loaders, options and compilers mean there."""

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fedamm_pl import FedAMM
from fedamm_pl.algorithms.meta import meta_gradient
from fedamm_pl.algorithms.meta.plain_trainer import check_trainer
from fedamm_pl.federation.trainer import quiet
from tests.tiny import tiny_data

DATA = TensorDataset(torch.randn(40, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3)
NUM_BATCHES = 5


@pytest.fixture(autouse=True)
def silence() -> Iterator[None]:
    with quiet():
        yield


def network(*, features: int = 16, num_classes: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(features, num_classes))


class Watched(FedAMM):
    """Counts batches."""

    batches = 0

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.batches += 1
        super().training_step(batch, batch_idx)


def made(model: nn.Module | None = None, **options: Any) -> Watched:
    return Watched(3, 1, model=model or network(), **{"differentiation": "forward", **options})


def loaders(meta_batch: int = 8, train: Any = None) -> dict[str, Any]:
    return {"train": DataLoader(DATA, 8) if train is None else train, "meta": DataLoader(DATA, meta_batch)}


def trainer(**options: Any) -> pl.Trainer:
    quiet_options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    defaults = {"max_epochs": 1, "accelerator": "cpu", "enable_model_summary": False, **quiet_options}
    return pl.Trainer(**{**defaults, **options})


class Stream(IterableDataset[Any]):
    """Examples without a number of them."""

    def __iter__(self) -> Iterator[Any]:
        return (DATA[index] for index in range(len(DATA)))


@pytest.mark.parametrize("meta_interval", [1, 3])
def test_steps_are_batches(meta_interval: int) -> None:
    module, fit = made(meta_interval=meta_interval), trainer(max_steps=7, max_epochs=-1)
    fit.fit(module, loaders())
    assert module.batches == fit.global_step == 7


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
def test_checkpoints_are_named_by_batches(tmp_path: Any) -> None:
    every = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
    fit = trainer(enable_checkpointing=True, callbacks=[every])
    fit.fit(made(), loaders())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch=0-step=2.ckpt", "epoch=0-step=4.ckpt"]


@pytest.mark.parametrize(
    ("meta_batch", "options", "expected"),
    [
        (8, {"limit_train_batches": 0.6}, 3),
        (40, {"limit_train_batches": 3}, 3),
        (1, {"limit_train_batches": 3}, 3),
        (1, {"limit_train_batches": 0.6}, 3),
        (40, {"overfit_batches": 2}, 2),
        (1, {"fast_dev_run": True}, 1),
    ],
)
def test_limits_count_train_batches(meta_batch: int, options: dict[str, Any], expected: int) -> None:
    module = made()
    trainer(**options).fit(module, loaders(meta_batch))
    assert module.batches == expected


def test_a_share_that_leaves_no_meta_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`limit_train_batches` .* got 0.5 with a meta loader of 1\."):
        trainer(limit_train_batches=0.5).fit(made(), loaders(40))


@pytest.mark.parametrize(("limit", "expected"), [(0.5, 4), (3, 3), (1.0, 8)])
def test_data_module_can_be_limited(limit: float, expected: int) -> None:
    data = tiny_data()
    module = FedAMM(4, 1, model=network(features=64, num_classes=4), info=data.info, differentiation="forward")
    fit = trainer(limit_train_batches=limit)
    fit.fit(module, datamodule=data)
    assert fit.global_step == expected


def test_validation_that_would_never_come_is_refused() -> None:
    with pytest.raises(
        ValueError, match="`val_check_interval` to be at most the 5 batches of the train loader, got 20"
    ):
        trainer(val_check_interval=20).fit(made(), loaders(1), DataLoader(DATA, 8))


@pytest.mark.parametrize("option", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 1.0}])
def test_lightning_refuses_what_manual_optimisation_would_ignore(option: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match="not supported for manual optimization"):
        trainer(**option).fit(made(), loaders())


class Scheduled(Watched):
    """Adds a scheduler, as one would to another method."""

    def configure_optimizers(self) -> Any:
        optimizers = super().configure_optimizers()
        return optimizers, [torch.optim.lr_scheduler.StepLR(optimizers[0], 1)]


def test_schedulers_that_nobody_steps_are_said(caplog: pytest.LogCaptureFixture) -> None:
    trainer().fit(Scheduled(3, 1, model=network()), loaders())
    assert "Lightning steps none of the LR schedulers" in caplog.text


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_take_the_network_apart_are_refused(strategy: type) -> None:
    fake: Any = SimpleNamespace(precision="32-true", strategy=strategy.__new__(strategy))
    with pytest.raises(ValueError, match=f"`strategy` to be one device or ddp for FedAMM, .* got {strategy.__name__}"):
        check_trainer(fake)


def test_ddp_is_taken() -> None:
    source = SimpleNamespace(instance=None)
    fake: Any = SimpleNamespace(
        precision="32-true",
        strategy=DDPStrategy(),
        lr_scheduler_configs=[],
        fit_loop=SimpleNamespace(_data_source=source),
        limit_train_batches=1.0,
    )
    check_trainer(fake)


@pytest.mark.parametrize("mode", ["min_size", "max_size", "sequential"])
def test_another_way_to_combine_loaders_is_refused(mode: Any) -> None:
    with pytest.raises(ValueError, match=f'to have the mode "max_size_cycle", got "{mode}"'):
        trainer().fit(made(), CombinedLoader(loaders(40), mode))


def test_the_right_combined_loader_is_taken() -> None:
    module = made()
    trainer().fit(module, CombinedLoader(loaders(1), "max_size_cycle"))
    assert module.batches == NUM_BATCHES


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"a": DataLoader(DATA, 8), "b": DataLoader(DATA, 8)}, r"got the loaders \['a', 'b'\]"),
        ([DataLoader(DATA, 8), DataLoader(DATA, 8)], "got list"),
        ({"train": DataLoader(DATA, 8), "meta": [DataLoader(DATA, 8)] * 2}, 'one "meta" loader for FedAMM .* got 2'),
        ({"train": DataLoader(Stream(), 8), "meta": DataLoader(DATA, 8)}, "a train loader with a length"),
    ],
)
def test_other_loaders_are_refused_in_one_line(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        trainer().fit(made(), given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("meta_batch", "options"), [(40, {}), (8, {"limit_train_batches": NUM_BATCHES})])
def test_a_stream_is_taken_where_its_end_is_known(meta_batch: int, options: dict[str, Any]) -> None:
    module = made()
    trainer(**options).fit(module, loaders(meta_batch, DataLoader(Stream(), 8)))
    assert module.batches == NUM_BATCHES


def trained(module: Any) -> dict[str, torch.Tensor]:
    trainer().fit(module, loaders())
    return getattr(module, "_orig_mod", module).shared_state()


@pytest.mark.parametrize("way", ["higher", "functional", "forward"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler looks at it
def test_compiled_module_trains_as_the_plain_one(way: str, backend: str) -> None:
    expected = trained(made(differentiation=way, meta_lr=1.0))
    compiled = torch.compile(made(differentiation=way, meta_lr=1.0), backend=backend)
    torch.testing.assert_close(trained(compiled), expected)


@pytest.mark.parametrize("way", ["higher", "functional", "forward"])
def test_compiled_network_trains_as_the_plain_one(way: str) -> None:
    expected = trained(made(differentiation=way, meta_lr=1.0))
    actual = trained(made(torch.compile(network(), backend="eager"), differentiation=way, meta_lr=1.0))
    torch.testing.assert_close(list(actual.values()), list(expected.values()))


def hooked() -> nn.Sequential:
    model = network()
    model[1].register_forward_hook(lambda part, inputs, output: output * part.bias.exp())
    return model


def test_another_way_is_taken_and_said_where_one_is_not_right(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        actual = trained(made(hooked(), differentiation="higher", meta_lr=1.0))
    said = [record.getMessage() for record in caplog.records if "differentiation" in record.getMessage()]
    assert said == [
        "differentiation higher is not right for Sequential (its gradient differs from the network's own): "
        "functional is taken instead"
    ]
    expected = trained(made(hooked(), differentiation="functional", meta_lr=1.0))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_a_hook_that_comes_between_two_fits_is_seen(caplog: pytest.LogCaptureFixture) -> None:
    module = made(differentiation="higher")
    trainer().fit(module, loaders())
    module.model[1].register_forward_hook(lambda part, inputs, output: output * 2)
    with caplog.at_level(logging.WARNING):
        trainer().fit(module, loaders())
    assert "functional is taken instead" in caplog.text


def test_a_network_without_second_derivatives_is_refused_before_the_first_step() -> None:
    class Reentrant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 3))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            hidden = self.layers[0](images.flatten(1))
            return torch.utils.checkpoint.checkpoint(self.layers[1], hidden, use_reentrant=True)

    module = made(Reentrant())
    before = module.shared_state()
    with pytest.raises(
        ValueError, match="differentiation forward is right for, got Reentrant: When use_reentrant=True"
    ):
        trainer().fit(module, loaders())
    torch.testing.assert_close(module.shared_state(), before, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Found 1 module")
def test_parts_that_are_frozen_in_evaluation_mode_stay_so() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    model[2].eval()
    batch = DATA[:8]
    params = dict(model.named_parameters())
    actual, _ = meta_gradient(model, params, batch)
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    torch.testing.assert_close(actual, {name: value.grad for name, value in params.items()})
    module = made(model)
    trainer().fit(module, loaders())
    assert not module.model[2].training
    assert int(module.model[2].num_batches_tracked) == 0
