"""Executors: where the clients of a round train."""

from fedamm_pl.federation.executors.base import Executor, Kept, Outcome, Runner, RunSpec
from fedamm_pl.federation.executors.pool import Pool
from fedamm_pl.federation.executors.processes import Processes
from fedamm_pl.federation.executors.ray import Ray
from fedamm_pl.federation.executors.sequential import Sequential
from fedamm_pl.federation.executors.vectorized import Vectorized

__all__ = ["Executor", "Kept", "Outcome", "Pool", "Processes", "Ray", "RunSpec", "Runner", "Sequential", "Vectorized"]
