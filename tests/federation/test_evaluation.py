"""The global model on the test set."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fedamm_pl import FedAvg
from fedamm_pl.algorithms import CReFF
from fedamm_pl.federation.callbacks.files import diagnostics
from fedamm_pl.federation.checkpoint import RunState
from fedamm_pl.federation.evaluation import Evaluator
from fedamm_pl.protocol import measured
from tests.federation.small import CPU, assert_equal, federation, make
from tests.tiny import tiny_data


def evaluator() -> Evaluator:
    data = tiny_data()
    return Evaluator(make(FedAvg, data), data, CPU)


def test_a_state_is_measured_whatever_the_module_held() -> None:
    found = evaluator()
    state = {name: value.clone() for name, value in found.module.shared_state().items()}
    first, confusion = found.measure(state)
    for value in found.module.state_dict().values():
        value.zero_()
    assert found.measure(state) == (first, confusion)
    assert_equal(found.module.shared_state(), state)
    assert set(first) == {"test/loss", "test/acc", "test/acc_many", "test/acc_medium", "test/acc_few"} | {
        f"test/acc_class_{label}" for label in range(4)
    }


def test_what_is_deployed_is_measured() -> None:
    run = federation(CReFF, method={"match_steps": 2, "retrain_steps": 2})
    run.run()
    deployed = run.server.module.deployed(run.state.shared)
    assert_equal(run.module.shared_state(), deployed)
    assert any(not torch.equal(deployed[name], run.state.shared[name]) for name in deployed)


def test_the_confusion_matrix_is_that_of_the_last_evaluation(tmp_path: Path) -> None:
    history = federation(num_rounds=3, eval_interval=2, output_dir=tmp_path).run()
    content = json.loads((tmp_path / "diagnostics.json").read_text())
    matrix = np.array(content["confusion"])
    assert matrix.sum(1).tolist() == [20] * 4
    assert np.trace(matrix) / matrix.sum() == pytest.approx(history[-1]["test/acc"])
    assert np.diag(matrix) / 20 == pytest.approx([history[-1][f"test/acc_class_{label}"] for label in range(4)])


def test_a_plain_trainer_leaves_the_confusion_matrix_in_the_module() -> None:
    data = tiny_data()
    module = make(FedAvg, data)
    trainer = CPU.build()
    for _ in range(2):  # the second test counts anew
        trainer.test(module, data.test_dataloader(), verbose=False)
    assert module.test_confusion is not None
    assert int(module.test_confusion.compute().sum()) == 80


def test_with_many_classes_there_is_no_confusion_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "CONFUSION_CLASSES", 3)
    run = federation(FedAvg)
    run.run()
    assert run.module.test_confusion is None
    with run.opened() as seen:
        assert diagnostics(seen)["confusion"] is None


def test_that_a_model_has_diverged_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    found, state = evaluator(), RunState(0, {})
    for round_num, (accuracy, loss) in enumerate([(0.9, 1.0), (0.8, 1.0), (0.25, float("nan")), (0.25, float("nan"))]):
        state.round_num = round_num
        state.history.append({"round": round_num, "test/acc": accuracy, "test/loss": loss})
        found.watch(state)
    assert state.diverged == {"round": 2, "reason": "the test loss is nan"}
    assert [record.getMessage() for record in caplog.records] == [
        "round 2: the global model has diverged: the test loss is nan"
    ]
