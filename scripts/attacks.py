"""What two hostile clients of ten do to FedAMM under each aggregation: prints the table of docs/reliability.md.

    python -m scripts.attacks

Trains on the images inside the package (imbalance factor 0.1, all ten clients in each of 15 rounds, 2 local epochs).
Clients 0 and 1 either return w - 10 (w_k - w), their update reversed and ten times as long, or add Gaussian noise of
standard deviation 1 to every floating-point entry; variances stay 0 or more, or the update would be refused. About half an
hour on two cores.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from fedamm_pl import FedAMM, FederatedDataModule, Orchestrator
from fedamm_pl.federation.executors import Executor, Kept, Outcome, Runner, RunSpec, Sequential
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.protocol.messages import Broadcast, ClientResult, ClientTask, State
from fedamm_pl.seeding import derive_seed, torch_generator

ATTACKERS = (0, 1)
AGGREGATIONS: dict[str, dict[str, Any]] = {
    "num_examples": {},
    "num_examples, max_update_norm 2": {"max_update_norm": 2.0},
    "trimmed_mean, trim_fraction 0.2": {"aggregation": "trimmed_mean", "trim_fraction": 0.2},
    "median": {"aggregation": "median"},
}
Attack = Callable[[State, State, int], State]


def reverse(payload: State, sent: State, seed: int) -> State:
    """Return an update that is reversed and ten times as long."""
    return {
        name: sent[name] - 10 * (value - sent[name]) if value.is_floating_point() else value
        for name, value in payload.items()
    }


def noise(payload: State, sent: State, seed: int) -> State:
    """Return an update with Gaussian noise of standard deviation 1."""
    generator = torch_generator(seed)
    return {
        name: value + torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in payload.items()
    }


def sound(payload: State) -> State:
    """Return a payload whose variances are 0 or more."""
    return {name: value.clamp(min=0) if name.endswith("running_var") else value for name, value in payload.items()}


ATTACKS: dict[str, Attack | None] = {"none": None, "reversed": reverse, "noise": noise}


class Attacked(Executor):
    """Trains all clients honestly, one after the other, then replaces the updates of the attackers.

    Args:
        attack: Replaces an update; None: no attack.
    """

    def __init__(self, attack: Attack | None) -> None:
        self.attack = attack

    def open(self, spec: RunSpec) -> Runner:
        """Return a runner that trains sequentially and applies the attack."""
        return AttackedRunner(Sequential().open(spec), self.attack)


class AttackedRunner(Runner):
    """Runner of :class:`Attacked`.

    Args:
        honest: Runner that trains the clients.
        attack: Replaces an update; None: no attack.
    """

    def __init__(self, honest: Runner, attack: Attack | None) -> None:
        self.honest = honest
        self.attack = attack
        self.environment = honest.environment

    def run(
        self, broadcast: Broadcast, tasks: Sequence[ClientTask], kept: Kept, meanwhile: Callable[[], None] | None = None
    ) -> Iterator[Outcome]:
        """Train the client of each task; see :class:`Runner`."""
        seeds = {task.client_id: derive_seed(task.seed, "attack") for task in tasks}
        for outcome in self.honest.run(broadcast, tasks, kept, meanwhile):
            if self.attack and isinstance(outcome, ClientResult) and outcome.client_id in ATTACKERS:
                payload = self.attack(outcome.payload, broadcast.payload, seeds[outcome.client_id])
                outcome = dataclasses.replace(outcome, payload=sound(payload))
            yield outcome


def train(attack: str, options: dict[str, Any], seed: int) -> float:
    """Train under an attack, and return the test accuracy after the last round."""
    pl.seed_everything(seed, verbose=False)
    data = FederatedDataModule("fashion_mnist_mini", num_clients=10, imbalance_factor=0.1, batch_size=32, seed=seed)
    module = FedAMM(10, 1, "small_cnn", lr=0.03, info=data.info, differentiation="forward")
    federation = Orchestrator(
        module,
        data,
        num_rounds=15,
        client_fraction=1.0,
        local_epochs=2,
        eval_interval=15,
        seed=seed,
        trainer=TrainerConfig("cpu"),
        executor=Attacked(ATTACKS[attack]),
        **options,
    )
    return federation.run()[-1]["test/acc"]


def main() -> None:
    """Run the trainings that are missing in the record, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path, default=Path("docs/attacks.json"), help="Where the accuracies are kept.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    record: dict[str, float] = json.loads(arguments.record.read_text()) if arguments.record.exists() else {}
    lines = [f"| aggregation | {' | '.join(ATTACKS)} |", "|---" * (1 + len(ATTACKS)) + "|"]
    for name, options in AGGREGATIONS.items():
        cells = []
        for attack in ATTACKS:
            for seed in arguments.seeds:
                key = f"{name}; {attack}; seed {seed}"
                if key not in record:
                    record[key] = train(attack, options, seed)
                    arguments.record.write_text(json.dumps(record, indent=1) + "\n")
            accuracies = [100 * record[f"{name}; {attack}; seed {seed}"] for seed in arguments.seeds]
            spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
            cells.append(f"{statistics.mean(accuracies):.1f} ± {spread:.1f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    print("\n".join(lines))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
