"""The app of the server."""

from pathlib import Path

from fedamm_pl.integrations.flower import server_app

app = server_app(Path(__file__).with_name("config.yaml"))
