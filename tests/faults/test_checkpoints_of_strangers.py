"""A Lightning checkpoint of a stranger gives a sound module or one line: no code runs, no name is imported, memory is bounded."""

import io
import math
import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from fedamm_pl import FedAMM, FedAvg, FederatedDataModule
from fedamm_pl.algorithms import FedETF
from fedamm_pl.data.sources import ImageInfo
from fedamm_pl.models import SmallCNN
from fedamm_pl.protocol.classifier import Classifier
from tests.tiny import TinyData, tiny_data

INFO = ImageInfo(
    image_size=[8, 8],
    mean=[0.5],
    std=[0.25],
    class_names=["a", "b", "c"],
    class_counts=[9, 5, 1],
    shot_rule="share",
    shot_groups={"many": [0], "medium": [1], "few": [2]},
)
Content = dict[str, Any]


def saved(module: pl.LightningModule, data: pl.LightningDataModule | None = None) -> Content:
    """What Lightning writes of a module."""
    trainer = pl.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    if data is not None:
        trainer._data_connector.attach_data(module, datamodule=data)
    content: Content = trainer._checkpoint_connector.dump_checkpoint(weights_only=True)
    return content


def packed(content: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return file


@pytest.fixture
def content() -> Content:
    """The checkpoint of a small FedAMM."""
    return saved(FedAMM(3, 1, "small_cnn", info=INFO))


def with_options(content: Content, **options: Any) -> io.BytesIO:
    return packed({**content, "hyper_parameters": {**content["hyper_parameters"], **options}})


def loaded(file: Any, kind: type[Classifier] = FedAMM) -> Any:
    """The module, or None if the file is refused in one line."""
    try:
        return kind.load_from_checkpoint(file)
    except ValueError as error:
        line = str(error)
    assert_good(line)
    return None


def assert_good(line: str) -> None:
    """Without advice to switch off what protects the reader."""
    assert line.startswith("Expected ")
    assert len(line.splitlines()) == 1, line
    assert len(line) < 700
    assert "weights_only" not in line
    assert "add_safe_globals" not in line


def refused(file: Any, kind: type[Classifier] = FedAMM, **options: Any) -> str:
    """The file must be refused in one line, which is returned."""
    with pytest.raises(ValueError, match=r"^Expected ") as error:
        kind.load_from_checkpoint(file, **options)
    assert_good(str(error.value))
    return str(error.value)


def test_a_sound_checkpoint_is_loaded_from_a_path_a_text_and_an_open_file(content: Content, tmp_path: Path) -> None:
    path = tmp_path / "final.ckpt"
    torch.save(content, path)
    with path.open("rb") as file:
        for source in (path, str(path), file, f"file://{path}"):
            module = FedAMM.load_from_checkpoint(source)
            assert module.info == INFO
            assert all(torch.equal(value, content["state_dict"][name]) for name, value in module.state_dict().items())


@pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's, on what this training lacks
def test_a_checkpoint_of_a_plain_trainer_is_loaded_with_all_that_it_holds(tmp_path: Path) -> None:
    class Scheduled(FedAvg):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])]

    callbacks: list[Any] = [
        pl.callbacks.ModelCheckpoint(tmp_path, "kept", monitor="train/loss"),
        pl.callbacks.EarlyStopping("train/loss"),
    ]
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        callbacks=callbacks,
        enable_model_summary=False,
    )
    module = Scheduled(4, 1, "small_cnn", info=None)
    data = tiny_data()
    trainer.fit(module, datamodule=data)
    loaded = Scheduled.load_from_checkpoint(tmp_path / "kept.ckpt", lr=0.5)
    assert loaded.hparams["lr"] == 0.5
    assert loaded.state_dict().keys() == module.state_dict().keys()
    found = TinyData.load_from_checkpoint(tmp_path / "kept.ckpt")
    assert dict(found.hparams) == dict(data.hparams)
    again = pl.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    again.fit(module, datamodule=data, ckpt_path=tmp_path / "kept.ckpt")
    assert again.current_epoch == 3


