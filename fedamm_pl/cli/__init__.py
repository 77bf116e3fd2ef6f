"""The command line: ``orchestrate.py``, also installed as ``fedamm``."""
