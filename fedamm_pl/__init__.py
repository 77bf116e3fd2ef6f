"""FedAMM (Long-Tailed Federated Learning via Aggregated Meta Mapping) as PyTorch Lightning modules."""

# ruff: noqa: E402  torchmetrics first, before Lightning imports it
from fedamm_pl.light_torchmetrics import import_torchmetrics

import_torchmetrics()

from fedamm_pl.algorithms import FedAMM, FedAvg
from fedamm_pl.data import FederatedDataModule
from fedamm_pl.federation.orchestrator import Orchestrator
from fedamm_pl.metrics import ShotAccuracy
from fedamm_pl.models import WeightNet
from fedamm_pl.protocol.module import FederatedModule
from fedamm_pl.version import __version__

__all__ = [
    "FedAMM",
    "FedAvg",
    "FederatedDataModule",
    "FederatedModule",
    "Orchestrator",
    "ShotAccuracy",
    "WeightNet",
    "__version__",
]
