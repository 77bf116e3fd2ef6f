"""``StoredModule``: load modules from untrusted files: only registered networks, plain options and finite tensors."""

import copy
import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn

from fedamm_pl.models import NAMES, registered, registered_only
from fedamm_pl.stored import StoredFile, built, file_name, read_stored, stored_options

ModuleT = TypeVar("ModuleT", bound="StoredModule")
MAX_NUMBERS = 3 * 2**20
"""Maximum size of the examples described in an untrusted file, for example a colour image of 1024 x 1024.

A method may run its network on such an example. Your own examples may have any size.
"""
SPARE_BYTES = 2**30
"""Bytes that a module may need beyond four times the size of its file, for tensors that follow from the options."""


class StoredModule(pl.LightningModule):
    """A module that does not trust the file from which it is loaded."""

    @classmethod
    def load_from_checkpoint(
        cls: type[ModuleT],
        checkpoint_path: StoredFile,
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        trust_model: bool = False,
        **kwargs: Any,
    ) -> ModuleT:
        """Load a module. Nothing in the file is executed, and a network named in it is built only if it is registered.

        Args:
            checkpoint_path: The file: a path, a URL that fsspec supports, or an open file.
            map_location: Where tensors go, as for ``torch.load``; by default to the device they were on, if it is
                available.
            hparams_file: A YAML file whose options replace those of the checkpoint.
            strict: Whether the file must hold the whole state and nothing else.
            weights_only: False executes the content of the file; use it for your own files only.
            trust_model: Whether a network that the file names by an import path is imported and called; use it only for
                files that you trust as much as a program.
            kwargs: Options that override those of the file, for example ``model``.

        Raises:
            ValueError: If the file is damaged or belongs to another module, its options have wrong types or are out of
                range, it names a network that is not registered, or its weights are not finite.
        """
        name = file_name(checkpoint_path)
        content, size = read_stored(checkpoint_path, map_location, weights_only)
        options = stored_options(cls, content, name, hparams_file, kwargs)
        if not trust_model and "model" not in kwargs:
            _require_registered(options.get("model"), name)
            _require_small_examples(options, name)
        state = _tensors(content, name)
        trusted = None if trust_model else [value for value in kwargs.values() if isinstance(value, str)]
        with registered_only(trusted):
            if not trust_model and size is not None:
                _require_size(cls, options, size, name)
            module = built(cls, options, name)
        module.configure_model()
        module.on_load_checkpoint(content)
        strict = module.strict_loading if strict is None else strict
        _load_state(module, state, strict, name, "" if "model" in options else ", or pass its network as `model`")
        return module.to(next((value.device for value in state.values()), module.device))


def _require_registered(model: Any, name: str) -> None:
    if isinstance(model, str) and registered(model) is None:
        raise ValueError(
            f"Expected the network in {name} to be one of {NAMES}, which are built from a file, got {model!r:.80}: "
            "pass the network as `model`, or `trust_model=True` if you trust the file as you trust a program."
        )


def _require_small_examples(options: Mapping[str, Any], name: str) -> None:
    size, channels = (options.get("info") or {}).get("image_size", []), options.get("in_channels", 3)
    if math.prod(size) * channels > MAX_NUMBERS:
        raise ValueError(
            f"Expected examples of at most {MAX_NUMBERS} numbers in {name}, got in_channels {channels} and image_size {size}: pass "
            "the network as `model`, or `trust_model=True` if you trust the file."
        )


def _tensors(content: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    state = content.get("state_dict")
    if not isinstance(state, dict) or not all(isinstance(entry, str) for entry in state):
        found = (
            type(state).__name__ if "state_dict" in content else f"one with {reprlib.repr(sorted(map(str, content)))}"
        )
        raise ValueError(f"Expected {name} to be a checkpoint of Lightning, which holds a `state_dict`, got {found}.")
    for entry, value in state.items():
        if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta or value.is_quantized:
            raise ValueError(f"Expected {entry:.80} in {name} to be a plain tensor, got {type(value).__name__}.")
    return state


def _require_size(kind: type[StoredModule], options: Mapping[str, Any], size: int, name: str) -> None:
    """Build the module without allocating memory, to find out how much it would need.

    Raises:
        ValueError: If it needs far more than the file's size.
    """
    memo: dict[int, Any] = {}
    if isinstance(model := options.get("model"), nn.Module):
        memo = {id(part): nn.Parameter(part.detach().to("meta"), part.requires_grad) for part in model.parameters()}
    try:
        with torch.device("meta"):
            module = kind(**copy.deepcopy(dict(options), memo))
    except Exception:  # a user's class may not support this; other errors are reported when the module is built
        return
    tensors = {
        id(value): value.nbytes
        for part in module.modules()
        for value in (*part.parameters(False), *part.buffers(False), *vars(part).values())
        if isinstance(value, Tensor)
    }
    if (needed := sum(tensors.values())) > SPARE_BYTES + 4 * size:
        raise ValueError(f"Expected the options in {name} to fit its {size} bytes, got some that take {needed} bytes.")


def _load_state(module: StoredModule, state: dict[str, Tensor], strict: bool, name: str, hint: str) -> None:
    own = {entry: value for entry, value in module.state_dict().items() if isinstance(value, Tensor)}
    missing, unknown = own.keys() - state.keys(), state.keys() - own.keys()
    differing = [f"without {entry}" for entry in sorted(missing)] + [f"with {entry}" for entry in sorted(unknown)]
    if differing and not strict:
        rank_zero_warn(f"{name} does not hold the state of {type(module).__name__}: {_listed(differing)}.")
        differing = []
    for entry in sorted(own.keys() & state.keys()):
        if not _alike(own[entry], state[entry]):
            differing.append(f"with {entry} of {_described(state[entry])} in place of {_described(own[entry])}")
    if differing:
        raise ValueError(
            f"Expected {name} to hold the state of {type(module).__name__} with this network, got one "
            f"{_listed(differing)}: load it by the class and with the options that wrote it{hint}."
        )
    bad = [entry for entry in sorted(own.keys() & state.keys()) if not _sound(own[entry], state[entry])]
    if bad:
        raise ValueError(f"Expected the state in {name} to be finite, got NaN or infinity in {_listed(bad)}.")
    module.load_state_dict(state, strict=strict)


def _alike(own: Tensor, stored: Tensor) -> bool:
    same_kind = own.is_floating_point() == stored.is_floating_point() and own.is_complex() == stored.is_complex()
    return same_kind and own.shape == stored.shape


def _sound(own: Tensor, stored: Tensor) -> bool:
    """Whether a tensor is finite in the module's type, except for infinities that the module also has, as in a mask."""
    stored = stored.detach().to(own)
    return bool((stored.isfinite() | (stored == own)).all())


def _described(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def _listed(entries: list[str]) -> str:
    more = f" and {len(entries) - 1} more" if len(entries) > 1 else ""
    return f"{entries[0]:.120}{more}"
