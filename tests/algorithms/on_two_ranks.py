"""A script that tests start in processes of their own: trains on some CPU ranks and writes down what each of them ends with."""

import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from fedamm_pl import FedAMM, FedAvg
from fedamm_pl.federation.trainer import quiet
from tests.tiny import TinyData, tiny_data

BATCH_SIZE = 16
"""Of all ranks together."""
GROUPS = {"first": [0], "others": [1, 2, 3]}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 4))


class Watched:
    """Remembers which batches it gets."""

    seen: list[list[int]]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, _ = batch["train"] if isinstance(batch, dict) else batch
        self.seen.append([int(image.long().sum()) for image in images])
        return super().training_step(batch, batch_idx)  # type: ignore[misc]


class WatchedFedAMM(Watched, FedAMM):
    """FedAMM."""


class WatchedFedAvg(Watched, FedAvg):
    """FedAvg."""


def data_for(num_ranks: int) -> TinyData:
    """228 images, so that two ranks leave none out; 12 meta images."""
    return tiny_data(
        batch_size=BATCH_SIZE // num_ranks, num_meta_per_class=3, imbalance_profile="none", augmentation="crop_flip"
    )


def train(method: str, num_ranks: int, strategy: str) -> tuple[pl.Trainer, dict[str, Any]]:
    """Train two epochs and test; ``method`` is fedavg, fedavg with a sharpness-aware optimizer, a way to
    differentiate, or families: the forward way with families of classes and adjusted logits."""
    data = data_for(num_ranks)
    options: dict[str, Any] = {"model": network(), "lr": 0.05, "info": data.info}
    if method == "families":
        method = "forward"
        options |= {"families": "fixed", "objective": "logit_adjusted", "info": {**data.info, "shot_groups": GROUPS}}
    module = (
        WatchedFedAvg(4, 1, local_optimizer=method.partition("-")[2] or "sgd", **options)  # type: ignore[arg-type]
        if method.startswith("fedavg")
        else WatchedFedAMM(4, 1, meta_lr=1.0, differentiation=method, **options)  # type: ignore[arg-type]
    ).double()
    module.seen = []
    if num_ranks > 1:  # as without a common seed
        torch.manual_seed(int(pl.utilities.rank_zero_only.rank or 0))
        for parameter in getattr(module, "weight_net", nn.Identity()).parameters():
            parameter.data.add_(torch.rand_like(parameter) * (pl.utilities.rank_zero_only.rank or 0))
    trainer = pl.Trainer(
        max_epochs=2,
        precision="64-true",
        accelerator="cpu",
        devices=num_ranks,
        strategy=strategy,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with quiet():
        trainer.fit(module, datamodule=data)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        trainer.test(module, datamodule=data, verbose=False)
        tested = sum(len(part) for part in trainer.predict(module, datamodule=data) or [])
    metrics |= {name: float(value) for name, value in trainer.callback_metrics.items()}
    return trainer, {
        "state": module.shared_state(),
        "metrics": metrics,
        "seen": module.seen,
        "steps": trainer.global_step,
        "predicted": tested,
    }


if __name__ == "__main__":
    method, folder = sys.argv[1:]
    trainer, outcome = train(method, 2, "ddp")
    torch.save(outcome, Path(folder) / f"rank{trainer.global_rank}.pt")