def test_a_sound_checkpoint_draws_what_it_drew_before(content: Content) -> None:
    """The look at the sizes leaves the random state alone: weights are drawn once."""
    torch.manual_seed(0)
    FedAMM(3, 1, "small_cnn", info=INFO)
    expected = torch.rand(3)
    torch.manual_seed(0)
    FedAMM.load_from_checkpoint(packed(content))
    assert torch.equal(torch.rand(3), expected)


# Names


@pytest.mark.parametrize("model", ["subprocess.check_output", "os.system", "tests.tiny.tiny_resnet", "SmallCNN", ""])
def test_a_network_that_is_not_registered_is_not_imported(
    model: str, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.import_module", lambda *_: pytest.fail("imported"))
    line = refused(with_options(content, model=model))
    assert "Expected the network in the checkpoint to be one of small_cnn, resnet20" in line
    assert f"got {model!r}" in line
    assert "`model`" in line
    assert "`trust_model=True`" in line


def test_a_command_in_the_options_is_not_run(content: Content, tmp_path: Path) -> None:
    options = {"model": "subprocess.check_output", "num_classes": ["touch", str(tmp_path / "ran")], "in_channels": -1}
    refused(with_options(content, **options))
    refused(with_options(content, **options), trust_model=True)  # trust is in a network, not in options of any type
    assert not (tmp_path / "ran").exists()


def test_a_trusted_network_is_imported() -> None:
    content = saved(FedAvg(4, 1, "tests.tiny.tiny_resnet"))
    with pytest.raises(ValueError, match=r"got 'tests\.tiny\.tiny_resnet': pass the network"):
        FedAvg.load_from_checkpoint(packed(content))
    module = FedAvg.load_from_checkpoint(packed(content), trust_model=True)
    assert torch.equal(module.model.conv1.weight, content["state_dict"]["model.conv1.weight"])


class Renamed(FedAvg):
    """Passes its own option on as the network."""

    def __init__(self, num_classes: int, network: str = "small_cnn") -> None:
        super().__init__(num_classes, 1, network)


@pytest.mark.parametrize("model", ["mlp", "mlp-12-9", "resnet8_wide", "squeezenet1_1"])
def test_every_network_that_has_a_name_is_built_from_a_file(model: str) -> None:
    info = ImageInfo(image_size=[40, 40])
    content = saved(FedAvg(4, 3, model, info=info))
    module = FedAvg.load_from_checkpoint(packed(content))
    assert_same(module.state_dict(), content["state_dict"])
    assert module.predict_step(torch.zeros(2, 3, 40, 40)).shape == (2, 4)


def assert_same(found: Content, expected: Content) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize("model", ["mlp-99999-99999", "vit_h_14", "regnet_y_128gf"])
def test_a_large_network_is_not_built_of_a_small_file(model: str) -> None:
    content = saved(FedAvg(4, 3, "small_cnn", info=ImageInfo(image_size=[32, 32])))
    line = refused(with_options(content, model=model), FedAvg)
    assert re.search(r"to fit its \d+ bytes, got some that take \d{10,} bytes", line)


def test_a_network_by_another_name_is_not_imported_either(monkeypatch: pytest.MonkeyPatch) -> None:
    content = saved(Renamed(4))
    del content["hyper_parameters"]["model"]
    assert Renamed.load_from_checkpoint(packed(content)).hparams["network"] == "small_cnn"
    given = Renamed.load_from_checkpoint(packed(content), network="fedamm_pl.models.cnn.SmallCNN")
    assert given.hparams["network"] == "fedamm_pl.models.cnn.SmallCNN"  # the caller's
    assert "got 'os.abort' from a file" in refused(with_options(content, network="os.abort"), Renamed)


def test_the_callers_network_stands_in_place_of_the_files(content: Content) -> None:
    network = SmallCNN(3, 1)
    module = FedAMM.load_from_checkpoint(with_options(content, model="no.such"), model=network)
    assert module.model is network
    assert torch.equal(network.classifier.weight, content["state_dict"]["model.classifier.weight"])


def test_what_lightning_would_call_is_not_called(content: Content, tmp_path: Path) -> None:
    """Neither its own names of things to call, nor those of older versions."""
    called = {"_instantiator": "os.mkdir", "_class_path": "os.mkdir"}
    more = {"hparams_type": "os.mkdir", "hparams_name": "model", "hparams_file": "x.yaml", "hparams": {"lr": "no"}}
    options = {**content["hyper_parameters"], **called}
    module = FedAMM.load_from_checkpoint(packed({**content, **more, "hyper_parameters": options}))
    assert module.hparams["lr"] == 0.01
    assert not set(module.hparams) & {*called, *more}


@pytest.mark.parametrize("name", ["_instantiator", "datamodule_hparams_type", "datamodule_hparams_name"])
def test_a_data_module_calls_nothing_either(name: str, tmp_path: Path) -> None:
    content = saved(
        FedAvg(10, 1, "small_cnn"), FederatedDataModule(num_clients=7, shot_rule="index", shot_ranges={"all": (0, 9)})
    )
    options = {**content["datamodule_hyper_parameters"], "_instantiator": "os.mkdir"}
    file = packed({**content, "datamodule_hyper_parameters": options, name: "os.mkdir"})
    data = FederatedDataModule.load_from_checkpoint(file, batch_size=5)
    assert (data.num_clients, data.hparams["batch_size"]) == (7, 5)
    assert data.hparams["shot_ranges"] == {"all": (0, 9)}


@pytest.mark.parametrize(
    ("option", "value"),
    [("num_clients", "7"), ("seed", 0.5), ("partition", 3), ("shot_ranges", {"all": [0, 9, 1]}), ("root", None)],
)
def test_a_data_module_refuses_options_of_other_types(option: str, value: Any) -> None:
    content = {"datamodule_hyper_parameters": {option: value}}
    with pytest.raises(
        ValueError, match=rf"^Expected `{option}` in the checkpoint to be .* for FederatedDataModule, got"
    ):
        FederatedDataModule.load_from_checkpoint(packed(content))
    with pytest.raises(
        ValueError, match=r"options in the checkpoint to make a FederatedDataModule, got: Expected `batch"
    ):
        FederatedDataModule.load_from_checkpoint(packed({"datamodule_hyper_parameters": {"batch_size": 0}}))


# Options

WRONG: list[Any] = [None, True, "text", -1, 0, 10**400, 2.5, math.nan, -math.inf, [], [1], {}, {"a": 1}, (), b"x", 1j]
WRONG += [torch.zeros(2), torch.float32]


@pytest.mark.parametrize("option", [*saved(FedAMM(3, 1, "small_cnn", info=INFO))["hyper_parameters"]])
def test_an_option_of_the_wrong_type_is_refused_or_harmless(option: str, content: Content) -> None:
    accepted = []
    for value in WRONG:
        if (module := loaded(with_options(content, **{option: value}))) is not None:
            accepted.append(value)
            assert module(torch.zeros(2, 1, 8, 8)).isfinite().all()
    assert len(accepted) < 4, accepted  # info None and {}, a rate of 0 or 2.5, say


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": "0.1"}, r"Expected `lr` in the checkpoint to be float for FedAMM, got '0\.1'"),
        ({"lr": math.nan}, r"`lr` in the checkpoint to be float for FedAMM, got nan"),
        (
            {"lr": -1.0},
            r"options in the checkpoint to make a FedAMM, got: Expected `lr` to be a number above 0, got -1\.0",
        ),
        ({"num_classes": True}, r"`num_classes` in the checkpoint to be int for FedAMM, got True"),
        ({"num_classes": -1}, r"`num_classes` to be a number of 1 or more, got -1"),
        ({"in_channels": 0}, r"`in_channels` to be a number of 1 or more, got 0"),
        ({"meta_update": "never"}, r"`meta_update` in the checkpoint to be asynchronous or synchronous for FedAMM"),
        ({"info": {**INFO, "std": [0.0]}}, r"`info` to hold std above 0, got \[0\.0\]"),
        ({"info": {**INFO, "mean": [0.5] * 3}}, r"`info` to hold 1 mean, got 3"),
        ({"info": {**INFO, "mean": ["0.5"]}}, r"Expected `info` in the checkpoint to be"),
        ({"info": {**INFO, "class_names": ["a"]}}, r"`info` to hold 3 class_names, got 1"),
        ({"info": {**INFO, "shot_groups": {"few": [3]}}}, r"`info` to hold shot_groups of the classes 0 to 2"),
        (
            {"info": {**INFO, "image_size": [4096, 4096]}},
            "Expected examples of at most 3145728 numbers in the checkpoint, got in_channels",
        ),
        (
            {"info": {**INFO, "image_size": []}, "in_channels": 10**7},
            "Expected examples of at most 3145728 numbers in the checkpoint, got in_channels",
        ),
        (
            {"info": {"image_size": [1024, 1024]}, "in_channels": 4},
            "Expected examples of at most 3145728 numbers in the checkpoint, got in_channels",
        ),
        ({"info": {**INFO, "owner": "me"}}, r"Expected `info` in the checkpoint to be"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], message: str, content: Content) -> None:
    with pytest.raises(ValueError, match=message):
        FedAMM.load_from_checkpoint(with_options(content, **options))


