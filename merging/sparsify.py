"""Sparsifiers of the entry-wise family: keep entries by magnitude, or drop entries at random."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from merging import modelwide
from merging.kernels import Context, entry_blocks
from merging.masks import MaskStream, limits
from merging.rules import Counting, band_, by_rank, kept_count, trim_
from merging.spaces import Placement
from merging.thresholds import thresholds
from merging.updates import UpdateStack

Apply = Callable[[Tensor, int], Tensor]
"""Sparsifies the rows ``(G, T, rows, n)`` that start at a row, in place; called once per row, in order."""


class Sparsifier:
    """Prepares the sparsification of one batch and says what it needs to know of the whole model."""

    def surveys(self, ctx: Context) -> int:
        return 0

    def survey(self, index: int, place: Placement, stack: UpdateStack, ctx: Context) -> Any:
        raise RuntimeError("this sparsifier takes no surveys")

    def reduce(self, index: int, partials: Sequence[Any], ctx: Context) -> Any:
        raise RuntimeError("this sparsifier takes no surveys")

    def prepare(self, place: Placement, stack: UpdateStack, ctx: Context) -> Apply:
        raise NotImplementedError


@dataclass(frozen=True)
class Magnitude(Sparsifier):
    """Keep the fraction ``density`` of the entries with the largest magnitude; equal ones stay.

    Per tensor, or over the whole model (``trim_scope: global``, three surveys). ``counting`` is how
    ``compat: paper`` counts the entries to keep.
    """

    counting: Counting

    def surveys(self, ctx: Context) -> int:
        return modelwide.SURVEYS if _param(ctx, "trim_scope") == "global" else 0

    def survey(self, index: int, place: Placement, stack: UpdateStack, ctx: Context) -> Any:
        return modelwide.survey(index, place, stack, ctx)

    def reduce(self, index: int, partials: Sequence[Any], ctx: Context) -> Any:
        def kept(task: int, entries: int) -> int:
            density = cast(Any, ctx.per_model[task]).density
            return 0 if density >= 1.0 else kept_count(entries, density, self._counting(ctx))

        return modelwide.reduce(index, partials, ctx, kept)

    def prepare(self, place: Placement, stack: UpdateStack, ctx: Context) -> Apply:
        limits = self._limits(place, stack, ctx)
        if limits is None:
            return lambda x, start: x
        chosen = limits.view(-1, stack.T, 1, 1)
        return _rescaled(place, stack, ctx, lambda x, start: trim_(x, chosen))

    def _limits(self, place: Placement, stack: UpdateStack, ctx: Context) -> Tensor | None:
        """The smallest magnitude that stays, ``(G, T)`` or ``(1, T)``; ``None`` where everything does."""
        if self.surveys(ctx):
            return modelwide.limits(ctx, stack.tasks, place.coordinates.like)
        densities = per_task(stack, ctx, "density")
        if min(densities) >= 1.0:
            return None
        counting = self._counting(ctx)
        ranks = [
            [0 if d >= 1.0 or not n else kept_count(n, d, counting) for d in densities]
            for n in place.entries.tolist()
        ]
        return thresholds(place.coordinates, [ranks], ctx.budget)[0]

    def _counting(self, ctx: Context) -> Counting:
        return self.counting if _param(ctx, "compat") == "paper" else "floor"


@dataclass(frozen=True)
class Band(Sparsifier):
    """Leave out the fraction ``gamma`` of the entries with the largest magnitude, then keep ``density``.

    Equal magnitudes at either end of the band stay, so a constant tensor stays whole. Per tensor, or per row
    (``trim_scope: row``).
    """

    def prepare(self, place: Placement, stack: UpdateStack, ctx: Context) -> Apply:
        shares = list(zip(per_task(stack, ctx, "density"), per_task(stack, ctx, "gamma"), strict=True))
        if _param(ctx, "trim_scope") == "row":
            widths = place.widths.tolist()
            rows = [[_band(n, d, g, spare_top=False) for d, g in shares] for n in widths]
            return _rescaled(place, stack, ctx, lambda x, start: _band_of_rows(x, rows))
        ends = [[_band(n, d, g, spare_top=True) for d, g in shares] for n in place.entries.tolist()]
        ranks = [[[end[side] for end in row] for row in ends] for side in (0, 1)]
        high, low = thresholds(place.coordinates, ranks, ctx.budget).unsqueeze(-1).unsqueeze(-1)
        return _rescaled(place, stack, ctx, lambda x, start: band_(x, low, high))


@dataclass(frozen=True)
class Random(Sparsifier):
    """DARE: keep each entry with probability ``density`` and rescale the kept ones."""

    def prepare(self, place: Placement, stack: UpdateStack, ctx: Context) -> Apply:
        densities = per_task(stack, ctx, "density")

        def dropping() -> Apply:
            masks = MaskStream(stack, ctx, place.widths.tolist())
            return lambda x, start: x.mul_(masks.keep(x, densities))

        if not _param(ctx, "rescale"):
            return dropping()
        if _param(ctx, "compat") == "mergekit":
            return l1_matched(place, stack, ctx, dropping)
        drop = dropping()
        factor = place.coordinates.like.new_tensor(densities).reciprocal().view(-1, 1, 1)
        return lambda x, start: drop(x, start).mul_(factor)


@dataclass(frozen=True)
class RankedRandom(Sparsifier):
    """DELLA: keep each entry with a probability that grows with its rank within the row.

    The probability runs evenly from ``density - epsilon`` for the smallest magnitude of a row to
    ``density + epsilon`` for the largest. Kept entries are divided by theirs.
    """

    def prepare(self, place: Placement, stack: UpdateStack, ctx: Context) -> Apply:
        like = place.coordinates.like
        density = like.new_tensor(per_task(stack, ctx, "density")).view(-1, 1, 1)
        epsilon = like.new_tensor(per_task(stack, ctx, "epsilon")).view(-1, 1, 1)
        widths = place.widths.to(like).view(-1, 1, 1, 1)
        n = place.coordinates.n
        inverse = _param(ctx, "rescale") and _param(ctx, "compat") != "mergekit"

        # Directions that only pad the frame of a module are zero and rank lowest: they do not count.
        rank = torch.arange(1, n + 1, dtype=like.dtype, device=like.device)
        rank = (rank - (n - widths + 1.0)).clamp_min_(0.0)
        middle = (widths - 1.0) / 2.0
        chances = ((rank - middle) / middle.clamp_min(0.5) * epsilon + density).clamp_min_(2.0**-32)
        tables = (limits(chances), chances) if inverse else (limits(chances),)

        def dropping() -> Apply:
            masks = MaskStream(stack, ctx, place.widths.tolist())

            def drop(x: Tensor, start: int) -> Tensor:
                limit, *chance = by_rank(x, *tables)
                x.mul_(masks.keep(x, limit))
                return x.div_(chance[0]) if inverse else x

            return drop

        if _param(ctx, "rescale") and not inverse:
            return l1_matched(place, stack, ctx, dropping)
        return dropping()


def _rescaled(place: Placement, stack: UpdateStack, ctx: Context, apply: Apply) -> Apply:
    return l1_matched(place, stack, ctx, lambda: apply) if _param(ctx, "rescale") else apply


def l1_matched(place: Placement, stack: UpdateStack, ctx: Context, make: Callable[[], Apply]) -> Apply:
    """Sparsify as ``make()`` does, then scale each task so that its L1 norm is what it was.

    mergekit leaves norms below 1e-7 alone; otherwise only a zero is left alone.
    """
    coordinates = place.coordinates
    probe = make()
    before = torch.zeros((stack.G, stack.T), dtype=torch.float64, device=coordinates.like.device)
    after = torch.zeros_like(before)
    for x, start in entry_blocks(coordinates, ctx.budget):
        before += x.abs().sum((-2, -1))
        after += probe(x, start).abs_().sum((-2, -1))
    floor = 1e-7 if _param(ctx, "compat") == "mergekit" else torch.finfo(torch.float64).tiny
    small = (before < floor) | (after < floor)
    factor = torch.where(small, torch.ones_like(before), before / after.clamp_min(floor))
    scale = factor.to(coordinates.like.dtype).view(stack.G, stack.T, 1, 1)
    apply = make()
    return lambda x, start: apply(x, start).mul_(scale)


def per_task(stack: UpdateStack, ctx: Context, name: str) -> list[float]:
    """A parameter of each model that is present in the stack."""
    return [float(getattr(params, name)) for params in ctx.of(stack)]


def _param(ctx: Context, name: str) -> Any:
    return getattr(ctx.params, name, None)


def _band(entries: int, density: float, gamma: float, *, spare_top: bool) -> tuple[int, int]:
    """Ranks from the top of the largest and the smallest entry that stay; zeros for an empty tensor.

    Where the two fractions exceed the whole, ``spare_top`` leaves out fewer of the largest, otherwise fewer
    entries are kept.
    """
    if entries == 0:
        return 0, 0
    kept, top = kept_count(entries, density), int(gamma * entries)
    if spare_top:
        top = min(top, entries - kept)
    return top + 1, min(entries, top + kept)


def _band_of_rows(x: Tensor, ranks: list[list[tuple[int, int]]]) -> Tensor:
    size = x.abs()
    if x.device.type == "cpu":
        size.numpy().sort(axis=-1)  # several times faster than torch here
    else:
        size = size.sort(dim=-1).values
    n = x.shape[-1]
    index = (n - torch.tensor(ranks, device=x.device)).clamp_(0, n - 1)
    index = index.unsqueeze(-2).expand(*x.shape[:-1], 2)
    high, low = torch.split(size.gather(-1, index), 1, dim=-1)
    return band_(x, low, high)
