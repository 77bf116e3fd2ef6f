"""The federation: messages, sampling, executors, aggregation, the round loop, checkpoints and callbacks."""
