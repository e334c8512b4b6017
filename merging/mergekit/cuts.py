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

    def block(self, start: int) -> np.ndarray:
        """The block that begins there."""
        ...

    def sample(self, size: int) -> np.ndarray:
        """About so many entries from all over, in runs of neighbours ``(runs, length)``."""
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
    starts: list[int] = field(default_factory=list)
    counts: list[list[int]] = field(default_factory=list)
    inside: list[np.ndarray] = field(default_factory=list)

    @property
    def few(self) -> bool:
        """So few magnitudes are possible that each is counted, block by block."""
        return self.high - self.low < FEW

    def feed(self, start: int, bits: np.ndarray) -> None:
        """Count what is above ``high`` and what is inside."""
        if self.few:
            reached = [int(np.count_nonzero(bits >= v)) for v in range(self.low, self.high + 2)]
            self.above += reached[-1]
            self.starts.append(start)
            self.counts.append([reached[i] - reached[i + 1] for i in range(len(reached) - 1)])
            return
        over = bits > self.high
        self.above += int(np.count_nonzero(over))
        self.inside.append(bits[(bits >= self.low) ^ over])

    def found(self) -> Rank | None:
        """``None`` if it escaped the bracket."""
        left = self.rank - self.above
        if left < 1:
            return None
        if self.few:
            above = self.above
            for v in range(self.high, self.low - 1, -1):
                blocks = tuple(counts[v - self.low] for counts in self.counts)
                if above + sum(blocks) >= self.rank:
                    return Rank(v, above, sum(blocks), tuple(zip(self.starts, blocks, strict=True)))
                above += sum(blocks)
            return None
        held = np.concatenate(self.inside)
        if left > held.size:
            return None
        if held.itemsize == 2:
            reached = np.cumsum(np.bincount(held - self.low)[::-1])
            value = self.low + reached.size - 1 - int(np.argmax(reached >= left))
        else:
            value = int(np.partition(held, held.size - left)[held.size - left])
        return Rank(value, self.above + int((held > value).sum()), int((held == value).sum()))


@dataclass(frozen=True)
class Rank:
    """A magnitude, how many are larger, how many equal it; ``blocks`` says how many in which, if known."""

    value: int
    above: int
    equal: int
    blocks: tuple[tuple[int, int], ...] = ()


def largest(of: Sequence[Magnitudes], ranks: Sequence[Sequence[int]]) -> list[list[Rank]]:
    """For each of several magnitudes of one size the entries of these ranks (1 is the largest)."""
    searches = []
    for one, wanted in zip(of, ranks, strict=True):
        sample = one.sample(SAMPLE)
        order = np.sort(sample, axis=None, kind="stable")  # by radix where there are 16 bits
        searches.append([_bracketed(sample, order, one.entries, rank) for rank in wanted])
    for blocks in zip(*(one.blocks() for one in of), strict=True):
        for (start, bits), several in zip(blocks, searches, strict=True):
            for search in several:
                search.feed(start, bits)
    return [
        [search.found() or _counted(one, search.rank) for search in several]
        for one, several in zip(of, searches, strict=True)
    ]


def keep_largest(of: Sequence[Magnitudes], counts: Sequence[int]) -> list[Cut]:
    """Keep exactly so many: what is larger than ``value``, and equal ones at indices below ``position``."""
    found = largest(of, [[count] for count in counts])
    return [
        Cut(rank.value, _after(one, rank, count - rank.above))
        for one, count, (rank,) in zip(of, counts, found, strict=True)
    ]


def keep_band(of: Sequence[Magnitudes], ends: Sequence[tuple[int, int]]) -> list[tuple[Cut, Cut]]:
    """Keep the places ``start`` to ``stop - 1`` of an ascending stable sort, for each ``(start, stop)``.

    Of the first cut's equal ones those with an index from ``position`` on stay, of the second's those below.
    """
    ranks = [[one.entries - a, one.entries - b + 1] for one, (a, b) in zip(of, ends, strict=True)]
    cuts = []
    for one, places, found in zip(of, ends, largest(of, ranks), strict=True):
        below = [one.entries - rank.above - rank.equal for rank in found]
        low, high = (
            Cut(rank.value, _after(one, rank, place - less))
            for rank, place, less in zip(found, places, below, strict=True)
        )
        cuts.append((low, high))
    return cuts


def _after(of: Magnitudes, rank: Rank, count: int) -> int:
    """The index after the first ``count`` entries of that magnitude."""
    if count <= 0:
        return 0
    if count >= rank.equal:
        return of.entries
    for start, here in rank.blocks:
        if here >= count:
            return start + _nth(of.block(start), rank.value, count)
        count -= here
    for start, bits in of.blocks():
        here = int(np.count_nonzero(bits == rank.value))
        if here >= count:
            return start + _nth(bits, rank.value, count)
        count -= here
    return of.entries


def _nth(bits: np.ndarray, value: int, count: int) -> int:
    return int(np.flatnonzero(bits == value)[count - 1]) + 1


def _bracketed(sample: np.ndarray, order: np.ndarray, entries: int, rank: int) -> _Search:
    """The margin comes from how much the runs of the sample differ from each other."""
    share, size = rank / entries, order.size
    variance = max(share * (1.0 - share), 1.0 / size) / size
    if len(sample) > 1:
        guess = order[min(size - 1, int((1.0 - share) * size))]
        variance += float((sample >= guess).mean(axis=1).var()) / len(sample)
    margin = SIGMAS * variance**0.5
    low = int((1.0 - share - margin) * size) - 1
    high = int((1.0 - share + margin) * size) + 1
    least = int(order[low]) if low >= 0 else 0
    most = int(order[high]) if high < size else int(np.iinfo(order.dtype).max) - 1
    return _Search(rank, least, most)


def _counted(of: Magnitudes, rank: int) -> Rank:
    """The slow and sure way, for the rare case that a bracket missed: histograms of 16 bits at a time."""
    value, above, equal, shift = 0, 0, of.entries, 0
    for _, bits in of.blocks():
        shift = 8 * bits.itemsize
        break
    while shift:
        shift -= 16
        counts = np.zeros(1 << 16, np.int64)
        for _, bits in of.blocks():
            wide = bits.astype(np.int64)
            wide = wide[wide >> (shift + 16) == value]
            counts += np.bincount((wide >> shift) & 0xFFFF, minlength=1 << 16)
        reached = above + np.cumsum(counts[::-1])
        step = int(np.argmax(reached >= rank))
        equal = int(counts[::-1][step])
        above = int(reached[step]) - equal
        value = (value << 16) | (0xFFFF - step)
    return Rank(value, above, equal)
