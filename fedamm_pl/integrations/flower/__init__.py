"""Federations on several machines as Flower apps; ``client_app`` and ``server_app`` build one from a configuration."""

from fedamm_pl.integrations.flower.client import client_app
from fedamm_pl.integrations.flower.server import server_app

__all__ = ["client_app", "server_app"]
