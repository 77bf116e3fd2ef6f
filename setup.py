"""Puts ``configs/`` into the package as ``fedamm_pl/configs``; all else is in pyproject.toml."""

from setuptools import find_namespace_packages, setup

CONFIGS = ["fedamm_pl.configs", *(f"fedamm_pl.configs.{name}" for name in find_namespace_packages("configs"))]

setup(
    packages=[*find_namespace_packages(include=["fedamm_pl", "fedamm_pl.*"]), *CONFIGS],
    package_dir={"fedamm_pl.configs": "configs"},
    package_data={name: ["*.yaml"] for name in CONFIGS},
)
