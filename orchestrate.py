"""Run a federated experiment: ``python orchestrate.py --config configs/quickstart.yaml``; the same as ``fedamm``."""

from fedamm_pl.cli.main import main

if __name__ == "__main__":
    main()
