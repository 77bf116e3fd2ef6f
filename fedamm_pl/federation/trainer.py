"""Quiet Lightning Trainers for the many short fits and evaluations of a federation."""

import logging
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any, Literal, cast

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.plugins.precision import Precision
from pytorch_lightning.strategies import SingleDeviceStrategy

from fedamm_pl.protocol.classifier import Classifier

PrecisionName = Literal["auto", "32-true", "64-true", "bf16-mixed", "bf16-true"]
CHATTY_LOGGERS = (
    "pytorch_lightning.utilities.rank_zero",
    "pytorch_lightning.trainer.connectors.signal_connector",  # reports SIGTERM, as the program does itself
    "pytorch_lightning.accelerators.cuda",  # reports the GPU, at each fit
    "lightning.fabric.utilities.seed",
    "lightning.pytorch",
)
IGNORED_WARNINGS = (
    r".*LeafSpec",  # torch's own tree utilities, called by Lightning in every fit
    r".*you defined a `validation_step` but have no `val_dataloader`",  # the server evaluates, clients do not
    r".*GPU available but not used",  # --trainer.accelerator cpu is intended
)

_quiet: list[bool] = []
"""Not empty inside :func:`quiet`."""


class ResidentStrategy(SingleDeviceStrategy):
    """Strategy for a single device that leaves the module on the device when a fit ends.

    Lightning would move it to the CPU, which costs a transfer per client and round.
    """

    def model_to_device(self) -> None:
        """Move the module to the device if it is not there yet."""
        assert self.lightning_module is not None
        if self.lightning_module.device != self.root_device:
            super().model_to_device()

    def teardown(self) -> None:
        """Clean up after a fit, but leave the module where it is."""
        self.optimizers = []  # their momentum would stay on the device until the dead Trainer is collected
        self.precision_plugin.teardown()
        self.checkpoint_io.teardown()


