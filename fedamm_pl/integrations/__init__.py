"""Integrations with other federated learning frameworks."""
