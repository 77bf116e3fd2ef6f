"""The command line: a typed configuration, from YAML files and options, to a finished run."""

import datetime
import logging
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import pytorch_lightning as pl
import torch
import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from pytorch_lightning.loggers import Logger, TensorBoardLogger

from fedamm_pl import FederatedDataModule, FederatedModule, Orchestrator, __version__
from fedamm_pl import algorithms as known_algorithms
from fedamm_pl.federation.callbacks import FederationCallback, LogTo, Progress
from fedamm_pl.federation.checkpoint import write_atomically
from fedamm_pl.federation.summary import table
from fedamm_pl.federation.trainer import TrainerConfig

DESCRIPTION = """FedAMM: Long-Tailed Federated Learning via Aggregated Meta Mapping.
Trains a classifier over simulated clients with long-tailed data and writes metrics, checkpoints and the model to a folder.
"""
NOT_PASSED_ON = {"module", "data", "seed", "callbacks", "output_dir", "keep_checkpoints", "trainer", "executor"}


@dataclass(frozen=True)
class OutputConfig:
    """Where results go and what is shown."""

    dir: str | None = None
    """Folder of the run; by default runs/<config name>/<date-time>. An interrupted run in it is continued."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints to keep, beside the best."""
    progress: Literal["auto", "none"] = "auto"
    """auto shows a bar on a terminal and a line per evaluation elsewhere; none shows only the closing table."""


class Parser(ArgumentParser):
    """An argument parser whose errors are one line: the option, what it got, what is allowed."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line to standard error and exit with status 2."""
        print(f"fedamm: error: {one_line(message)}", file=sys.stderr)
        sys.exit(2)


def one_line(message: str) -> str:
    """Shorten a message of several lines to one, without the parts that speak of the parser."""
    known = ", ".join(name for name in known_algorithms.__all__ if name != "FederatedModule")
    if found := re.search(r"[Nn]o (?:known )?subclass .*?['\"]?(\w+)['\"]?|Import path (\S+) does not|class_path '?(\S+?)'?[ :]", message):
        del found
    lines = [line.strip(" -") for line in message.splitlines() if line.strip(" -")]
    del known
    return " ".join(lines)


def build_parser() -> Parser:
    """Return the parser of ``fedamm``, without sub-commands."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(prog="fedamm", description=DESCRIPTION, allow_abbrev=False, version=f"fedamm_pl {__version__}")
    parser.add_argument("--config", action="config", help="A YAML file with these options; later ones override earlier.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of split, initial weights, sampling and training.")
    parser.add_argument("--data", type=FederatedDataModule, default={"class_path": "fedamm_pl.FederatedDataModule"})
    parser.add_argument("--algorithm", type=FederatedModule, required=True, help="FedAMM, FedAvg, or an import path.")
    parser.add_class_arguments(Orchestrator, "federation", skip=NOT_PASSED_ON, instantiate=False)
    parser.add_argument("--trainer", type=TrainerConfig, default=TrainerConfig())
    parser.add_argument(
        "--logger",
        type=bool | list[Logger],
        default=True,
        help="A list of Lightning loggers; true is TensorBoard in the run's folder, false none.",
    )
    parser.add_argument("--output", type=OutputConfig, default=OutputConfig())
    parser.link_arguments("seed", "data.init_args.seed")
    for name in ("num_classes", "in_channels", "info"):
        parser.link_arguments("data", f"algorithm.init_args.{name}", _attribute(name), apply_on="instantiate")
    return parser


def _attribute(name: str) -> Any:
    def attribute(data: FederatedDataModule) -> Any:
        return getattr(data, name)

    return attribute


def main(args: Sequence[str] | None = None) -> None:
    """Run the program.

    Args:
        args: The command line without the program's name; by default that of the process.
    """
    parser = build_parser()
    config = parser.parse_args(list(sys.argv[1:] if args is None else args))
    print(config)


if __name__ == "__main__":
    main()