@dataclass(frozen=True)
class TrainerConfig:
    """How and where clients train and the global model is evaluated."""

    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto"
    """Hardware: auto uses a GPU if there is one."""
    devices: int | list[int] = 1
    """One device: 1, or [2] for the GPU with that number."""
    precision: PrecisionName = "auto"
    """Precision of training, meta step and evaluation. auto: bf16-mixed if the hardware supports it, else 32-true. Training at the server
    (MetaFineTune, CReFF) uses the type of the weights. 16-mixed is not offered, because its loss scaling would distort the meta
    gradient."""
    memory_format: Literal["auto", "channels_last", "contiguous_format"] = "auto"
    """Memory layout of the network's input images. auto: channels_last for networks with `channels_last = True`, such as the package's,
    else contiguous_format."""
    compile: bool = False
    """Compile the network once for all clients and evaluations (torch.compile; on a CPU it needs a C++ compiler)."""
    deterministic: bool = False
    """On a GPU: use only deterministic kernels, so that the same seed gives the same bits."""

    @cached_property
    def _probe(self) -> pl.Trainer:
        """A Trainer that resolves accelerator and device once."""
        try:
            with quiet():
                return pl.Trainer(**self._options)
        except (MisconfigurationException, RuntimeError, ValueError, TypeError) as error:
            raise ValueError(
                f"Expected `accelerator` and `devices` to be available, got {self.accelerator!r} and {self.devices}: {error}"
            ) from error

    def __post_init__(self) -> None:
        if self.devices != 1 and (isinstance(self.devices, int) or len(self.devices) != 1):
            raise ValueError(f"Expected `devices` to be 1 or the number of one GPU like [2], got {self.devices}.")

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "accelerator": self.accelerator,
            "devices": self.devices,
            "precision": "32-true" if self.precision == "auto" else self.precision,
            "deterministic": self.deterministic,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
        }

    def __getstate__(self) -> dict[str, Any]:
        """Return the options only, without what was looked up on this machine."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def device(self) -> torch.device:
        """The resolved device."""
        return torch.device(self._probe.strategy.root_device)

    @property
    def kind(self) -> str:
        """The resolved hardware: ``cpu``, ``cuda`` or ``mps``."""
        return str(self.device.type)

    def resolved(self) -> "TrainerConfig":
        """Return a configuration with the hardware and the precision that ``auto`` has chosen here."""
        precision: Any = self.resolved_precision
        accelerator: Any = self.kind
        return replace(self, accelerator=accelerator, precision=precision)

    @cached_property
    def resolved_precision(self) -> str:
        """The precision, with ``auto`` resolved."""
        if self.precision != "auto":
            return self.precision
        return "bf16-mixed" if computes_in_bfloat16(self.device) else "32-true"

    @cached_property
    def precision_plugin(self) -> Precision:
        """Lightning's precision plugin; its ``forward_context`` is used for computations outside a fit."""
        with quiet():
            return self.build().precision_plugin

    def build(self, **options: Any) -> pl.Trainer:
        """Return a fresh Trainer without logger, checkpoints, bar and summary.

        Args:
            options: Further arguments of the Trainer, for example ``max_epochs``.
        """
        key = tuple(options.items())
        # determinism is set for the whole process when a Trainer is built
        if self.deterministic or not all(isinstance(value, int | float | str | None) for _, value in key):
            return self._constructed(options)
        if key not in self._templates:
            self._templates[key] = _pickled(self._constructed(options))
        template = self._templates[key]
        # building it each time takes 50 times as long: Lightning looks for plug-ins in all installed packages
        return self._constructed(options) if template is None else cast(pl.Trainer, pickle.loads(template))

    @cached_property
    def _templates(self) -> dict[Any, bytes | None]:
        """Options -> a pickled Trainer as Lightning has built it, before any fit; None if each one must be built."""
        return {}

    def _constructed(self, options: dict[str, Any]) -> pl.Trainer:
        strategy = ResidentStrategy(device=self.device)
        return pl.Trainer(**{**self._options, "precision": self.resolved_precision}, strategy=strategy, **options)

    def place(self, module: Classifier) -> None:
        """Move a module to the device, and prepare it for the precision, memory format and compilation of its fits.

        Raises:
            ValueError: If it has no weights yet.
        """
        if empty := [name for name, value in module.state_dict().items() if value.is_meta]:
            raise ValueError(
                f"Expected `model` to have weights, got {module.network_name} with {empty[0]} on the meta device."
            )
        self.precision_plugin.convert_module(module)
        module.to(self.device)
        if self.memory_format != "auto":
            module.memory_format = getattr(torch, self.memory_format)
        # in a partial, so that the compiled network does not become a second submodule
        module.compiled = partial(torch.compile(module.model)) if self.compile or module.compiles else None


def _pickled(trainer: pl.Trainer) -> bytes | None:
    """Return a Trainer as bytes; None if it cannot be pickled, or has callbacks, which must be new for each fit.

    Such callbacks come from another package that plugs into Lightning.
    """
    try:
        return None if trainer.callbacks else pickle.dumps(trainer)  # type: ignore[attr-defined]
    except Exception:  # parts of another Lightning version may raise any exception
        return None


def computes_in_bfloat16(device: torch.device) -> bool:
    """Return whether the hardware natively multiplies bfloat16: NVIDIA from Ampere on, x86 with AVX-512 bf16 or AMX."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # with a version of torch that lacks this function, float32 is used
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and bool(found.get("avx512_bf16") or found.get("amx_bf16"))


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what Lightning reports on every fit: devices, tips, stopping reasons, and warnings that do not apply.

    Inside another such context it does nothing. One context around many fits therefore saves, for each fit, the time of
    a step of a small network.
    """
    if _quiet:
        yield
        return
    loggers = [logging.getLogger(name) for name in CHATTY_LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for message in IGNORED_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        _quiet.append(True)
        try:
            yield
        finally:
            _quiet.clear()
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
