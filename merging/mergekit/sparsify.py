"""mergekit's sparsifiers on blocks of a task vector: each looks at the whole, then zeroes block by block.

Rescaling matches the L1 norm, both sums rounded to the dtype that mergekit sums in. Random masks come from
streams keyed by seed, input and tensor; mergekit's own depend on the order of its tasks and cannot be had.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from merging.mergekit.cuts import Cut
from merging.mergekit.entries import Entries, bit_type, from_bits, zero_where
from merging.rules import task_bits

FLOOR = 1e-7
"""Norms below it are left alone."""


class Sparsifier(ABC):
    """Sparsifies the task vector of one input in place; blocks come once each, in order."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.factor: Tensor | None = None

    @abstractmethod
    def cut(self, x: Tensor, start: int) -> Tensor:
        """Zero what is dropped of the block that begins at ``start``; 0 begins a new run over all."""

    def apply(self, x: Tensor, start: int) -> Tensor:
        """The block as mergekit leaves it."""
        y = self.cut(x, start)
        if self.factor is None:
            return y
        if y.dtype == self.dtype:
            return y.mul_(self.factor)
        return y.to(self.dtype).mul_(self.factor).to(y.dtype)


class Nothing(Sparsifier):
    """Density 0: everything goes."""

    def cut(self, x: Tensor, start: int) -> Tensor:
        return x.zero_()


class Largest(Sparsifier):
    """An exact number of the largest magnitudes; of equal ones the first."""

    def __init__(self, dtype: torch.dtype, cut: Cut) -> None:
        super().__init__(dtype)
        self._cut = cut
        self._value = from_bits(cut.value, dtype)

    def cut(self, x: Tensor, start: int) -> Tensor:
        for part, within in _sides(x, start, self._cut):
            size = part.abs()
            part.mul_(size.ge_(self._value) if within else size.gt_(self._value))
        return x


class Band(Sparsifier):
    """A run of places of an ascending stable sort by magnitude."""

    def __init__(self, dtype: torch.dtype, low: Cut, high: Cut) -> None:
        super().__init__(dtype)
        self._low, self._high = low, high
        self._least, self._most = from_bits(low.value, dtype), from_bits(high.value, dtype)

    def cut(self, x: Tensor, start: int) -> Tensor:
        for part, within in _sides(x, start, self._low):
            size = part.abs()
            part.mul_(size.gt_(self._least) if within else size.ge_(self._least))
        for part, within in _sides(x, start, self._high):
            size = part.abs()
            part.mul_(size.le_(self._most) if within else size.lt_(self._most))
        return x


class Random(Sparsifier):
    """Each entry stays with probability ``density``."""

    def __init__(self, dtype: torch.dtype, density: float, key: tuple[int, str, str]) -> None:
        super().__init__(_work(dtype))
        self._limit = limits(torch.tensor(density).to(self.dtype))
        self._key = key
        self._bits = task_bits(*key)

    def cut(self, x: Tensor, start: int) -> Tensor:
        if start == 0:
            self._bits = task_bits(*self._key)
        size = x.numel()
        drawn = self._bits.random_raw((size + 1) // 2).view(np.uint32)[:size]
        keep = np.empty(size, bit_type(x))
        np.less(drawn, self._limit, out=keep, casting="unsafe")
        return zero_where(x, keep)


class RankedRandom(Sparsifier):
    """Stays with a probability that grows with the rank in its row, from density - epsilon to + epsilon.

    The probabilities are rounded as mergekit rounds them. The mask is kept, one bit per entry, so that rows
    are sorted once.
    """

    def __init__(
        self, dtype: torch.dtype, width: int, density: float, epsilon: float, key: tuple[int, str, str]
    ) -> None:
        super().__init__(_work(dtype))
        self._width = width
        self._limits = torch.from_numpy(limits(self._chances(density, epsilon)).view(np.int32))
        self._bits = task_bits(*key)
        self._kept: dict[int, np.ndarray] = {}

    def _chances(self, density: float, epsilon: float) -> Tensor:
        """Probability by rank, smallest magnitude first."""
        ranks = torch.arange(self._width).to(self.dtype) + 1
        place = ((ranks - ranks[0]) / (ranks[-1] - ranks[0])).clamp_(0, 1).nan_to_num_(0.5)
        return (density - epsilon) + place * 2 * epsilon

    def cut(self, x: Tensor, start: int) -> Tensor:
        if start not in self._kept:
            self._kept[start] = np.packbits(self._draw(x))
        keep = np.unpackbits(self._kept[start], count=x.numel())
        return zero_where(x, keep.astype(bit_type(x)))

    def _draw(self, x: Tensor) -> np.ndarray:
        rows = x.view(-1, self._width)
        drawn = self._bits.random_raw((x.numel() + 1) // 2).view(np.uint32)[: x.numel()]
        limit = torch.empty(rows.shape, dtype=torch.int32)
        limit.scatter_(1, row_order(rows), self._limits.expand(rows.shape))
        return drawn < limit.view(-1).numpy().view(np.uint32)


def row_order(rows: Tensor) -> Tensor:
    """Columns of each row by ascending magnitude, equal ones by column."""
    if rows.element_size() == 2:  # sorted by counting, several times faster than any other stable sort
        keys = rows.abs().view(torch.int16).numpy()
        return torch.from_numpy(keys.argsort(axis=1, kind="stable"))
    return rows.abs().sort(dim=1, stable=True).indices


def match_l1(entries: Entries, base: int, sparsifiers: Mapping[int, Sparsifier]) -> None:
    """Set the factors that give the task vectors of these inputs their L1 norms back."""
    before, after = dict.fromkeys(sparsifiers, 0.0), dict.fromkeys(sparsifiers, 0.0)
    for start, stop in entries.spans():
        for index, sparse in sparsifiers.items():
            x = entries.delta(index, base, start, stop)
            before[index] += _l1(x)
            after[index] += _l1(sparse.cut(x, start))
    for index, sparse in sparsifiers.items():
        sums = torch.tensor([before[index], after[index]], dtype=torch.float64).to(sparse.dtype)
        if float(sums[0]) >= FLOOR and float(sums[1]) >= FLOOR:
            sparse.factor = sums[0] / sums[1]


def limits(chances: Tensor) -> np.ndarray:
    """Whole numbers below which a drawn 32-bit number keeps its entry."""
    return np.minimum(np.ceil(chances.double().numpy() * 2.0**32), 2.0**32 - 1).astype(np.uint32)


def _work(dtype: torch.dtype) -> torch.dtype:
    """mergekit draws and rescales in bf16 if that is the dtype, else in float32."""
    return dtype if dtype == torch.bfloat16 else torch.float32


def _l1(x: Tensor) -> float:
    return float(x.abs().sum(dtype=torch.float32 if x.element_size() == 2 else torch.float64))


def _sides(x: Tensor, start: int, cut: Cut) -> list[tuple[Tensor, bool]]:
    """The parts of a block before and after a cut's position; the flag says before."""
    middle = min(max(cut.position - start, 0), x.numel())
    return [(part, before) for part, before in ((x[:middle], True), (x[middle:], False)) if part.numel()]
