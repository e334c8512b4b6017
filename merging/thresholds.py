"""Exact magnitude thresholds of tasks that are never held as a whole.

A sample of the entries brackets each order statistic, a pass over row blocks counts what lies above the
bracket and collects what lies inside, and only that is ordered. The sample decides the cost, never the
result: a statistic that escapes its bracket is found the slow way.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from merging.kernels import entry_blocks, row_blocks
from merging.selection import batched_kth_largest, kth_largest, split
from merging.updates import Coordinates

GRID = 512
"""Rows and columns of the sample of one tensor."""

TINY = float(np.finfo(np.float32).tiny)
"""Magnitudes below this count as zeros."""

Ranks = Sequence[Sequence[Sequence[int]]]
"""``ranks[j][g][t]``: the 1-based rank from the top of statistic ``j``; 0 asks for nothing."""


def thresholds(coordinates: Coordinates, ranks: Ranks, budget: int) -> Tensor:
    """The magnitudes of the given ranks, ``(J, G, T)`` in the dtype of the coordinates; 0 where rank is 0.

    The entries are taken from ``row_blocks(coordinates, budget)``. Memory: one block, and on a CPU the
    entries inside the brackets (some percent), elsewhere one task at a time.
    """
    if coordinates.like.device.type != "cpu":
        return _by_task(coordinates, ranks, budget)
    found = coordinates.like.new_zeros((len(ranks), coordinates.G, coordinates.T))
    blocks = row_blocks(coordinates, budget)
    single = coordinates.rows(0, coordinates.m).abs_().flatten(2) if len(blocks) == 1 else None
    searches = _bracketed(coordinates, ranks, budget) if single is None else {}
    for t in range(coordinates.T):
        whole = None if single is None else single[:, t]
        for j, g in itertools.product(range(len(ranks)), range(coordinates.G)):
            rank = ranks[j][g][t]
            if rank == 0:
                continue
            value = searches[j, g, t].value(rank) if searches else None
            if value is None:
                whole = _magnitudes(coordinates, t, budget) if whole is None else whole
                value = kth_largest(whole[g], rank)
            found[j, g, t] = value
    return found


@dataclass
class Search:
    """One order statistic between ``low`` and ``high``, fed block by block."""

    low: float
    high: float
    above: int = 0
    inside: list[np.ndarray] = field(default_factory=list)

    def feed(self, magnitudes: np.ndarray) -> None:
        """Count and collect. Zeros are never collected."""
        above, inside = split(magnitudes, max(self.low, TINY), self.high)
        self.above += above
        self.inside.append(inside)

    def value(self, rank: int) -> Tensor | float | None:
        """The statistic of that rank; ``None`` if it escaped."""
        found = np.concatenate(self.inside)
        if self.above < rank <= self.above + found.size:
            return kth_largest(torch.from_numpy(found), rank - self.above)
        return 0.0 if rank > self.above and self.low == 0.0 else None


def _bracketed(coordinates: Coordinates, ranks: Ranks, budget: int) -> dict[tuple[int, int, int], Search]:
    entries = coordinates.m * coordinates.n
    sample = sampled(coordinates, GRID)
    searches = {}
    for j, g, t in itertools.product(range(len(ranks)), range(coordinates.G), range(coordinates.T)):
        if ranks[j][g][t]:
            low, high = bracket([sample[g, t]], [1.0], ranks[j][g][t] / entries, sigmas=3.5)
            searches[j, g, t] = Search(low, high)
    if not searches:
        return searches
    for block, _ in entry_blocks(coordinates, budget):
        magnitudes = block.abs_().numpy()
        for (_, g, t), search in searches.items():
            search.feed(magnitudes[g, t])
    return searches


def _by_task(coordinates: Coordinates, ranks: Ranks, budget: int) -> Tensor:
    columns = []
    for t in range(coordinates.T):
        magnitudes = _magnitudes(coordinates, t, budget).unsqueeze(1)
        wanted = [torch.tensor([[row[t]] for row in one], device=magnitudes.device) for one in ranks]
        found = torch.stack([batched_kth_largest(magnitudes, k).squeeze(1) for k in wanted])
        columns.append(torch.where(torch.stack(wanted).squeeze(-1) > 0, found, torch.zeros_like(found)))
    return torch.stack(columns, dim=-1)


def _magnitudes(coordinates: Coordinates, t: int, budget: int) -> Tensor:
    """The magnitudes of a whole task, ``(G, m * n)``, to the last bit as they come in row blocks."""
    whole = coordinates.like.new_empty((coordinates.G, coordinates.m, coordinates.n))
    for block, start in entry_blocks(coordinates, budget):
        whole[:, start : start + block.shape[-2]] = block[:, t]
    return whole.abs_().flatten(1)


def sampled(coordinates: Coordinates, size: int) -> np.ndarray:
    """Magnitudes of about ``size`` rows and columns spread over each task, ``(G, T, ., .)``."""
    # A sixteenth of a matrix tells enough about it.
    m, n = (max(1, length // min(size, max(64, length // 4))) for length in (coordinates.m, coordinates.n))
    steps = m, n
    return coordinates.grid(*steps).abs().cpu().numpy()


def bracket(
    samples: Sequence[np.ndarray], shares: Sequence[float], share: float, *, sigmas: float
) -> tuple[float, float]:
    """Magnitudes between which the largest ``share`` of the entries ends, but for rare cases.

    ``samples`` are 2-D, each stands for the fraction ``shares[i]`` of all entries. The rows of a sample
    differ from each other, so do the columns: the margin comes from how much they do.
    """
    flat, reached = _descending(samples, shares)
    guess = flat[min(int(np.searchsorted(reached, share)), flat.size - 1)]
    variance = 1.0 / flat.size
    for sample, part in zip(samples, shares, strict=True):
        over = sample >= guess
        variance += part**2 * sum(float(over.mean(axis).var()) / over.shape[1 - axis] for axis in (0, 1))
    margin = sigmas * variance**0.5
    first = int(np.searchsorted(reached, share - margin)) if share > margin else -1
    last = int(np.searchsorted(reached, share + margin)) + 1
    high = float(flat[first]) if first >= 0 else float("inf")
    low = float(flat[last]) if last < flat.size - 1 else 0.0
    return low, high


def _descending(samples: Sequence[np.ndarray], shares: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """All sampled magnitudes from the largest, and the share of all entries reached at each."""
    if len(samples) == 1:
        flat = np.sort(samples[0], axis=None)[::-1]
        return flat, np.arange(1, flat.size + 1) / flat.size
    flat = np.concatenate([sample.ravel() for sample in samples])
    weights = np.repeat([s / x.size for s, x in zip(shares, samples, strict=True)], [x.size for x in samples])
    order = np.argsort(flat)[::-1]
    return flat[order], np.cumsum(weights[order])
