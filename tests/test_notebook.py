"""The notebook of a first federation: it runs as it stands, comes to what its words say, and is stored with its figures."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples/first_federation.ipynb"
FOUND = """
import json

lines = {line.get_label(): list(line.get_ydata()) for line in drawn["class_weights"].axes[0].get_lines()}
found = {
    "last": {name: history[-1] for name, history in histories.items()},
    "first": [history[0] for history in histories.values()],
    "counts": counts,
    "groups": groups,
    "size": len(data.images.test_labels),
    "weights": weights.tolist(),
    "few": lines["few"],
    "read": run.history == histories["FedAMM"],
    "figures": list(drawn),
    "right": (probabilities.argmax(1) == data.images.test_labels[:5]).sum().item(),
}
(folder.parent / "found.json").write_text(json.dumps(found))
"""


def cells(kind: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text())["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What its cells have computed, one after the other in a process of their own, without Jupyter."""
    folder = tmp_path_factory.mktemp("notebook")
    code = "\n\n".join("".join(cell["source"]) for cell in cells("code"))
    (folder / "code.py").write_text(f"{code}\n{FOUND}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "TMPDIR": str(folder)}
    done = subprocess.run([sys.executable, "code.py"], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return result


def test_the_tail_is_as_long_as_it_says(found: dict[str, Any]) -> None:
    counts, groups = found["counts"], found["groups"]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] / counts[0] == pytest.approx(0.05, rel=0.2)
    assert [label for members in groups.values() for label in members] == list(range(10))
    assert sum(counts[label] for label in groups["many"]) <= 0.75 * sum(counts)
    assert sum(counts[label] for label in groups["many"] + groups["medium"]) <= 0.95 * sum(counts)
    assert found["size"] == pytest.approx(350, abs=10)


def test_both_methods_learn_and_the_tail_stays_behind(found: dict[str, Any]) -> None:
    fedavg, fedamm = found["first"]
    assert fedavg["test/acc"] == fedamm["test/acc"]  # the same network
    for row in found["last"].values():
        assert row["round"] == 15
        assert row["test/acc"] > 0.7
        assert row["test/acc_many"] > row["test/acc_few"] + 0.3


def test_the_curve_rises_and_rare_classes_gain(found: dict[str, Any]) -> None:
    weights = found["weights"]
    assert weights == sorted(weights)
    assert weights[-1] > 0.5 + weights[0]
    assert all(value > 1 for value in found["few"])


def test_the_run_is_read_back_with_its_figures_and_its_module(found: dict[str, Any]) -> None:
    assert found["read"]
    assert {"accuracy", "class_weights", "partition"} <= set(found["figures"])
    assert found["right"] >= 3


def test_it_is_stored_small_with_its_output_and_without_traces_of_a_machine() -> None:
    text = NOTEBOOK.read_text()
    assert len(text) < 300_000
    words = re.sub(r'"image/png": "[^"]*"', "", text)
    assert re.findall(r"/(?:home|root|tmp|Users|usr|opt)\b|[A-Z]:\\\\|site-packages|Warning|Traceback", words) == []
    code = cells("code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 7
    assert all(output.get("name", "stdout") == "stdout" for output in outputs)
    assert not any(line.startswith(("%", "!")) for cell in code for line in "".join(cell["source"]).splitlines())
