"""What a client's result must be like, field by field."""

import dataclasses
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import FrozenBatchNorm2d

from fedamm_pl import FedAvg
from fedamm_pl.algorithms import Scaffold
from fedamm_pl.federation import soundness
from fedamm_pl.federation.soundness import Expected, check_failure, check_result, nonnegative
from fedamm_pl.protocol.messages import ClientFailure, ClientResult, State
from tests.federation.small import make
from tests.tiny import tiny_data

SENT: State = {"model.w": torch.zeros(2), "model.n": torch.tensor(3), "control.w": torch.zeros(2)}
SOUND: State = {"model.w": torch.tensor([3.0, 4.0]), "model.n": torch.tensor(9), "control.w": torch.ones(2) * 100}
TALLIES: State = {"examples": torch.zeros(4), "losses": torch.zeros(2).double()}
EXPECTED = Expected(SENT, ("model.",), TALLIES, ("model.n", "model.elsewhere"))


def result(**fields: Any) -> ClientResult:
    honest: dict[str, Any] = {
        "payload": SOUND,
        "metrics": {"loss": 1.0},
        "tallies": TALLIES,
        "kept": {"c": torch.ones(1)},
    }
    return ClientResult(**{"client_id": 0, "num_examples": 4, **honest, **fields})


class Endless(Mapping[Any, Any]):
    """A mapping that never ends."""

    def __getitem__(self, name: Any) -> Any:
        return torch.zeros(1)

    def __iter__(self) -> Iterator[Any]:
        number = 0
        while True:
            yield f"entry {number}"
            number += 1

    def __len__(self) -> int:
        return 1


class Fickle(dict[str, Any]):
    """A mapping whose values are others each time one looks."""

    def __getitem__(self, name: str) -> Any:
        raise AssertionError("nobody asks twice")

    def items(self) -> Any:
        yield from super().items()
        self.clear()


def test_the_length_is_that_of_the_update_of_the_model() -> None:
    assert check_result(result(), EXPECTED)[1] == 5.0
    sent = {**SENT, "model.w": torch.tensor([3.0, 0.0])}
    assert check_result(result(), dataclasses.replace(EXPECTED, payload=sent))[1] == 4.0


def test_what_is_checked_is_plain_and_detached() -> None:
    given = result(
        payload=Fickle({**SOUND, "model.w": nn.Parameter(SOUND["model.w"])}),
        metrics=MappingProxyType(
            {"loss": np.float32(0.5), "steps": np.int64(4), "done": True, "share": Fraction(1, 4)}
        ),
        kept=OrderedDict(c=torch.ones(1, requires_grad=True)),
        train_seconds=np.float64(2),
        meta_seconds=1,
    )
    checked, _ = check_result(given, EXPECTED)
    assert checked.metrics == {"loss": 0.5, "steps": 4.0, "done": 1.0, "share": 0.25}
    assert {type(value) for value in checked.metrics.values()} == {float}
    assert {type(getattr(checked, part)) for part in ("payload", "metrics", "kept", "tallies")} == {dict}
    assert {type(value) for part in (checked.payload, checked.kept) for value in part.values()} == {torch.Tensor}
    assert not any(value.requires_grad for part in (checked.payload, checked.kept) for value in part.values())
    assert type(checked.train_seconds) is float
    assert torch.equal(checked.payload["model.w"], SOUND["model.w"])


