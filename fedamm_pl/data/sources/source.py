"""``Source``: examples by index, in memory or elsewhere."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

AT_ONCE = 500
"""Number of examples that are read at once to hash a source without a fingerprint."""


@runtime_checkable
class Source(Protocol):
    """Examples by index, like a tensor (N, ...): uint8 images (N, C, H, W) or float features (N, D).

    A tensor is a source. Other sources, for data that do not fit into memory, load examples on demand. They may have

    - ``stream(chunks)``, which yields ``source[chunk]`` for each chunk of indices and prepares the next chunks in
    advance; - ``subset(indices)``, a source with these examples only;
    - ``fingerprint``, a short text that differs if the examples differ, used instead of a hash of all their bytes.
    """

    @property
    def shape(self) -> torch.Size:
        """The number N of examples, then the shape of one."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of their values: uint8 or float32."""

    @property
    def device(self) -> torch.device:
        """The device of the examples that are returned."""

    def __len__(self) -> int:
        """Return the number N of examples."""

    def __getitem__(self, indices: Any) -> Tensor:
        """Return the examples (B, ...) for a tensor of indices (B,) on ``device`` or for a slice."""


def stream(source: Source, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the examples of each chunk of indices; a source with ``stream`` prepares the next chunks meanwhile."""
    own = getattr(source, "stream", None)
    return map(source.__getitem__, chunks) if own is None or isinstance(source, Tensor) else own(chunks)


def subset(source: Source, indices: Tensor) -> Source:
    """Return a source with these examples only, given indices of shape (n,) on the CPU."""
    if isinstance(source, Tensor):
        return source[indices.to(source.device)]
    part: Source = source.subset(indices)  # type: ignore[attr-defined]
    return part


def content(source: Source) -> bytes | memoryview:
    """Return bytes that differ if the examples of two sources with the same shape differ."""
    if isinstance(source, Tensor):
        return source.cpu().contiguous().numpy().data
    if (known := getattr(source, "fingerprint", None)) is not None:
        return str(known).encode()
    digest = hashlib.sha256()
    for images in stream(source, torch.split(torch.arange(len(source)), AT_ONCE)):
        digest.update(images.cpu().contiguous().numpy().data)
    return digest.digest()


def is_features(source: Source) -> bool:
    """Return whether examples are float features (D,), not images."""
    return len(source.shape) == 2
