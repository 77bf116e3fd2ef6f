"""The app of a client."""

from pathlib import Path

from fedamm_pl.integrations.flower import client_app

app = client_app(Path(__file__).with_name("config.yaml"))
