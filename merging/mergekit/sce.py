"""mergekit's SCE: keep where the task vectors differ most, weigh by energy, erase minority signs.

Its absolute numbers are kept: energies that sum to less than 1e-6 count as equal, divisors are at least 1e-6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from merging.mergekit.cuts import Cut, keep_largest
from merging.mergekit.entries import BLOCK, Entries, added, bit_type, from_bits, magnitude_bits, votes

FLOOR = 1e-6


def merge(
    entries: Entries, base: int, deltas: Sequence[int], topk: float, emit: Callable[[int, Tensor], None]
) -> None:
    """Hand out the base plus the mean of what is left of the task vectors."""
    selected = _Selected(entries, base, deltas, topk) if topk < 1.0 else None

    def kept() -> Iterator[tuple[int, int, Tensor]]:
        for start, stop in entries.spans():
            x = _stacked(entries, base, deltas, start, stop)
            if selected is not None:
                x.mul_(selected.mask(start, stop))
            yield start, stop, x

    shares = _shares(entries, kept()).unsqueeze(1)
    for start, stop, x in kept():
        sign = votes(added(x)).to(x.dtype)
        agreeing = x.mul_(sign).clamp_min_(0.0)
        divisor = added(agreeing.clone().gt_(0.0).mul_(shares)).to(x.dtype)
        found = added(agreeing.mul_(shares)).to(x.dtype).mul_(sign)
        found.div_(divisor.clamp_min_(FLOOR))
        emit(start, found.add_(entries.rows(base, start, stop)))


def _stacked(entries: Entries, base: int, deltas: Sequence[int], start: int, stop: int) -> Tensor:
    rows = entries.rows(base, start, stop)
    x = torch.empty((len(deltas), stop - start), dtype=entries.dtype)
    for row, index in zip(x, deltas, strict=True):
        torch.sub(entries.rows(index, start, stop), rows, out=row)
    return x


def _shares(entries: Entries, kept: Iterator[tuple[int, int, Tensor]]) -> Tensor:
    """The mean squares of the task vectors over their sum; each square is rounded, as everything."""
    total: Tensor | float = 0.0
    for _, _, x in kept:
        total = total + x.square_().sum(1, dtype=torch.float64)
    assert isinstance(total, Tensor)
    energy = (total / entries.size).to(entries.dtype)
    whole = float(energy.sum())
    if abs(whole) < FLOOR:
        return torch.ones_like(energy) / energy.numel()
    return energy / whole


@dataclass(frozen=True)
class _Variances:
    """The variances over the tasks, rounded to the dtype of the work."""

    values: Tensor

    @property
    def entries(self) -> int:
        return self.values.numel()

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, self.entries, BLOCK):
            yield start, self.block(start)

    def block(self, start: int) -> np.ndarray:
        return magnitude_bits(self.values[start : start + BLOCK])

    def sample(self, size: int) -> np.ndarray:
        step = max(1, self.entries // size) | 1
        return magnitude_bits(self.values[::step].clone())[None]


class _Selected:
    """Where the variance is among the fraction ``topk`` of those above zero; of equal ones the first."""

    def __init__(self, entries: Entries, base: int, deltas: Sequence[int], topk: float) -> None:
        self._values = torch.empty(entries.size, dtype=entries.dtype)
        work = torch.float32 if entries.dtype.itemsize == 2 else torch.float64
        nonzero, bits = 0, torch.from_numpy(np.empty(0, bit_type(self._values))).dtype
        for start, stop in entries.spans():
            x = _stacked(entries, base, deltas, start, stop).to(work)
            x.sub_(added(x).div_(len(deltas)))
            block = added(x.square_()).div_(len(deltas)).to(entries.dtype)
            nonzero += int(np.count_nonzero(block.view(bits).numpy()))
            self._values[start:stop] = block
        count = int(nonzero * topk) if topk > 0.0 else 0
        self._cut: Cut | None = keep_largest([_Variances(self._values)], [count])[0] if count else None
        self._limit = from_bits(self._cut.value, entries.dtype) if self._cut else torch.inf

    def mask(self, start: int, stop: int) -> Tensor:
        """Ones where the entry stays."""
        mask = self._values[start:stop].clone()
        if self._cut is None:
            return mask.zero_()
        middle = min(max(self._cut.position - start, 0), stop - start)
        mask[middle:].gt_(self._limit)
        mask[:middle].ge_(self._limit)
        return mask