def test_options_that_the_class_does_not_have_are_said(content: Content, caplog: pytest.LogCaptureFixture) -> None:
    FedAMM.load_from_checkpoint(with_options(content, sigma=2))
    assert [record.getMessage() for record in caplog.records] == [
        "the checkpoint: 1 options are left out that FedAMM does not have: ['sigma']"
    ]
    with pytest.raises(TypeError, match=r"Expected options of FedAMM, got 'sigma', which it does not have"):
        FedAMM.load_from_checkpoint(packed(content), sigma=2)


def test_options_that_a_class_passes_on_are_checked_too(content: Content) -> None:
    class Mine(FedAMM):
        def __init__(self, *args: Any, patience: int = 3, note=None, **kwargs: Any) -> None:  # type: ignore[no-untyped-def]
            super().__init__(*args, **kwargs)

    assert Mine.load_from_checkpoint(with_options(content, note=["any", {"thing": 1}])).hparams["note"][0] == "any"
    assert "`note`" in refused(with_options(content, note=math.nan), Mine)
    assert Mine.load_from_checkpoint(with_options(content, patience=5)).hparams["patience"] == 5
    assert "`patience`" in refused(with_options(content, patience=0.5), Mine)
    assert "`lr`" in refused(with_options(content, lr="x"), Mine)


