"""Exact order statistics of magnitudes with a stated tie rule, from a few passes over blocks.

Magnitudes are compared as the integers of their float bits, whose order is the same. A sample brackets the
wanted statistic, a pass counts above and inside the bracket, and the exact value follows without a sort of
the whole. Of equal magnitudes those with the lower index come first in both directions of sorting, as in a
stable sort.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np


class Magnitudes(Protocol):
    """The bits of magnitudes that come in blocks, as often as asked for."""

    @property
    def entries(self) -> int: ...

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Each block with its first index. It may be overwritten afterwards."""
        ...

    def sample(self, step: int) -> np.ndarray:
        """Every ``step``-th entry, as an array of its own."""
        ...


SAMPLE = 1 << 16
FEW = 6
SIGMAS = 4.0


@dataclass(frozen=True)
class Cut:
    """The place of a rank: entries of magnitude ``value``, the first ``position`` indices on one side."""

    value: int
    position: int


@dataclass
class _Search:
    """One order statistic, the ``rank``-th largest (from 1), between ``low`` and ``high``."""

    rank: int
    low: int
    high: int
    above: int = 0
    counts: list[int] = field(default_factory=list)
    inside: list[np.ndarray] = field(default_factory=list)

    @property
    def few(self) -> bool:
        return self.high - self.low < FEW

    def feed(self, bits: np.ndarray) -> None:
        """Count what is above ``high`` and what is inside."""
        if self.few:
            reached = [int(np.count_nonzero(bits >= v)) for v in range(self.low, self.high + 2)]
            self.above += reached[-1]
            inside = [reached[i] - reached[i + 1] for i in range(len(reached) - 1)]
            old = self.counts or [0] * len(inside)
            self.counts = [a + b for a, b in zip(old, inside, strict=True)]
            return
        over = bits > self.high
        self.above += int(np.count_nonzero(over))
        self.inside.append(bits[(bits >= self.low) ^ over])

    def found(self) -> tuple[int, int, int] | None:
        """The value, how many are larger and how many equal it; ``None`` if it escaped the bracket."""
        left = self.rank - self.above
        if left < 1:
            return None
        if self.few:
            above = self.above
            for v in range(self.high, self.low - 1, -1):
                count = self.counts[v - self.low]
                if above + count >= self.rank:
                    return v, above, count
                above += count
            return None
        held = np.concatenate(self.inside) if self.inside else np.empty(0, np.int16)
        if left > held.size:
            return None
        value = int(np.partition(held, held.size - left)[held.size - left])
        return value, self.above + int((held > value).sum()), int((held == value).sum())


def largest(of: Magnitudes, ranks: Sequence[int]) -> list[tuple[int, int, int]]:
    """For each rank (1 is the largest) its magnitude bits, how many are larger and how many are equal."""
    sample = of.sample(max(1, of.entries // SAMPLE) | 1)
    sample.sort()
    searches = [_bracketed(sample, of.entries, rank) for rank in ranks]
    for _, bits in of.blocks():
        for search in searches:
            search.feed(bits)
    found = [search.found() for search in searches]
    if None not in found:
        return [value for value in found if value is not None]
    whole = np.concatenate([bits.copy() for _, bits in of.blocks()])  # rare: a bracket missed
    values = [int(np.partition(whole, of.entries - rank)[of.entries - rank]) for rank in ranks]
    return [(v, int((whole > v).sum()), int((whole == v).sum())) for v in values]


def keep_largest(of: Magnitudes, count: int) -> Cut:
    """Keep exactly ``count``: what is larger than ``value``, and equal ones at indices below ``position``."""
    ((value, above, equal),) = largest(of, [count])
    return Cut(value, _after(of, value, count - above, equal))


def keep_band(of: Magnitudes, start: int, stop: int) -> tuple[Cut, Cut]:
    """Keep the places ``start`` to ``stop - 1`` of an ascending stable sort.

    Of the first cut's equal ones those with an index from ``position`` on stay, of the second's those below.
    """
    low, high = largest(of, [of.entries - start, of.entries - stop + 1])
    return (
        Cut(low[0], _after(of, low[0], start - (of.entries - low[1] - low[2]), low[2])),
        Cut(high[0], _after(of, high[0], stop - (of.entries - high[1] - high[2]), high[2])),
    )


def _after(of: Magnitudes, value: int, count: int, equal: int) -> int:
    """The index after the first ``count`` entries that equal ``value``."""
    if count <= 0:
        return 0
    if count >= equal:
        return of.entries
    for start, bits in of.blocks():
        same = bits == value
        here = int(np.count_nonzero(same))
        if here >= count:
            return start + int(np.flatnonzero(same)[count - 1]) + 1
        count -= here
    return of.entries


def _bracketed(sample: np.ndarray, entries: int, rank: int) -> _Search:
    share = rank / entries
    margin = SIGMAS * float(np.sqrt(max(share * (1.0 - share), 1.0 / sample.size) / sample.size))
    low = int((1.0 - share - margin) * sample.size) - 1
    high = int((1.0 - share + margin) * sample.size) + 1
    least = int(sample[low]) if low >= 0 else 0
    most = int(sample[high]) if high < sample.size else int(np.iinfo(sample.dtype).max) - 1
    return _Search(rank, least, most)
