"""The family of entry-wise methods: sparsify each task, then add, or elect signs and combine.

One kernel makes them all: a sparsifier (keep the largest, drop at random, ...) and a combination. It works
on the coordinates of any space in row blocks, so that full space never holds ``T`` dense deltas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from merging import rules, spaces
from merging.catalog.entrywise import SpaceParams, VotingParams
from merging.errors import InputError
from merging.kernels import Context, Merged, entry_blocks
from merging.lowrank import ThinSVD, thin_svd
from merging.sparsify import Sparsifier
from merging.spectral import isotropize
from merging.updates import Coordinates, UpdateStack

Combine = Callable[[Tensor], Tensor]
"""From the tasks' entries ``(G, T, rows, n)``, which it may use up, to merged ones ``(G, rows, n)``."""


@dataclass(frozen=True)
class Majority:
    """What the sparsifier's surveys found, and the majority sign of the whole model (TIES authors' code)."""

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
        place = placed(stack, ctx)
        if index < self.sparsifier.surveys(ctx):
            return self.sparsifier.survey(index, place, stack, ctx)
        return float(self._sign_total(place, stack, ctx).sum())

    def reduce(self, index: int, partials: Sequence[Any], ctx: Context) -> Any:
        if index < self.sparsifier.surveys(ctx):
            return self.sparsifier.reduce(index, partials, ctx)
        total = sum(partials)
        return Majority(ctx.shared, float((total > 0) - (total < 0)))

    def merge(self, stack: UpdateStack, ctx: Context) -> Merged:
        place = placed(stack, ctx)
        majority = ctx.shared.sign if isinstance(ctx.shared, Majority) else None
        if majority is not None:
            ctx = replace(ctx, shared=ctx.shared.inner)
        combine = self._combination(place, stack, ctx, majority)
        apply = self.sparsifier.prepare(place, stack, ctx)
        merged = in_blocks(place.coordinates, ctx, lambda x, start: combine(apply(x, start)))
        return finished(place, merged, ctx)

    def _combination(
        self, place: spaces.Placement, stack: UpdateStack, ctx: Context, majority: float | None
    ) -> Combine:
        weights = ctx.weights(stack).to(place.coordinates.like).view(-1, 1, 1)
        weighted = weighting(ctx, stack, place.coordinates.like)
        if not self.election:
            return lambda y: weighted(y).sum(-3)
        params = ctx.params
        assert isinstance(params, VotingParams)
        method, agg = params.majority_sign_method, params.agg
        compat = getattr(params, "compat", None)
        if compat == "peft":  # votes are unweighted, the divisor counts tasks
            return lambda y: _peft(y, rules.elect(y, method, 1.0), weights)
        zero: Tensor | float = 1.0
        if compat == "paper":
            zero = majority if majority is not None else self._majority(place, stack, ctx)
        divisor = weights if params.normalize else None

        def combine(y: Tensor) -> Tensor:
            y = weighted(y)
            return rules.disjoint_(y, rules.elect(y, method, zero), agg, divisor)

        return combine

    def _majority(self, place: spaces.Placement, stack: UpdateStack, ctx: Context) -> Tensor:
        return self._sign_total(place, stack, ctx).sign().view(-1, 1, 1, 1)

    def _sign_total(self, place: spaces.Placement, stack: UpdateStack, ctx: Context) -> Tensor:
        """The sum of the elected signs of each module, ``(G,)``."""
        params = ctx.params
        assert isinstance(params, VotingParams)
        weighted = weighting(ctx, stack, place.coordinates.like)
        apply = self.sparsifier.prepare(place, stack, ctx)
        total = torch.zeros(stack.G, dtype=torch.float64, device=place.coordinates.like.device)
        for x, start in entry_blocks(place.coordinates, ctx.budget):
            sign = rules.elect(weighted(apply(x, start)), params.majority_sign_method, 0.0)
            total += sign.sum((-3, -2, -1))
        return total

    def _global_majority(self, ctx: Context) -> bool:
        params = ctx.params
        return (
            self.election
            and getattr(params, "compat", None) == "paper"
            and getattr(params, "trim_scope", "tensor") == "global"
        )


def placed(stack: UpdateStack, ctx: Context) -> spaces.Placement:
    """The stack in the coordinates of the recipe's space. Raises ``isotropize_in_full_space``."""
    assert isinstance(ctx.params, SpaceParams)
    if ctx.params.isotropize and ctx.space == "full":
        raise InputError(
            "isotropize_in_full_space",
            "isotropize needs the small coordinates of `space: core` or `space: knots`",
            remedy="Set `space: core`, or use `iso_c` for the isotropic merge of the sum.",
            where={"field": "parameters.isotropize"},
        )
    return spaces.place(stack, ctx.space or "full", gauge=ctx.params.core_gauge)


def in_blocks(coordinates: Coordinates, ctx: Context, merge: Callable[[Tensor, int], Tensor]) -> Tensor:
    """The merged coordinates ``(G, m, n)``, block by block."""
    merged = coordinates.like.new_empty((coordinates.G, coordinates.m, coordinates.n))
    for x, start in entry_blocks(coordinates, ctx.budget):
        merged[:, start : start + x.shape[-2]] = merge(x, start)
    return merged


def finished(place: spaces.Placement, merged: Tensor, ctx: Context) -> Merged:
    """Merged coordinates as an update, made isotropic if the recipe asks for it."""
    lifted = place.lift(merged)
    if not getattr(ctx.params, "isotropize", False):
        return Merged(lifted)
    svd = lifted if isinstance(lifted, ThinSVD) else thin_svd(lifted)
    return Merged(isotropize(svd))


def weighting(ctx: Context, stack: UpdateStack, like: Tensor) -> Callable[[Tensor], Tensor]:
    """Multiplies the tasks' entries by their weights in place."""
    weights = ctx.weights(stack)
    if bool((weights == 1.0).all()):
        return lambda y: y
    factors = weights.to(like).view(-1, 1, 1)
    return lambda y: y.mul_(factors)


def _peft(y: Tensor, sign: Tensor, weights: Tensor) -> Tensor:
    kept = rules.agreeing_(y, sign)
    count = kept.sign().sum(-3).clamp_min_(1.0)
    return kept.mul_(weights).sum(-3).mul_(sign.squeeze(-3)).div_(count)
