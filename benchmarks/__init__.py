"""The benchmark: where the time goes, as ratios inside one run."""
