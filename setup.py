"""Puts ``configs/`` into the package as ``fedamm_pl/configs``; all else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fedamm_pl", "fedamm_pl.*"]), "fedamm_pl.configs"],
    package_dir={"fedamm_pl.configs": "configs"},
    package_data={"fedamm_pl.configs": ["*.yaml", "*/*.yaml"]},
)
