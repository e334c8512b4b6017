"""Exact magnitude thresholds over all modules of a model, in three passes of little memory.

Pass 0 samples every module; the sample brackets each task's threshold. Pass 1 counts what lies above the
bracket and cuts the inside into fine bins. Pass 2 collects the entries of the bin that holds the threshold.
What a pass hands on is small whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merging.kernels import Context, entry_blocks
from merging.selection import kth_largest, split
from merging.spaces import Placement
from merging.thresholds import TINY, bracket, sampled
from merging.updates import UpdateStack

SURVEYS = 3
GRID = 64
"""Rows and columns that each module adds to the sample."""

BINS = 1 << 12


@dataclass(frozen=True)
class Quest:
    """The search for the ``rank``-th largest magnitude of a task, between ``low`` and ``high``.

    After pass 1 only the entries of ``bin`` matter and ``rank`` counts within it; bin -1 holds what is
    smaller than ``low``, bin ``BINS + 1`` what is larger than ``high``.
    """

    rank: int
    low: float
    high: float
    bin: int | None = None

    def bins(self, magnitudes: np.ndarray) -> np.ndarray:
        """The bin of each magnitude of ``[low, high]``, 0 to ``BINS``."""
        span = self.high - self.low
        scale = BINS / span if span > 0 else 0.0
        return ((magnitudes.astype(np.float64) - self.low) * scale).astype(np.int64).clip(0, BINS)


def survey(index: int, place: Placement, stack: UpdateStack, ctx: Context) -> list[Any]:
    """What pass ``index`` learns from one batch."""
    if index == 0:
        sample = sampled(place.coordinates, GRID)
        return [
            (task, entries, sample[g, t])
            for g, entries in enumerate(place.entries.tolist())
            for t, task in enumerate(stack.tasks)
        ]
    return _counted(place, stack, ctx) if index == 1 else _collected(place, stack, ctx)


def reduce(
    index: int, partials: Sequence[list[Any]], ctx: Context, kept: Callable[[int, int], int]
) -> dict[int, Any]:
    """The next ``ctx.shared`` by task; ``kept(task, entries)`` is how many stay, 0 for all of them."""
    if index == 0:
        return dict(_bracketed(partials, kept))
    found: dict[int, Any] = {task: None for task, quest in ctx.shared.items() if quest is None}
    for task, quest in ctx.shared.items():
        if quest is not None:
            parts = [entry[1:] for partial in partials for entry in partial if entry[0] == task]
            found[task] = _chosen(quest, parts) if index == 1 else _value(quest, parts)
    return found


def limits(ctx: Context, tasks: Sequence[int], like: Tensor) -> Tensor:
    """The thresholds of the tasks after all passes, ``(1, T)``; 0 keeps everything."""
    return like.new_tensor([[ctx.shared[task] or 0.0 for task in tasks]])


def _bracketed(
    partials: Sequence[list[Any]], kept: Callable[[int, int], int]
) -> Iterator[tuple[int, Quest | None]]:
    for task in sorted({entry[0] for partial in partials for entry in partial}):
        parts = [entry for partial in partials for entry in partial if entry[0] == task and entry[1]]
        total = sum(entries for _, entries, _ in parts)
        rank = kept(task, total) if total else 0
        if rank == 0:
            yield task, None
            continue
        shares = [entries / total for _, entries, _ in parts]
        samples = [sample for _, _, sample in parts]
        low, high = bracket(samples, shares, rank / total, sigmas=6.0)
        # A finite end keeps the bins fine; what lies beyond it is rare and counted apart.
        yield task, Quest(rank, low, min(high, 4.0 * max(float(sample.max()) for sample in samples)))


def _magnitudes(
    place: Placement, stack: UpdateStack, ctx: Context
) -> Iterator[tuple[int, Quest, int, np.ndarray]]:
    """Every block of every task that is searched: ``(task, quest, above, inside)``."""
    for block, _ in entry_blocks(place.coordinates, ctx.budget):
        block.abs_()
        for t, task in enumerate(stack.tasks):
            quest: Quest | None = ctx.shared[task]
            if quest is None:
                continue
            if quest.bin == BINS + 1:
                low, high = quest.high, float("inf")
            elif quest.bin == -1:
                low, high = 0.0, quest.low
            else:
                low, high = quest.low, quest.high
            above, inside = _split(block[:, t], low, high)
            yield task, quest, above, inside


def _split(magnitudes: Tensor, low: float, high: float) -> tuple[int, np.ndarray]:
    low = max(low, TINY)
    if magnitudes.device.type == "cpu":
        return split(magnitudes.numpy(), low, high)
    inside = magnitudes[(magnitudes >= low) & (magnitudes <= high)]
    return int((magnitudes > high).sum()), inside.cpu().numpy()


def _counted(place: Placement, stack: UpdateStack, ctx: Context) -> list[Any]:
    above = dict.fromkeys(stack.tasks, 0)
    bins = {task: np.zeros(BINS + 1, dtype=np.int64) for task in stack.tasks}
    for task, quest, over, inside in _magnitudes(place, stack, ctx):
        above[task] += over
        bins[task] += np.bincount(quest.bins(inside), minlength=BINS + 1)
    return [(task, above[task], bins[task]) for task in stack.tasks]


def _collected(place: Placement, stack: UpdateStack, ctx: Context) -> list[Any]:
    values: dict[int, list[np.ndarray]] = {task: [] for task in stack.tasks}
    for task, quest, _, inside in _magnitudes(place, stack, ctx):
        if quest.bin == BINS + 1:
            chosen = inside > quest.high
        elif quest.bin == -1:
            chosen = inside < quest.low
        else:
            chosen = quest.bins(inside) == quest.bin
        values[task].append(inside[chosen])
    return [(task, np.concatenate(found)) for task, found in values.items() if found]


def _chosen(quest: Quest, parts: list[Any]) -> Quest:
    above = sum(part[0] for part in parts)
    from_top = np.cumsum(np.sum([part[1] for part in parts], axis=0)[::-1])
    if quest.rank <= above:
        return replace(quest, bin=BINS + 1)
    rank = quest.rank - above
    position = int(np.searchsorted(from_top, rank))
    if position > BINS:
        return replace(quest, bin=-1, rank=rank - int(from_top[-1]))
    before = int(from_top[position - 1]) if position else 0
    return replace(quest, bin=BINS - position, rank=rank - before)


def _value(quest: Quest, parts: list[Any]) -> float:
    values = np.concatenate([part[0] for part in parts])
    if quest.rank > values.size:  # only exact zeros are left, and those are not collected
        return 0.0
    return float(kth_largest(torch.from_numpy(values.astype(np.float64)), quest.rank))
