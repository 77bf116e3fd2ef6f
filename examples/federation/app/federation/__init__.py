"""The Flower app of a federation: its server, its clients and the configuration of the run."""
