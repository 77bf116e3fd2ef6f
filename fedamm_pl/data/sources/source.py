"""``Source``: examples by index, wherever they lie."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

AT_ONCE = 500
"""Examples of a source without a fingerprint that are read at once for a hash of all of them."""


@runtime_checkable
class Source(Protocol):
    """Examples by index, as a tensor (N, ...) has them: uint8 images (N, C, H, W) or float features (N, D).

    A tensor is a source. Others, which hold more than fits into memory, make examples when they are asked for; they may have

    - ``stream(chunks)``, which yields ``source[chunk]`` for each chunk of indices and works ahead;
    - ``subset(indices)``, the source of these examples alone;
    - ``fingerprint``, a short text that differs where examples do, in place of a hash of all their bytes.
    """

    @property
    def shape(self) -> torch.Size:
        """The number N of examples, then the shape of one."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of their values: uint8 or float32."""

    @property
    def device(self) -> torch.device:
        """Where the examples are when they have been taken."""

    def __len__(self) -> int:
        """Return the number N of examples."""

    def __getitem__(self, indices: Any) -> Tensor:
        """Return examples (B, ...), by a tensor of indices (B,) on ``device`` or a slice."""


def stream(source: Source, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the examples of each chunk of indices; a source that can works on the next ones meanwhile."""
    own = getattr(source, "stream", None)
    return map(source.__getitem__, chunks) if own is None or isinstance(source, Tensor) else own(chunks)


def subset(source: Source, indices: Tensor) -> Source:
    """Return the source of these examples alone, indices of shape (n,) on the CPU."""
    if isinstance(source, Tensor):
        return source[indices.to(source.device)]
    part: Source = source.subset(indices)  # type: ignore[attr-defined]
    return part


def content(source: Source) -> bytes | memoryview:
    """Return bytes that differ where the examples of two sources of one shape do."""
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
