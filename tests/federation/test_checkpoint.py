"""Server states on disk, and the accounts of a run."""

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fedamm_pl.federation.checkpoint import (
    DIGEST_SIZE,
    FORMAT,
    OtherVersionError,
    RunState,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    saved_rounds,
)
from fedamm_pl.protocol.messages import ClientFailure, ClientResult
from tests.federation.small import assert_equal


def state(round_num: int = 3) -> RunState:
    found = RunState(round_num, {"w": torch.randn(4), "half": torch.randn(2).bfloat16(), "n": torch.tensor(7)})
    found.history.append({"round": 0, "test/acc": float("nan")})
    found.kept[12] = 2
    found.ended = "enough"
    return found


def rewrite(path: Path, **changes: Any) -> None:
    """Change entries of a checkpoint, whose checksum is right."""
    content = torch.load(io.BytesIO(path.read_bytes()[:-DIGEST_SIZE]), weights_only=True)
    content.update(changes)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.write_bytes(buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest())


def test_a_checkpoint_gives_all_that_was_saved(tmp_path: Path) -> None:
    before = state()
    path = save_checkpoint(tmp_path / "checkpoints", before, {"seed": 1}, {"torch": "2.9"})
    assert path == tmp_path / "checkpoints/round_000003.ckpt"
    found = load_checkpoint(path)
    assert (found.fingerprint, found.environment) == ({"seed": 1}, {"torch": "2.9"})
    assert_equal(found.state.shared, before.shared)
    for name, value in vars(before).items():
        if name not in ("shared", "history"):
            assert getattr(found.state, name) == value
    assert [list(row) for row in found.state.history] == [["round", "test/acc"]]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "c", state(), {}, {})
    content = path.read_bytes()
    for place in range(0, len(content), 97):
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=r"to be an intact checkpoint of a run, got a damaged file \(its checksum differs\)"
        ):
            load_checkpoint(path)


@pytest.mark.parametrize("name", [*vars(RunState(0, {})), "fingerprint", "environment"])
def test_an_entry_of_another_type_is_no_whole_checkpoint(name: str, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "c", state(), {}, {})
    content = torch.load(io.BytesIO(path.read_bytes()[:-DIGEST_SIZE]), weights_only=True)
    for value in ("text", 1.5, True, b"x", [1], {"a": "b"}, {1: ["c"]}, torch.zeros(1)):
        if name in ("fingerprint", "environment"):
            if isinstance(value, dict):
                continue
            rewrite(path, **{name: value})
        else:
            rewrite(path, state={**content["state"], name: value})
        if value == "text" and name in ("stopped", "ended"):
            load_checkpoint(path)
            continue
        with pytest.raises(ValueError, match=r"to be an intact checkpoint of a run, got a damaged file \("):
            load_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"x", b"x" * 1000])
def test_what_is_no_checkpoint_is_said(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "round_000003.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="got a damaged file"):
        load_checkpoint(path)


def test_a_checkpoint_under_another_name_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "c", state(), {}, {})
    moved = path.rename(path.with_name("round_000004.ckpt"))
    with pytest.raises(ValueError, match=r"got a damaged file \(it is of round 3\)"):
        load_checkpoint(moved)


def test_another_format_is_another_matter(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(2), {"fedamm_pl": "9.1"}, {})
    path = save_checkpoint(tmp_path, state(3), {"fedamm_pl": "9.1"}, {})
    rewrite(path, format=FORMAT + 1)
    with pytest.raises(
        OtherVersionError, match=rf"version 9.1 wrote \(format {FORMAT + 1}\): continue with that version"
    ):
        latest_checkpoint(tmp_path)  # and the older one is not taken