class Waits(TorchDispatchMode):
    """Counts the numbers that are asked for one by one: on a GPU each waits for all that was given to it before."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("algorithm", [FedAvg, Scaffold])
def test_a_sound_result_is_waited_for_once_however_many_entries_it_has(algorithm: type[FedAvg]) -> None:
    module = make(algorithm, tiny_data())
    sent = module.broadcast(module.shared_state(), None)
    payload = module.expected_payload(sent)
    expected = Expected(payload, module.shared, {}, nonnegative(module))
    with Waits() as waits:
        float(torch.ones(()))
        assert waits.count == 1  # it sees them
        check_result(result(payload=payload, tallies={}), expected)
    assert waits.count == 1  # the one of the check is for a list of numbers


def entry(name: str, value: Any) -> dict[str, Any]:
    return {"payload": {**SOUND, name: value}}


class Odd(torch.Tensor):
    """A tensor of a kind of its own."""


UNSOUND: list[tuple[dict[str, Any], str]] = [
    ({"num_examples": 0}, "it reports 0 examples"),
    ({"num_examples": 2**53 + 1}, "it reports 9007199254740993 examples"),
    ({"num_examples": True}, "it reports True examples"),
    ({"num_examples": 2.0}, "it reports 2.0 examples"),
    ({"num_examples": "3\x1b[31m"}, r"it reports '3\x1b[31m' examples"),
    ({"num_examples": 10**5000}, "it reports <int> examples"),
    ({"bytes_sent": "many"}, "its bytes_sent is 'many', not a whole number from 0 to 2**40"),
    ({"bytes_sent": -1}, "its bytes_sent is -1, not a whole number"),
    ({"bytes_received": 10**30}, "its bytes_received is 1000000000000000000000000000000, not a whole number"),
    ({"bytes_received": 1.0}, "its bytes_received is 1.0, not a whole number"),
    ({"bytes_received": None}, "its bytes_received is None, not a whole number"),
    ({"train_seconds": math.nan}, "its train_seconds is nan, not a number of seconds from 0 to a year"),
    ({"train_seconds": -1e-9}, "its train_seconds is -1e-09, not a number of seconds"),
    ({"meta_seconds": math.inf}, "its meta_seconds is inf, not a number of seconds"),
    ({"meta_seconds": "soon"}, "its meta_seconds is 'soon', not a number of seconds"),
    ({"meta_seconds": True}, "its meta_seconds is True, not a number of seconds"),
    ({"meta_seconds": 10**400}, "its meta_seconds is 1000"),
    ({"payload": [1]}, "its payload is of type list, not a mapping"),
    ({"payload": None}, "its payload is of type NoneType, not a mapping"),
    ({"payload": {}}, "it lacks control.w and 2 more"),
    ({"payload": Endless()}, "its payload has more than 1003 entries"),
    (entry("more", torch.zeros(1)), "it holds what was not asked for: more"),
    (entry("model.w", [1.0, 2.0]), "model.w of its payload is of type list, not a tensor"),
    (entry("model.w", Odd([1.0, 2.0])), "model.w of its payload is of type Odd, not a tensor"),
    (entry("model.w", torch.zeros(3)), "model.w has shape (3,), expected (2,)"),
    (entry("model.w", torch.zeros(2).double()), "model.w is of type torch.float64, expected"),
    (entry("model.w", torch.zeros(2).to_sparse()), "model.w is not a dense tensor"),
    (entry("model.w", torch.zeros(2, device="meta")), "model.w is not a dense tensor"),
    (entry("model.w", torch.tensor([1.0, torch.nan])), "model.w is NaN or infinite"),
    (entry("control.w", torch.tensor([1.0, torch.inf])), "control.w is NaN or infinite"),
    (entry("model.n", torch.tensor(-1)), "model.n holds a number below 0"),
    ({"metrics": None}, "its metrics is of type NoneType, not a mapping"),
    ({"metrics": {"loss": "low"}}, "its metric loss is 'low', not a number"),
    ({"metrics": {"loss": None}}, "its metric loss is None, not a number"),
    ({"metrics": {"loss": 1e200}}, "its metric loss is 1e+200, beyond the largest number of float32"),
    ({"metrics": {"loss": -math.inf}}, "its metric loss is -inf, beyond"),
    ({"metrics": {"loss": 10**400}}, "its metric loss is 1000"),
    ({"metrics": {"loss": torch.tensor(1.0)}}, "its metric loss is tensor(1.), not a number"),
    ({"metrics": {3: 1.0}}, "its metric 3 has no name of 1 to 200 printable characters"),
    ({"metrics": {"": 1.0}}, "its metric '' has no name"),
    ({"metrics": {"a\nb": 1.0}}, r"its metric 'a\nb' has no name"),
    ({"metrics": {"a\x1b[2J": 1.0}}, r"its metric 'a\x1b[2J' has no name"),
    ({"metrics": {"a\u202eb": 1.0}}, r"its metric 'a\u202eb' has no name"),
    ({"metrics": {"a" * 201: 1.0}}, "its metric 'aaa"),
    ({"metrics": {f"m{number}": 1.0 for number in range(20_000)}}, "its metrics has more than 1024 entries"),
    ({"metrics": {"loss_std": 1.0}}, "its metric loss_std has a name that the server uses itself"),
    ({"metrics": {"bytes_sent": 1.0}}, "its metric bytes_sent has a name that the server uses itself"),
    ({"kept": 5}, "its kept is of type int, not a mapping"),
    ({"kept": None}, "its kept is of type NoneType, not a mapping"),
    ({"kept": {"a": 5}}, "a of its kept is of type int, not a tensor"),
    ({"kept": {"a": torch.zeros(1, device="meta")}}, "a is not a dense tensor"),
    ({"kept": {"a": torch.eye(2).to_sparse()}}, "a is not a dense tensor"),
    ({"kept": {3: torch.zeros(1)}}, "its kept entry 3 has no name"),
    (
        {"kept": {"a": torch.zeros(1, dtype=torch.complex128)}},
        "its kept entry a is of type torch.complex128, which cannot",
    ),
    ({"kept": {"a": torch.zeros(1).expand(2**40)}}, "it keeps 4398046511104 bytes, more than 10737"),
    ({"kept": Endless()}, "its kept has more than 100000 entries"),
    ({"tallies": [1]}, "its tallies is of type list, not a mapping"),
    ({"tallies": {}}, "it lacks examples and 1 more"),
    ({"tallies": {**TALLIES, "more": torch.zeros(1)}}, "it holds what was not asked for: more"),
    ({"tallies": {**TALLIES, "examples": torch.zeros(3)}}, "examples has shape (3,), expected (4,)"),
    ({"tallies": {**TALLIES, "losses": torch.zeros(2)}}, "losses is of type torch.float32"),
    ({"tallies": {**TALLIES, "losses": TALLIES["losses"] * math.nan}}, "its tally losses is NaN"),
    ({"tallies": {**TALLIES, "examples": torch.full((4,), -1e16)}}, "its tally examples is NaN or larger than 2**53"),
    ({"tallies": {**TALLIES, "losses": None}}, "losses of its tallies is of type NoneType"),
]


@pytest.mark.parametrize(("change", "reason"), UNSOUND)
def test_what_is_unsound_is_refused_with_a_reason(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        check_result(result(**change), EXPECTED)


@pytest.mark.parametrize(
    "change",
    [
        {"metrics": {"loss": math.nan}},
        {"metrics": {"loss": soundness.MAX_METRIC, "least": -soundness.MAX_METRIC}},
        {"metrics": {f"m{number}": 1.0 for number in range(1024)}},
        {"metrics": {"ä" * 200: 1}},
        {"metrics": {}},
        {"bytes_sent": 0, "bytes_received": 2**40},
        {"train_seconds": 0, "meta_seconds": soundness.MAX_SECONDS},
        {"num_examples": 2**53},
        {"kept": {}},
        {"kept": {"half": torch.zeros((), dtype=torch.bfloat16), "flag": torch.tensor(True)}},
    ],
)
def test_what_is_within_its_bounds_is_taken(change: dict[str, Any]) -> None:
    checked, norm = check_result(result(**change), EXPECTED)
    assert norm == 5.0
    assert checked.num_examples == result(**change).num_examples


# What cannot be below 0


class Own(nn.Module):
    """A normalisation of one's own, and a parameter of a suspicious name."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(2))
        self.register_buffer("running_var", torch.ones(2))
        self.num_batches_tracked = nn.Parameter(torch.zeros(2))