@pytest.mark.parametrize("text", ["lr: [1", "lr: !!python/object/apply:os.getcwd []", "just words", "lr: fast"])
def test_a_file_of_options_is_checked_too(text: str, content: Content, tmp_path: Path) -> None:
    path = tmp_path / "hparams.yaml"
    path.write_text(text)
    assert str(path) in refused(packed(content), hparams_file=path)
    path.write_text("{num_classes: 3, in_channels: 1, model: small_cnn, lr: 0.5}")
    assert FedAMM.load_from_checkpoint(packed(content), hparams_file=path).hparams["lr"] == 0.5


# Sizes


@pytest.mark.parametrize(
    "options",
    [{"num_classes": 10**9}, {"num_classes": 10**8}, {"in_channels": 10**9}, {"num_classes": 10**30}],
)
@pytest.mark.parametrize("given", [False, True])
def test_memory_is_not_taken_for_sizes_that_the_file_does_not_hold(
    options: dict[str, Any], given: bool, content: Content
) -> None:
    refused(with_options(content, info=None, **options), **({"model": SmallCNN(3, 1)} if given else {}))


def test_a_tensor_that_claims_to_be_large_takes_no_memory(content: Content) -> None:
    """One number, said to be a thousand million of them."""
    num_classes = 10**7
    state = dict(content["state_dict"])
    state["model.classifier.weight"] = torch.zeros(1, 1).expand(num_classes, 128)
    state["model.classifier.bias"] = torch.zeros(1).expand(num_classes)
    options = {**content["hyper_parameters"], "num_classes": num_classes, "info": None}
    assert "that take" in refused(packed({**content, "hyper_parameters": options, "state_dict": state}))
    assert "in place of" in refused(packed({**content, "state_dict": state}))


