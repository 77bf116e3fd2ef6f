"""Federated algorithms: one LightningModule each, with the client's and the server's side in one class."""

from fedamm_pl.algorithms.base import FederatedModule
from fedamm_pl.algorithms.fedamm import FedAMM
from fedamm_pl.algorithms.fedavg import FedAvg

__all__ = ["FedAMM", "FedAvg", "FederatedModule"]
