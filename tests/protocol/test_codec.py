"""What arrives equals what was sent, whatever it holds; damaged bytes are refused, and nothing in them is executed."""

import dataclasses
import json
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedamm_pl.protocol.codec import TENSORS, decode, encode, pack, unpack
from fedamm_pl.protocol.messages import Answer, Broadcast, ClientFailure, ClientResult, ClientTask, Question, State

REPEATABLE = settings(deadline=None, derandomize=True, database=None, max_examples=200)

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]
NAMES = st.one_of(
    st.sampled_from(
        [
            "model.conv1.weight",
            "a-b.c_d",
            "Größe/ß.0",
            "",
            ".",
            "/",
            "payload",
            "payload/x",
            "__metadata__",
            "名前",
            "\n\t\0",
        ]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Tensors of every type, shape and layout, with any bits."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    count = int(torch.Size(shape).numel())
    if dtype is torch.bool:
        value = torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=dtype)
    else:
        bits = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
        value = torch.frombuffer(bytearray(bits), dtype=dtype) if count else torch.empty(0, dtype=dtype)
    value = value.reshape(shape)
    match draw(st.sampled_from(["plain", "channels last", "transposed", "strided", "gradient"])):
        case "channels last" if value.ndim == 4:
            return value.to(memory_format=torch.channels_last)
        case "transposed" if value.ndim > 1:
            return value.transpose(0, -1)
        case "strided" if value.ndim:
            return value[::2]
        case "gradient" if dtype.is_floating_point:
            return value.requires_grad_()
    return value


@st.composite
def states(draw: st.DrawFn) -> State:
    """Tensors by name, some of them views of one memory."""
    state = draw(st.dictionaries(NAMES, tensors(), max_size=4))
    for name, like in draw(st.dictionaries(NAMES, st.integers(0, 3), max_size=2)).items():
        if state:
            value = list(state.values())[like % len(state)]
            state[name] = value if not value.ndim else value[: len(value) // 2]
    return state


WHOLE, REAL = st.integers(0, 2**63 - 1), st.floats(allow_nan=False)
MESSAGES = st.one_of(
    st.builds(Broadcast, round_num=WHOLE, local_epochs=WHOLE, payload=states()),
    st.builds(ClientTask, client_id=WHOLE, seed=WHOLE),
    st.builds(Question, round_num=WHOLE, client_id=WHOLE, step=WHOLE, payload=states()),
    st.builds(Answer, payload=states(), metrics=states()),
    st.builds(ClientFailure, client_id=WHOLE, stage=st.sampled_from(["data", "lost"]), reason=st.text(max_size=20)),
    st.builds(
        ClientResult,
        client_id=WHOLE,
        num_examples=WHOLE,
        payload=states(),
        metrics=st.dictionaries(NAMES, REAL, max_size=3),
        bytes_received=WHOLE,
        bytes_sent=WHOLE,
        train_seconds=REAL,
        meta_seconds=REAL,
        kept=states(),
        tallies=states(),
    ),
)


def bits_of(value: Tensor) -> Tensor:
    return value.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def assert_same_bits(found: State, sent: State) -> None:
    assert list(found) == list(sent)
    for name, value in sent.items():
        other = found[name]
        assert (other.dtype, other.shape, other.device.type) == (value.dtype, value.shape, "cpu")
        assert not other.requires_grad
        assert torch.equal(bits_of(other), bits_of(value)), name


@REPEATABLE
@given(MESSAGES)
def test_what_arrives_equals_what_was_sent(message: Any) -> None:
    found = decode(encode(message))
    assert type(found) is type(message)
    for field in dataclasses.fields(message):
        if field.name in TENSORS[type(message)]:
            assert_same_bits(getattr(found, field.name), getattr(message, field.name))
        else:
            assert getattr(found, field.name) == getattr(message, field.name)


@REPEATABLE
@given(states())
def test_what_a_client_keeps_is_packed_by_its_own_names(state: State) -> None:
    found, plain = unpack(pack(state))
    assert_same_bits(found, state)
    assert plain == {}


def test_every_message_is_known() -> None:
    assert set(TENSORS) == {Broadcast, ClientTask, ClientResult, ClientFailure, Question, Answer}


def test_metrics_that_are_no_numbers_arrive_too() -> None:
    metrics = {"loss": float("nan"), "high": float("inf"), "low": -float("inf")}
    found = decode(encode(ClientResult(0, 1, {}, metrics)))
    assert isinstance(found, ClientResult)
    assert str(found.metrics) == str(metrics)


def test_tensors_that_share_memory_arrive_apart_and_the_sent_ones_stay() -> None:
    whole = torch.arange(6.0)
    sent = {"whole": whole, "half": whole[:3], "again": whole, "odd": whole[1::2]}
    found = unpack(pack(sent))[0]
    assert_same_bits(found, sent)
    found["whole"].zero_()
    assert found["half"].tolist() == found["again"][:3].tolist() == whole[:3].tolist() == [0, 1, 2]


def test_the_bytes_are_those_of_the_tensors_and_a_small_header() -> None:
    large = torch.zeros(1000, 1000)
    assert large[:10].untyped_storage().nbytes() == large.nbytes
    content = encode(Broadcast(1, 1, {"part": large[:10]}))
    assert len(content) < 10 * 1000 * 4 + 1000


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(2, 2).to_sparse(),
        torch.zeros(2, device="meta"),
    ],
    ids=["sparse", "meta"],
)
def test_tensors_that_cannot_be_sent_are_refused(value: Tensor) -> None:
    with pytest.raises(ValueError, match="Expected tensors that can be sent, got"):
        encode(ClientResult(0, 1, {"model.w": value}))


