"""Sparsifiers of the entry-wise family: keep the largest entries, or drop entries at random."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from merging.entrywise import Apply
from merging.kernels import Context, row_blocks
from merging.rules import kept_count, task_generator, trim
from merging.selection import batched_kth_largest, kth_largest
from merging.spaces import Placement
from merging.updates import UpdateStack

BINS = 1 << 19


class _WithDensity(Protocol):
    density: float
    compat: str | None


def _densities(stack: UpdateStack, ctx: Context) -> list[float]:
    return [cast(_WithDensity, params).density for params in ctx.of(stack)]


@dataclass(frozen=True)
class Magnitude:
    """Keep the fraction ``density`` of entries with the largest magnitude.

    Per tensor, or over the whole model (``trim_scope: global``): then two survey passes find the exact
    threshold of each task, a histogram of the float32 bits and the values of the bin that holds it.
    """

    def surveys(self, ctx: Context) -> int:
        return 2 if getattr(ctx.params, "trim_scope", "tensor") == "global" else 0

    def survey(self, index: int, place: Placement, stack: UpdateStack, ctx: Context) -> Any:
        magnitudes = ((task, place.coordinates.task(t).abs().flatten()) for t, task in enumerate(stack.tasks))
        if index == 0:
            entries = int(place.entries.sum())
            return [(task, entries, torch.bincount(_bin(x), minlength=BINS)) for task, x in magnitudes]
        chosen: dict[int, tuple[int, int]] = ctx.shared
        return [(task, x[_bin(x) == chosen[task][0]]) for task, x in magnitudes if chosen[task][1] > 0]

    def reduce(self, index: int, partials: Sequence[Any], ctx: Context) -> Any:
        if index == 0:
            return self._choose_bins(partials, ctx)
        values: dict[int, list[Tensor]] = {}
        for part in partials:
            for task, inside in part:
                values.setdefault(task, []).append(inside)
        return {
            task: kth_largest(torch.cat(values[task]), k) if k > 0 else None
            for task, (_, k) in ctx.shared.items()
        }

    def _choose_bins(self, partials: Sequence[Any], ctx: Context) -> dict[int, tuple[int, int]]:
        totals: dict[int, int] = {}
        counts: dict[int, Tensor] = {}
        for part in partials:
            for task, entries, histogram in part:
                totals[task] = totals.get(task, 0) + entries
                counts[task] = counts[task] + histogram if task in counts else histogram
        chosen: dict[int, tuple[int, int]] = {}
        for task in sorted(totals):
            params = cast(_WithDensity, ctx.per_model[task])
            if params.density >= 1.0:
                chosen[task] = (0, 0)
                continue
            k = kept_count(totals[task], params.density, inclusive=params.compat == "paper")
            from_top = counts[task].flip(0).cumsum(0)
            position = int((from_top >= k).long().argmax())
            above = int(from_top[position - 1]) if position else 0
            chosen[task] = (BINS - 1 - position, k - above)
        return chosen

    def prepare(self, place: Placement, stack: UpdateStack, ctx: Context) -> Apply:
        thresholds = self._thresholds(place, stack, ctx)
        if not getattr(ctx.params, "rescale", False):
            return lambda x, start: trim(x, thresholds)
        return _l1_matched(place, stack, ctx, lambda x, start: trim(x, thresholds))

    def _thresholds(self, place: Placement, stack: UpdateStack, ctx: Context) -> Tensor:
        """``(G, T, 1, 1)``."""
        like = place.coordinates.like
        shared = getattr(ctx.shared, "inner", ctx.shared)
        if self.surveys(ctx):
            found = [shared[task] for task in stack.tasks]
            flat = torch.stack([like.new_zeros(()) if value is None else value.to(like) for value in found])
            return flat.view(1, -1, 1, 1)
        columns = []
        for t, density in enumerate(_densities(stack, ctx)):
            if density >= 1.0:
                columns.append(like.new_zeros(stack.G))
                continue
            inclusive = getattr(ctx.params, "compat", None) == "paper"
            counts = [kept_count(int(n), density, inclusive=inclusive) if n else 1 for n in place.entries]
            magnitudes = place.coordinates.task(t).abs().flatten(1)
            if like.device.type == "cpu":
                found_t = [kth_largest(row, k) for row, k in zip(magnitudes, counts, strict=True)]
                columns.append(torch.stack(found_t))
            else:
                k = torch.tensor(counts, device=like.device).unsqueeze(-1)
                columns.append(batched_kth_largest(magnitudes.unsqueeze(1), k).squeeze(1))
        return torch.stack(columns, dim=1).view(stack.G, -1, 1, 1)


@dataclass(frozen=True)
class Random:
    """DARE: keep each entry with probability ``density`` and rescale the kept ones.

    Masks come from a stream keyed by (seed, input digest, module), drawn on the CPU, so that they do not
    depend on order, block size, device or worker.
    """

    def surveys(self, ctx: Context) -> int:
        return 0

    def survey(self, index: int, place: Placement, stack: UpdateStack, ctx: Context) -> Any:
        raise RuntimeError("this sparsifier takes no surveys")

    def reduce(self, index: int, partials: Sequence[Any], ctx: Context) -> Any:
        raise RuntimeError("this sparsifier takes no surveys")

    def prepare(self, place: Placement, stack: UpdateStack, ctx: Context) -> Apply:
        masks = MaskStream(stack, ctx, place.coordinates.n)

        def drop(x: Tensor, start: int) -> Tensor:
            return torch.where(masks.take(x), x, x.new_zeros(()))

        if not getattr(ctx.params, "rescale", True):
            return drop
        if getattr(ctx.params, "compat", None) == "mergekit":
            fresh = MaskStream(stack, ctx, place.coordinates.n)
            return _l1_matched(
                place, stack, ctx, drop, lambda x, start: torch.where(fresh.take(x), x, x.new_zeros(()))
            )
        inverse = torch.tensor([1.0 / density for density in _densities(stack, ctx)])
        factor = inverse.to(place.coordinates.like).view(-1, 1, 1)
        return lambda x, start: drop(x, start) * factor


class MaskStream:
    """Bernoulli keep-masks of a batch, handed out in row order."""

    def __init__(self, stack: UpdateStack, ctx: Context, cols: int) -> None:
        self._cols = cols
        self._densities = _densities(stack, ctx)
        self._generators = [
            [task_generator(ctx.seed, ctx.digests[task], name) for task in stack.tasks]
            for name in stack.names
        ]

    def take(self, like: Tensor) -> Tensor:
        """The masks of the next ``like.shape[-2]`` rows, ``(G, T, rows, cols)``."""
        rows = like.shape[-2]
        masks = torch.stack([torch.stack(list(self._task_masks(row, rows))) for row in self._generators])
        return masks.to(like.device)

    def _task_masks(self, generators: list[torch.Generator], rows: int) -> Iterator[Tensor]:
        for generator, density in zip(generators, self._densities, strict=True):
            yield torch.rand(rows, self._cols, generator=generator) < density


def _l1_matched(
    place: Placement, stack: UpdateStack, ctx: Context, apply: Apply, probe: Apply | None = None
) -> Apply:
    """``apply``, then multiply each task so that its L1 norm is what it was (mergekit's rescale)."""
    probe = probe or apply
    like = place.coordinates.like
    before = like.new_zeros((stack.G, stack.T))
    after = like.new_zeros((stack.G, stack.T))
    for start, stop in row_blocks(place.coordinates, ctx.budget):
        x = place.coordinates.rows(start, stop)
        before += x.abs().sum((-2, -1))
        after += probe(x, start).abs().sum((-2, -1))
    tiny = (before < 1e-7) | (after < 1e-7)
    factor = torch.where(tiny, torch.ones_like(before), before / after.clamp_min(1e-30))
    factor = factor.view(stack.G, stack.T, 1, 1)
    return lambda x, start: apply(x, start) * factor


def _bin(magnitudes: Tensor) -> Tensor:
    """The leading 19 bits below the sign of each magnitude as float32; monotone in the magnitude."""
    return (magnitudes.float().view(torch.int32) >> 12).clamp_max(BINS - 1)
