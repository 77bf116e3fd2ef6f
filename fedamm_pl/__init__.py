"""FedAMM (Long-Tailed Federated Learning via Aggregated Meta Mapping) as PyTorch Lightning modules."""

__version__ = "0.1.0"

from fedamm_pl.algorithms import FedAMM, FedAvg, FederatedModule
from fedamm_pl.data import FederatedDataModule
from fedamm_pl.federation.orchestrator import Orchestrator
from fedamm_pl.metrics import ShotAccuracy
from fedamm_pl.models import WeightNet

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