def test_the_newest_whole_one_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert latest_checkpoint(tmp_path / "missing") is None
    assert saved_rounds(tmp_path / "missing") == []
    for round_num in (1, 2, 10):
        save_checkpoint(tmp_path, state(round_num), {}, {})
    assert saved_rounds(tmp_path) == [10, 2, 1]
    (tmp_path / "round_000010.ckpt").write_bytes(b"half")
    (tmp_path / ".round_000011.ckpt.tmp").write_bytes(b"")
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.state.round_num == 2
    assert "round_000010.ckpt to be an intact checkpoint" in caplog.text
    assert ".round_000011.ckpt.tmp was being written when a run was stopped. It is skipped." in caplog.text
    for path in tmp_path.glob("round_*"):
        path.write_bytes(b"half")
    with pytest.raises(
        ValueError, match=f"Expected {tmp_path} to hold an intact checkpoint to continue from, got 3 damaged"
    ):
        latest_checkpoint(tmp_path)


def test_one_that_lacks_what_a_client_kept_is_not_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    older, newer = state(1), state(2)
    older.kept, newer.kept = {4: 1}, {4: 2, 5: 2, 6: 1}
    for one in (older, newer):
        save_checkpoint(tmp_path, one, {}, {})
    there = {(4, 1), (4, 2)}
    found = latest_checkpoint(tmp_path, lambda client, round_num: (client, round_num) in there)
    assert found is not None
    assert found.state.round_num == 1
    assert "the files of 2 of 3 are missing or damaged, the first of client 5. It is skipped." in caplog.text


def test_files_of_ones_own_beside_them_are_no_checkpoints(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(2), {}, {})
    (tmp_path / "round_best.ckpt").write_bytes(b"mine")
    assert saved_rounds(tmp_path) == [2]


