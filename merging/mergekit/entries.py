"""The inputs of one output tensor as flat entries, handed out in blocks that stay in the cache of a core.

All arithmetic happens in the dtype of the configuration, rounded after every step, because mergekit computes
so: in bf16 the last bits of its results depend on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BLOCK = 1 << 17
_BITS = {2: (torch.int16, 0x7FFF), 4: (torch.int32, 0x7FFFFFFF), 8: (torch.int64, 0x7FFFFFFFFFFFFFFF)}


@dataclass(frozen=True)
class Entries:
    """Inputs of equal shape, flattened and contiguous, in their stored dtypes; ``dtype`` is that of the work.

    ``width`` is the length of a row: the last side of the tensor, all of it for vectors and scalars.
    """

    tensors: tuple[Tensor, ...]
    dtype: torch.dtype
    width: int

    @classmethod
    def of(cls, tensors: Sequence[Tensor], dtype: torch.dtype) -> Entries:
        """Entries of tensors of one shape."""
        shape = tensors[0].shape
        width = shape[-1] if len(shape) > 1 else tensors[0].numel()
        return cls(tuple(tensor.reshape(-1) for tensor in tensors), dtype, max(1, width))

    @property
    def size(self) -> int:
        """Entries of each input."""
        return self.tensors[0].numel()

    def spans(self) -> Iterator[tuple[int, int]]:
        """Ranges of entries; whole rows if a row fits into a block."""
        step = max(1, BLOCK // self.width) * self.width
        for start in range(0, self.size, step):
            yield start, min(start + step, self.size)

    def rows(self, index: int, start: int, stop: int) -> Tensor:
        """Entries of one input in the dtype of the work; do not write to them."""
        return self.tensors[index][start:stop].to(self.dtype)

    def delta(self, index: int, base: int, start: int, stop: int) -> Tensor:
        """A block of a task vector, yours to overwrite."""
        return self.rows(index, start, stop) - self.rows(base, start, stop)


@dataclass(frozen=True)
class DeltaMagnitudes:
    """The magnitudes of a task vector for :mod:`merging.mergekit.cuts`."""

    of: Entries
    index: int
    base: int

    @property
    def entries(self) -> int:
        return self.of.size

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        for start, stop in self.of.spans():
            yield start, magnitude_bits(self.of.delta(self.index, self.base, start, stop))

    def sample(self, step: int) -> np.ndarray:
        x, base = self.of.tensors[self.index][::step], self.of.tensors[self.base][::step]
        return magnitude_bits(x.to(self.of.dtype) - base.to(self.of.dtype))


def magnitude_bits(x: Tensor) -> np.ndarray:
    """The bits of ``|x|`` as integers of the same size and order; ``x`` is used up."""
    bits, mask = _BITS[x.element_size()]
    return x.view(bits).bitwise_and_(mask).numpy()


def from_bits(value: int, dtype: torch.dtype) -> float:
    """The magnitude with these bits."""
    size = torch.empty(0, dtype=dtype).element_size()
    return float(torch.tensor([value], dtype=_BITS[size][0]).view(dtype).double())
