"""A federation of several machines as a Flower app: ``client_app`` and ``server_app`` make its two halves from one configuration."""

from fedamm_pl.integrations.flower.client import client_app
from fedamm_pl.integrations.flower.server import server_app

__all__ = ["client_app", "server_app"]
