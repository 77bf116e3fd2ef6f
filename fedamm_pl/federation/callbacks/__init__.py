"""Observers of a run: the base class, Lightning loggers, progress on the terminal, and the files of a run directory."""

from fedamm_pl.federation.callbacks.base import FederationCallback, RoundRecord
from fedamm_pl.federation.callbacks.loggers import LogTo
from fedamm_pl.federation.callbacks.progress import Progress

__all__ = ["FederationCallback", "LogTo", "Progress", "RoundRecord"]
