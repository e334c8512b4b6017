"""The inputs of one output tensor as flat entries, handed out in blocks that stay in the cache of a core.

All arithmetic happens in the dtype of the configuration, rounded after every step, because mergekit computes
so: in bf16 the last bits of its results depend on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

BLOCK = 1 << 17
RUNS = 64
"""A sample is made of so many runs of neighbouring entries."""
_BITS = {2: (torch.int16, 0x7FFF), 4: (torch.int32, 0x7FFFFFFF), 8: (torch.int64, 0x7FFFFFFFFFFFFFFF)}


class Rows(Protocol):
    """One input, flat."""

    @property
    def size(self) -> int: ...

    def read(self, start: int, stop: int) -> Tensor:
        """Entries in their stored dtype. Do not write to them; they last until the next call."""
        ...


@dataclass(frozen=True)
class Held:
    """An input that lies in memory."""

    tensor: Tensor

    @property
    def size(self) -> int:
        return self.tensor.numel()

    def read(self, start: int, stop: int) -> Tensor:
        return self.tensor.reshape(-1)[start:stop]


@dataclass(frozen=True)
class Entries:
    """Inputs of equal shape, flat, in their stored dtypes; ``dtype`` is that of the work.

    ``width`` is the length of a row: the last side of the tensor, all of it for vectors and scalars.
    """

    inputs: tuple[Rows, ...]
    dtype: torch.dtype
    width: int

    @classmethod
    def of(cls, inputs: Sequence[Rows], shape: Sequence[int], dtype: torch.dtype) -> Entries:
        """Entries of inputs of one shape."""
        width = shape[-1] if len(shape) > 1 else inputs[0].size
        return cls(tuple(inputs), dtype, max(1, width))

    @property
    def size(self) -> int:
        """Entries of each input."""
        return self.inputs[0].size

    def spans(self) -> Iterator[tuple[int, int]]:
        """Ranges of whole rows."""
        step = max(1, BLOCK // self.width) * self.width
        for start in range(0, self.size, step):
            yield start, min(start + step, self.size)

    def rows(self, index: int, start: int, stop: int) -> Tensor:
        """Entries of one input in the dtype of the work; do not write to them."""
        return self.inputs[index].read(start, stop).to(self.dtype)

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

    def block(self, start: int) -> np.ndarray:
        found = next(span for span in self.of.spans() if span[0] == start)
        return magnitude_bits(self.of.delta(self.index, self.base, *found))

    def sample(self, size: int) -> np.ndarray:
        run = size // RUNS
        if self.entries <= 4 * size:
            whole = magnitude_bits(self.of.delta(self.index, self.base, 0, self.entries))
            return whole[: len(whole) // run * run].reshape(-1, run) if len(whole) >= 2 * run else whole[None]
        starts = [int(i * (self.entries - run) / (RUNS - 1)) for i in range(RUNS)]
        parts = [self.of.delta(self.index, self.base, start, start + run) for start in starts]
        return magnitude_bits(torch.stack(parts).view(-1)).reshape(RUNS, run)


def added(y: Tensor) -> Tensor:
    """The sum over the first axis, not yet rounded to 16 bits; several times faster than ``sum``.

    From five float32 tensors on torch adds in another order, which is followed.
    """
    if y.dtype == torch.float32 and len(y) > 4:
        return y.sum(0)
    work = y.float() if y.element_size() == 2 else y
    total = work[0].clone()
    for row in work[1:]:
        total.add_(row)
    return total


def votes(total: Tensor) -> Tensor:
    """``+1`` where a sum is not negative, ``-1`` elsewhere; in place."""
    return total.ge_(0.0).mul_(2.0).sub_(1.0)


def zero_where(x: Tensor, keep: np.ndarray) -> Tensor:
    """Zero the entries that are not kept, in place; ``keep`` holds ones and zeros of the size of ``x``'s."""
    bits, _ = _BITS[x.element_size()]
    x.view(bits).mul_(torch.from_numpy(keep))
    return x


def bit_type(x: Tensor) -> np.dtype[np.signedinteger]:
    """numpy's integers of the size of the entries of ``x``."""
    return np.dtype(f"i{x.element_size()}")


def magnitude_bits(x: Tensor) -> np.ndarray:
    """The bits of ``|x|`` as integers of the same size and order; ``x`` is used up."""
    bits, mask = _BITS[x.element_size()]
    return x.view(bits).bitwise_and_(mask).numpy()


def from_bits(value: int, dtype: torch.dtype) -> float:
    """The magnitude with these bits."""
    size = torch.empty(0, dtype=dtype).element_size()
    return float(torch.tensor([value], dtype=_BITS[size][0]).view(dtype).double())