class Different(nn.Module):
    """A layer with a buffer of the name that is no variance beside a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_var", torch.zeros(2))


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        (lambda: nn.BatchNorm2d(2), ["running_var", "num_batches_tracked"]),
        (lambda: nn.SyncBatchNorm(2), ["running_var", "num_batches_tracked"]),
        (lambda: nn.InstanceNorm1d(2, track_running_stats=True), ["running_var", "num_batches_tracked"]),
        (lambda: nn.BatchNorm1d(2, track_running_stats=False), []),
        (lambda: nn.InstanceNorm2d(2), []),
        (lambda: FrozenBatchNorm2d(2), ["running_var"]),
        (Own, ["running_var"]),
        (Different, []),
        (lambda: nn.GroupNorm(1, 2), []),
        (lambda: nn.utils.weight_norm(nn.Linear(2, 2)), []),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_variances_and_counters_are_found_by_their_layer(layer: Callable[[], nn.Module], names: list[str]) -> None:
    module = nn.Sequential(OrderedDict(first=nn.Linear(2, 2), norm=layer()))
    assert nonnegative(module) == tuple(f"norm.{name}" for name in names)


def test_a_layer_that_is_in_a_network_twice_is_found_under_both_names() -> None:
    norm = nn.BatchNorm1d(2)
    found = nonnegative(nn.ModuleDict({"a": norm, "b": norm}))
    assert found == ("a.running_var", "a.num_batches_tracked", "b.running_var", "b.num_batches_tracked")


def test_what_is_found_are_entries_of_what_clients_send() -> None:
    module = make(FedAvg, tiny_data())
    found = nonnegative(module)
    assert len(found) == sum("running_var" in name or "num_batches" in name for name in module.shared_state()) > 0
    assert set(found) <= set(module.shared_state())


# A failure


@pytest.mark.parametrize("stage", ["data", "training", "meta step", "lost", "update"])
def test_a_failure_is_taken_with_a_reason_in_one_line(stage: Any) -> None:
    told = check_failure(ClientFailure(3, stage, "it\n \x1b[31mrains\u202e" + "x" * 10**6))
    assert told.stage == stage
    assert told.reason.startswith(r"it \x1b[31mrains\u202exxx")
    assert len(told.reason) == 300


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"stage": "a\x1b[2J"}, r"a failure at the stage 'a\x1b[2J', which does not exist"),
        ({"stage": ["data"]}, "a failure at the stage ['data'], which does not exist"),
        ({"stage": None}, "a failure at the stage None, which does not exist"),
        ({"reason": None}, "a failure whose reason is None, not a text"),
        ({"reason": b"rain"}, "a failure whose reason is b'rain', not a text"),
    ],
)
def test_a_failure_of_another_kind_is_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        check_failure(dataclasses.replace(ClientFailure(3, "data", "rain"), **change))