def test_a_folder_that_was_removed_is_not_made_anew(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        save_checkpoint(tmp_path / "gone/checkpoints", state(), {}, {})


# The state


def test_a_copy_does_not_change_with_the_state() -> None:
    first = state()
    second = first.copy()
    assert second.shared["w"] is first.shared["w"]
    first.history.append({})
    first.shared["more"] = torch.zeros(1)
    first.counts["failed_clients"] += 1
    first.kept[1] = 1
    first.seconds["other"] += 1
    first.diagnostics.append({})
    assert "more" not in second.shared
    assert len(second.history) == 1
    assert second.counts["failed_clients"] == 0
    assert second.kept == {12: 2}
    assert second.seconds["other"] == 0
    assert second.diagnostics == []


def test_what_went_wrong_is_counted_and_stops_the_run_in_time() -> None:
    found = RunState(0, {})
    failures = [ClientFailure(0, "training", "x"), ClientFailure(1, "update", "y"), ClientFailure(2, "lost", "z")]
    found.count(failures, None, 2, 9)
    assert found.counts == {"failed_clients": 2, "refused_updates": 1, "failed_rounds": 0, "resumes": 0}
    for failed, in_a_row, stopped in (("a", 1, False), (None, 0, False), ("b", 1, False), ("c", 2, True)):
        found.round_num += 1
        found.count([], failed, 2, 9)
        assert found.failed_in_a_row == in_a_row
        assert bool(found.stopped) == stopped
    assert found.stopped == (
        "stopped after round 4: 2 rounds in a row failed, `max_failed_rounds` allows no more. The last: c"
    )


@pytest.mark.parametrize(("failed", "stopped"), [(["a", "b"], True), ([None, "b"], False), (["a", None], False)])
def test_a_run_without_a_round_that_succeeded_is_stopped_at_its_end(failed: list[str | None], stopped: bool) -> None:
    found = RunState(0, {})
    found.count([], None, 3, 2)  # round 0
    for reason in failed:
        found.round_num += 1
        found.count([], reason, 3, 2)
    assert found.stopped == ("stopped after round 2: no round succeeded. The last: b" if stopped else None)


def test_accounts_add_up() -> None:
    found = RunState(1, {})
    results = [ClientResult(0, 3, {}, bytes_received=10, bytes_sent=4), ClientResult(1, 3, {}, bytes_received=20)]
    for _ in range(2):
        found.account(results, {"clients": 1.0, "evaluate": 0.5, "other": 0.25}, {"train": 2.0, "meta": 1.0})
    assert found.seconds == {"clients": 2.0, "evaluate": 1.0, "other": 0.5}
    assert found.client_seconds == {"train": 4.0, "meta": 2.0}
    assert found.bytes_total == {"received": 60, "sent": 8}
    assert found.clients_total == 4
    found.note({"curve": [1]})
    found.account(results, {"clients": 1.0}, {})
    (row,) = found.diagnostics
    assert (row["round"], row["bytes"], row["curve"]) == (1, 68, [1])
    assert row["seconds"] == {"clients": 2.0, "evaluate": 1.0, "other": 0.5}  # up to then
    assert row["client_seconds"] == {"train": 4.0, "meta": 2.0}


@pytest.mark.parametrize("kind", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_passed_over_and_not_waited_for(kind: Any, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(1), {"seed": 1}, {})
    kind(tmp_path / "round_000002.ckpt")
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.state.round_num == 1
    with pytest.raises(ValueError, match=r"got a damaged file \(it is not a file\)"):
        load_checkpoint(tmp_path / "round_000002.ckpt")


def nested(depth: int, width: int, as_dict: bool = False) -> Any:
    """A list, or a mapping, that holds the same one many times, which holds the same one, and so on."""
    value: Any = {"k": 1} if as_dict else ["x"]
    for _ in range(depth):
        value = {str(place): value for place in range(width)} if as_dict else [value] * width
    return value


@pytest.mark.parametrize(
    ("bomb", "said"),
    [
        (nested(12, 10), "it holds more values than its"),
        (nested(12, 10, as_dict=True), "it holds more values than its"),
        (["x" * 10**5] * 10**5, "it holds more values than its"),
        (nested(100, 1), "it is nested too deeply"),
    ],
)
@pytest.mark.parametrize("place", ["fingerprint", "environment", "format"])
def test_what_stands_for_more_than_the_file_holds_is_refused(bomb: Any, said: str, place: str, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, state(), {"fedamm_pl": "0"}, {})
    rewrite(path, **{place: bomb if place == "format" else {"fedamm_pl": bomb}})
    with pytest.raises(ValueError, match=said) as caught:
        load_checkpoint(path)
    assert len(str(caught.value)) < 500


def test_a_long_history_is_no_more_than_the_file_holds(tmp_path: Path) -> None:
    long = state(2000)
    names = [f"client/{'n' * 200}{number}" for number in range(20)]
    long.history = [{"round": number, "test/acc": 0.5, **dict.fromkeys(names, 0.5)} for number in range(2000)]
    long.confusion = [[0] * 200 for _ in range(200)]
    assert load_checkpoint(save_checkpoint(tmp_path, long, {}, {})).state.history == long.history


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bytes_total": {}}, "its bytes_total are not valid for a run"),
        ({"counts": {"failed_clients": 0}}, "its counts are not valid for a run"),
        ({"seconds": {"clients": float("nan"), "evaluate": 0.0, "other": 0.0}}, "its seconds are not valid for a run"),
        ({"client_seconds": {"train": -1.0, "meta": 0.0}}, "its client_seconds are not valid for a run"),
        ({"history": []}, "its history is empty or has a row without round or test/acc"),
        ({"history": [{}]}, "its history is empty or has a row without round or test/acc"),
        ({"diverged": {"round": 1}}, "its diverged lacks round or reason"),
        ({"shared": {"w": torch.tensor([0.0, float("nan")])}}, "its w is NaN or infinite"),
        ({"shared": {"w": torch.zeros(1).expand(10**6, 10**5)}}, "its tensors take 400000000000 bytes"),
        ({"shared": {"w": torch.eye(2).to_sparse()}}, r"\("),
        ({"shared": {"w": torch.zeros(1, device="meta")}}, r"\("),
    ],
)
def test_what_would_fail_in_a_later_round_is_no_whole_checkpoint(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = save_checkpoint(tmp_path, state(), {}, {})
    rewrite(path, state={**vars(state()), **changes})
    with pytest.raises(ValueError, match=rf"to be an intact checkpoint of a run, got a damaged file .*{said}"):
        load_checkpoint(path)


def test_a_file_larger_than_the_memory_is_not_read(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, state(), {}, {})
    with path.open("ab") as file:
        file.truncate(10**13)
    with pytest.raises(ValueError, match=r"damaged file \(Expected it to fit into memory, got"):
        load_checkpoint(path)
