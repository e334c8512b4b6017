"""The family of entry-wise methods: sparsify each task, then add, or elect signs and combine.

One kernel makes them all: a sparsifier (keep the largest, drop at random, ...) and a combination. It works
on the coordinates of any space in row blocks, so that full space never holds ``T`` dense deltas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from merging import rules, spaces
from merging.catalog.entrywise import ElectionParams, EntrywiseParams
from merging.errors import InputError
from merging.kernels import Context, Merged, row_blocks
from merging.lowrank import thin_svd
from merging.spectral import isotropize
from merging.updates import LowRank, UpdateStack

Apply = Callable[[Tensor, int], Tensor]
"""Maps the rows ``(G, T, rows, n)`` starting at a row to their sparsified form; called in row order."""


class Sparsifier(Protocol):
    """Prepares the sparsification of one batch and reports what it needs from the whole model."""

    def surveys(self, ctx: Context) -> int: ...

    def survey(self, index: int, place: spaces.Placement, stack: UpdateStack, ctx: Context) -> Any: ...

    def reduce(self, index: int, partials: Sequence[Any], ctx: Context) -> Any: ...

    def prepare(self, place: spaces.Placement, stack: UpdateStack, ctx: Context) -> Apply: ...


@dataclass(frozen=True)
class Majority:
    """``shared`` plus the majority sign of the whole model (TIES reference code, global scope)."""

    inner: Any
    sign: float


@dataclass(frozen=True)
class Entrywise:
    """An entry-wise method. Source and formula stand in the method's own file."""

    sparsifier: Sparsifier
    election: bool

    def surveys(self, ctx: Context) -> int:
        return self.sparsifier.surveys(ctx) + int(self._global_majority(ctx))

    def survey(self, index: int, stack: UpdateStack, ctx: Context) -> Any:
        place = self._place(stack, ctx)
        if index < self.sparsifier.surveys(ctx):
            return self.sparsifier.survey(index, place, stack, ctx)
        return self._sign_total(place, stack, ctx, self.sparsifier.prepare(place, stack, ctx)).sum()

    def reduce(self, index: int, partials: Sequence[Any], ctx: Context) -> Any:
        if index < self.sparsifier.surveys(ctx):
            return self.sparsifier.reduce(index, partials, ctx)
        total = sum(float(part) for part in partials)
        return Majority(ctx.shared, float((total > 0) - (total < 0)))

    def merge(self, stack: UpdateStack, ctx: Context) -> Merged:
        place = self._place(stack, ctx)
        combine = self._combination(place, stack, ctx)
        apply = self.sparsifier.prepare(place, stack, _unwrapped(ctx))
        coordinates = place.coordinates
        blocks = row_blocks(coordinates, ctx.budget)
        if len(blocks) == 1:
            merged = combine(apply(coordinates.rows(0, coordinates.m), 0))
        else:
            merged = coordinates.like.new_empty((stack.G, coordinates.m, coordinates.n))
            for start, stop in blocks:
                merged[:, start:stop] = combine(apply(coordinates.rows(start, stop), start))
        if getattr(ctx.params, "isotropize", False):
            return Merged(self._isotropized(place, merged))
        return Merged(place.lift(merged))

    def _place(self, stack: UpdateStack, ctx: Context) -> spaces.Placement:
        assert isinstance(ctx.params, (EntrywiseParams, ElectionParams))
        if ctx.params.isotropize and ctx.space == "full":
            raise InputError(
                "isotropize_in_full_space",
                "isotropize needs the small coordinates of `space: core` or `space: knots`",
                remedy="Set `space: core`, or use `iso_c` for the isotropic merge of the sum.",
                where={"field": "parameters.isotropize"},
            )
        return spaces.place(stack, ctx.space or "full", gauge=ctx.params.core_gauge)

    def _isotropized(self, place: spaces.Placement, merged: Tensor) -> Any:
        assert place.left is not None
        if place.right is None:
            svd = isotropize(thin_svd(LowRank(place.left, merged.to(place.left.dtype))))
        else:
            lifted = place.lift(merged)
            assert not isinstance(lifted, LowRank)
            svd = isotropize(lifted)
        return svd

    def _combination(
        self, place: spaces.Placement, stack: UpdateStack, ctx: Context
    ) -> Callable[[Tensor], Tensor]:
        like = place.coordinates.like
        weights = ctx.weights(stack).to(like).view(-1, 1, 1)
        if not self.election:
            return lambda y: (y * weights).sum(-3)
        params = ctx.params
        assert isinstance(params, ElectionParams)
        if params.compat == "peft":  # votes are unweighted, the divisor counts tasks
            return lambda y: self._peft(y, weights, params)
        zero = self._zero_sign(place, stack, ctx)
        divisor = weights if params.normalize else None

        def combine(y: Tensor) -> Tensor:
            y = y * weights
            return rules.disjoint(y, rules.elect(y, params.majority_sign_method, zero), params.agg, divisor)

        return combine

    def _peft(self, y: Tensor, weights: Tensor, params: ElectionParams) -> Tensor:
        sign = rules.elect(y, params.majority_sign_method, 1.0)
        keep = rules.agreeing(y, sign)
        return (torch.where(keep, y, y.new_zeros(())) * weights).sum(-3) / keep.sum(-3).clamp_min(1)

    def _zero_sign(self, place: spaces.Placement, stack: UpdateStack, ctx: Context) -> Tensor | float:
        if ctx.params.compat != "paper":  # type: ignore[attr-defined]
            return 1.0
        if isinstance(ctx.shared, Majority):
            return ctx.shared.sign
        apply = self.sparsifier.prepare(place, stack, ctx)
        return self._sign_total(place, stack, ctx, apply).sign().view(-1, 1, 1, 1)

    def _sign_total(self, place: spaces.Placement, stack: UpdateStack, ctx: Context, apply: Apply) -> Tensor:
        """The sum of the elected signs of each module, ``(G,)``."""
        like = place.coordinates.like
        weights = ctx.weights(stack).to(like).view(-1, 1, 1)
        total = like.new_zeros(stack.G)
        for start, stop in row_blocks(place.coordinates, ctx.budget):
            y = apply(place.coordinates.rows(start, stop), start) * weights
            sign = rules.elect(y, ctx.params.majority_sign_method, 0.0)  # type: ignore[attr-defined]
            total += sign.sum((-3, -2, -1))
        return total

    def _global_majority(self, ctx: Context) -> bool:
        params = ctx.params
        return (
            self.election
            and getattr(params, "compat", None) == "paper"
            and getattr(params, "trim_scope", "tensor") == "global"
        )


def _unwrapped(ctx: Context) -> Context:
    if not isinstance(ctx.shared, Majority):
        return ctx
    from dataclasses import replace

    return replace(ctx, shared=ctx.shared.inner)
