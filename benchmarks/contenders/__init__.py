"""The contenders of ``benchmarks/peers.py``, one file each, and the modules that prepare, measure and compare them.

A contender runs in its own environment. From this folder it imports only ``given``, ``job``, ``networks`` and
``process_tree``, which need nothing but torch and NumPy. The other modules belong to the command and need
``fedamm_pl``.
"""
