"""Benchmarks of run time and memory, mostly as ratios between measurements of the same run."""