def test_what_follows_from_the_options_is_bounded_too() -> None:
    """The corners of FedETF grow with the square of the classes, of which the file holds a tensor or none."""
    content = saved(FedETF(3, 1, "small_cnn"))
    assert FedETF.load_from_checkpoint(packed(content)).hparams["num_classes"] == 3
    refused(with_options(content, num_classes=10**5), FedETF)
    refused(with_options(content, num_classes=10**5), FedETF, model=SmallCNN(3, 1))


@pytest.mark.parametrize("deflated", [True, False])
def test_an_archive_that_unpacks_to_more_than_it_is_is_refused(deflated: bool, content: Content) -> None:
    state = {**content["state_dict"], "model.more": torch.zeros(10**6)}
    inflated, file = packed({**content, "state_dict": state}), io.BytesIO()
    with (
        zipfile.ZipFile(inflated) as before,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED) as archive,
    ):
        for part in before.namelist():
            archive.writestr(part, before.read(part))
    file.seek(0)
    assert ("would unpack to" in refused(file)) == deflated


class Claims:
    """Asks for memory when it is read, though it executes nothing."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind

    def __reduce__(self) -> Any:
        return self.kind, (10**13,)


@pytest.mark.parametrize("kind", [bytearray, torch.Tensor, torch.FloatTensor])
def test_what_asks_for_memory_by_a_number_is_not_read(kind: Any, content: Content) -> None:
    line = refused(packed({**content, "more": Claims(kind)}))
    assert "holds more than tensors and plain data" in line
    assert kind.__name__ in line


def test_the_same_list_many_times_is_checked_once(content: Content) -> None:
    labels = [0] * 10**5
    groups = {str(name): labels for name in range(10**4)}
    assert "shot_groups" in refused(with_options(content, info={**INFO, "shot_groups": groups}))
    endless: list[Any] = []
    endless.append(endless)
    refused(with_options(content, info={**INFO, "mean": endless}))


# State


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["model.classifier.bias", "model.features.1.running_var", "weight_net.layers.0.bias"])
@pytest.mark.parametrize("strict", [True, False])
def test_a_state_that_is_not_finite_is_refused(name: str, value: float, strict: bool, content: Content) -> None:
    content["state_dict"][name] = content["state_dict"][name].clone()
    content["state_dict"][name][0] = value
    assert f"got NaN or infinity in {name}" in refused(packed(content), strict=strict)


def test_numbers_that_the_modules_type_cannot_hold_are_refused(content: Content) -> None:
    content["state_dict"]["model.classifier.bias"] = torch.full((3,), 1e300, dtype=torch.float64)
    assert "NaN or infinity in model.classifier.bias" in refused(packed(content))


def test_infinities_that_belong_to_a_network_are_taken() -> None:
    class Masked(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Flatten(), nn.Linear(64, 3))
            self.register_buffer("mask", torch.tensor([0.0, -math.inf]))

    content = saved(FedAvg(3, 1, Masked()))
    FedAvg.load_from_checkpoint(packed(content), model=Masked())
    content["state_dict"]["model.mask"] = torch.tensor([-math.inf, 0.0])
    assert "model.mask" in refused(packed(content), FedAvg, model=Masked())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.classifier.bias": None}, "without model.classifier.bias"),
        ({"model.classifier.bias": None, "model.classifier.weight": None}, "without model.classifier.bias and 1 more"),
        ({"model.extra": torch.zeros(1)}, "with model.extra"),
        ({"model.classifier.bias": torch.zeros(4)}, r"model.classifier.bias of float32 (4,) in place of float32 (3,)"),
        ({"model.classifier.bias": torch.zeros(3).long()}, "of int64 (3,) in place of float32 (3,)"),
        ({"model.classifier.bias": torch.zeros(3) * 1j}, "of complex64 (3,) in place of float32 (3,)"),
        ({"model.classifier.bias": torch.zeros(3).to_sparse()}, "holds more than tensors and plain data"),
        (
            {"model.classifier.bias": torch.zeros(3, device="meta")},
            "holds more than tensors and plain data",
        ),
        ({"model.classifier.bias": [0.0] * 3}, "to be a plain tensor, got list"),
    ],
)
def test_a_state_of_another_module_is_named(change: dict[str, Any], message: str, content: Content) -> None:
    state = {name: value for name, value in {**content["state_dict"], **change}.items() if value is not None}
    assert message in refused(packed({**content, "state_dict": state}))


def test_the_file_of_another_method_is_named(content: Content) -> None:
    line = refused(packed(content), FedAvg)
    assert "to hold the state of FedAvg with this network, got one with weight_net.layers.0.bias and 3 more" in line
    assert "by the class and with the options that wrote it" in line
    line = refused(packed(saved(FedAvg(3, 1, SmallCNN(3, 1)))), FedAvg)
    assert "or pass its network as `model`" in line


def test_a_part_of_a_state_is_taken_where_the_caller_says_so(content: Content) -> None:
    del content["state_dict"]["model.classifier.bias"]
    with pytest.warns(UserWarning, match=r"does not hold the state of FedAMM: without model\.classifier\.bias"):
        FedAMM.load_from_checkpoint(packed(content), strict=False)


@pytest.mark.parametrize("state", [None, [], "text", {1: torch.zeros(1)}])
def test_something_else_than_a_state_is_refused(state: Any, content: Content) -> None:
    refused(packed({**content, "state_dict": state}))


@pytest.mark.parametrize("options", [None, [], "text", {1: 2}, {}])
def test_something_else_than_options_is_refused(options: Any, content: Content) -> None:
    refused(packed({**content, "hyper_parameters": options}))


@pytest.mark.parametrize("whole", [None, [], "text", torch.zeros(2), {}, {"state_dict": {}}])
def test_something_else_than_a_checkpoint_is_refused(whole: Any) -> None:
    refused(packed(whole))


def test_a_checkpoint_of_a_round_is_told_from_one_of_lightning(fedamm_run: Path) -> None:
    line = refused(fedamm_run / "checkpoints/round_000005.ckpt")
    assert "which holds a `state_dict`, got one with ['environment', 'fingerprint', 'format', 'state']" in line


def test_a_missing_file_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt"):
        FedAMM.load_from_checkpoint(tmp_path / "nowhere.ckpt")


# Damage


def flipped(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 4, 64))):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def shortened(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def spliced(content: bytes, rng: random.Random) -> bytes:
    start, end = sorted(rng.randrange(len(content)) for _ in range(2))
    return content[:start] + content[end:]


def in_the_program(content: bytes, rng: random.Random) -> bytes:
    """Changed in the pickle, with the checksums of the archive in order."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as before, zipfile.ZipFile(file, "w") as archive:
        for name in before.namelist():
            part = before.read(name)
            archive.writestr(name, flipped(part, rng) if name.endswith("data.pkl") else part)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, on pickles of other protocols
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("damage", [flipped, shortened, spliced, in_the_program])
def test_a_damaged_file_gives_a_sound_module_or_one_line(
    damage: Callable[[bytes, random.Random], bytes], legacy: bool
) -> None:
    if legacy and damage is in_the_program:
        pytest.skip("has no archive")
    file, rng, outcomes = io.BytesIO(), random.Random(0), {True: 0, False: 0}
    torch.save(saved(FedAvg(3, 1, "small_cnn", info=INFO)), file, _use_new_zipfile_serialization=not legacy)
    for _ in range(60):
        module = loaded(io.BytesIO(damage(file.getvalue(), rng)), FedAvg)
        outcomes[module is not None] += 1
        assert module is None or all(np.isfinite(value.numpy()).all() for value in module.state_dict().values())
    assert outcomes[False] > 10, outcomes
