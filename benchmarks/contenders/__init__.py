"""The contenders of ``benchmarks/peers.py``, a file each, and what prepares, measures and compares them.

A contender runs in its own environment and imports of this folder only ``given``, ``job``, ``networks`` and ``process_tree``, which
need no more than torch and NumPy. The other files belong to the command and need ``fedamm_pl``.
"""