# Damaged bytes.


def sample() -> bytes:
    payload = {"model.w": torch.randn(3, 4), "model.n": torch.tensor(7), "model.b": torch.zeros(0, 2)}
    return encode(ClientResult(3, 20, payload, {"loss": 0.5}, kept={"own": torch.ones(2)}))


def test_every_truncation_is_refused() -> None:
    content = sample()
    for length in range(len(content)):
        with pytest.raises(ValueError, match="Expected"):
            decode(content[:length])
    with pytest.raises(ValueError, match="Expected packed tensors"):
        decode(content + b"\0")


@REPEATABLE
@given(st.data())
def test_flipped_bits_are_refused_or_give_a_message_of_the_same_form(data: st.DataObject) -> None:
    """No checksum: what bits of a number say is for the server's gate to judge. No other error comes, and no crash."""
    content = bytearray(sample())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3)):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found = decode(bytes(content))
    except ValueError as error:
        assert str(error).startswith("Expected")  # noqa: PT017
    else:
        assert type(found) in TENSORS


@REPEATABLE
@given(st.binary(max_size=60))
def test_any_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="Expected"):
        decode(content)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", [pickle.dump, torch.save], ids=["pickle", "torch.save"])
def test_pickles_are_refused_and_not_executed(save: Any, tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        save(Bomb(tmp_path / "bang"), file)
    for read in (decode, unpack):
        with pytest.raises(ValueError, match="Expected packed tensors, got bytes that cannot be read"):
            read((tmp_path / "file").read_bytes())
    assert not (tmp_path / "bang").exists()


@pytest.mark.parametrize(
    ("tensors", "plain", "problem"),
    [
        ({}, {}, "Expected a message, got one of the kind None"),
        ({}, {"kind": "Bomb"}, "got one of the kind 'Bomb'"),
        ({}, {"kind": ["ClientTask"]}, "Expected a message"),
        ({}, {"kind": "State"}, "got one of the kind 'State'"),
        ({}, {"kind": "ClientTask", "client_id": 1}, "Expected a ClientTask, got other fields .*seed"),
        ({}, {"kind": "ClientTask", "client_id": 1, "seed": 2, "more": 3}, "got other fields .*more"),
        (
            {"payload/x": torch.zeros(1)},
            {"kind": "ClientTask", "client_id": 1, "seed": 2},
            "got other fields .*payload",
        ),
        ({"x": torch.zeros(1)}, {"kind": "Broadcast", "round_num": 1, "local_epochs": 1}, "got other fields .*x"),
        ({}, {"kind": "Broadcast", "round_num": 1, "local_epochs": 1, "payload": 3}, "got other fields .*payload"),
    ],
)
def test_what_is_whole_and_no_message_is_refused(tensors: State, plain: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        decode(pack(tensors, plain))


def test_files_of_safetensors_without_our_header_are_refused() -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    with pytest.raises(ValueError, match="Expected packed tensors"):
        decode(struct.pack("<Q", len(header)) + header + bytes(4))


def test_the_same_message_gives_the_same_bytes() -> None:
    message = Broadcast(3, 2, {"model.a": torch.arange(3.0), "model.b": torch.tensor(7)})
    assert len({encode(message) for _ in range(20)}) == 1
