"""The federation: sampling, executors, aggregation, the round loop, checkpoints and callbacks."""
