"""Write your own method with its own server step, and a callback that ends the run.

    python examples/own_method.py

Each client clips the loss of its examples at a bound, so that single hard examples count less, and the server moves
only half of the way to the average. The callback ends the run when the accuracy has not risen for three evaluations.
"""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from fedamm_pl import FedAvg, FederatedDataModule, FederatedModule, Orchestrator
from fedamm_pl.federation.callbacks import FederationCallback


class Cautious(FederatedModule):
    """FedAvg with a bound on the loss of each example, and half a step at the server.

    Args:
        bound: Largest loss of an example that still has a gradient.
        options: Options of :class:`~fedamm_pl.FedAvg`.
    """

    def __init__(self, *args: Any, bound: float = 3.0, **options: Any) -> None:
        super().__init__(*args, **options)
        self.save_hyperparameters("bound")

    def objective(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each example, shape (B,), at most the bound."""
        return super().objective(logits, labels).clamp(max=self.hparams["bound"])

    def server_step(self, state: Any, reduced: Any, server: Any) -> Any:
        """Move half of the way to the average."""
        new = super().server_step(state, reduced, server)
        return {
            name: torch.lerp(state[name], value, 0.5) if value.is_floating_point() else value
            for name, value in new.items()
        }


class Patience(FederationCallback):
    """Ends the run when the accuracy has not risen for some evaluations, and logs the best accuracy so far."""

    def __init__(self, evaluations: int = 3) -> None:
        self.evaluations, self.best, self.since = evaluations, 0.0, 0

    def on_round_end(self, run: Any, record: Any) -> None:
        """Check the accuracy of the round; rounds without an evaluation have none."""
        accuracy = record.metrics.get("test/acc")
        if accuracy is None:
            return
        self.since = 0 if accuracy > self.best else self.since + 1
        self.best = max(self.best, accuracy)
        run.log("best_so_far", self.best)
        if self.since >= self.evaluations:
            run.stop(f"no rise for {self.evaluations} evaluations")


def main() -> dict[str, float]:
    """Train both methods on the same data, and return their best accuracies."""
    data = FederatedDataModule("digits", num_clients=5, imbalance_factor=0.1, partition="by_dirichlet", batch_size=32)
    best = {}
    for method in (FedAvg, Cautious):
        pl.seed_everything(0, verbose=False)
        module = method(data.num_classes, data.in_channels, "mlp", lr=0.05, info=data.info)
        patience = Patience()
        run = Orchestrator(
            module, data, num_rounds=12, client_fraction=1.0, local_epochs=1, eval_interval=1, callbacks=[patience]
        )
        run.run()
        best[method.__name__] = patience.best
        print(f"{method.__name__}: {patience.best:.1%} after {run.state.round_num} rounds")
    return best


if __name__ == "__main__":
    main()
