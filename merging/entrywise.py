"""The family of entry-wise methods: sparsify each task, then add, or elect signs and combine.

One kernel makes them all: a sparsifier (keep the largest, drop at random, ...) and a combination. It works
on the coordinates of any space in row blocks, so that full space never holds ``T`` dense deltas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from merging import rules, spaces
from merging.catalog import isotropize_in_full_space
from merging.catalog.entrywise import SpaceParams, VotingParams
from merging.kernels import Context, Merged, entry_blocks
from merging.lowrank import ThinSVD, thin_svd
from merging.sparsify import Sparsifier
from merging.spectral import isotropize
from merging.updates import Coordinates, UpdateStack

Combine = Callable[[Tensor], Tensor]
"""From the tasks' entries ``(G, T, rows, n)``, which it may use up, to merged ones ``(G, rows, n)``."""


@dataclass(frozen=True)
class Whole:
    """What is known of the whole model: the sparsifier's findings and, where the TIES authors' code counts
    over all modules, the squared norm of each task after sparsification and the majority sign.
    """

    inner: Any
    squares: Tensor | None = None
    sign: float | None = None


@dataclass(frozen=True)
class Entrywise:
    """An entry-wise method. Source and formula stand in the method's own file."""

    sparsifier: Sparsifier
    election: bool

    def surveys(self, ctx: Context) -> int:
        return self.sparsifier.surveys(ctx) + int(self._global_squares(ctx)) + int(self._global_majority(ctx))

    def survey(self, index: int, stack: UpdateStack, ctx: Context) -> Any:
        place = placed(stack, ctx)
        if index < self.sparsifier.surveys(ctx):
            return self.sparsifier.survey(index, place, stack, ctx)
        if self._finds_squares(index, ctx):
            found = torch.zeros(len(ctx.per_model), dtype=torch.float64)
            found[list(stack.tasks)] = self._squares(place, stack, ctx).sum(0).cpu()
            return found
        ctx, whole = _opened(ctx)
        return float(self._sign_total(place, stack, ctx, whole).sum())

    def reduce(self, index: int, partials: Sequence[Any], ctx: Context) -> Any:
        if index < self.sparsifier.surveys(ctx):
            return self.sparsifier.reduce(index, partials, ctx)
        if self._finds_squares(index, ctx):
            return Whole(ctx.shared, squares=sum(partials))
        total = sum(partials)
        ctx, whole = _opened(ctx)
        return replace(whole, sign=float((total > 0) - (total < 0)))

    def merge(self, stack: UpdateStack, ctx: Context) -> Merged:
        place = placed(stack, ctx)
        ctx, whole = _opened(ctx)
        combine = self._combination(place, stack, ctx, whole)
        apply = self.sparsifier.prepare(place, stack, ctx)
        merged = in_blocks(place.coordinates, ctx, lambda x, start: combine(apply(x, start)))
        return finished(place, merged, ctx)

    def _combination(
        self, place: spaces.Placement, stack: UpdateStack, ctx: Context, whole: Whole
    ) -> Combine:
        weights = ctx.weights(stack).to(place.coordinates.like).view(-1, 1, 1)
        weighted = weighting(ctx, stack, place.coordinates.like)
        if not self.election:
            return lambda y: weighted(y).sum(-3)
        params = ctx.params
        assert isinstance(params, VotingParams)
        agg = params.agg
        compat = getattr(params, "compat", None)
        if compat == "peft":  # votes are unweighted, the divisor counts tasks
            return lambda y: _peft(y, elected(y, ctx, 1.0), weights)
        zero: Tensor | float = 1.0
        if compat == "paper":
            zero = whole.sign if whole.sign is not None else self._majority(place, stack, ctx, whole)
        divisor = weights if params.normalize else None
        squares = self._voting_squares(place, stack, ctx, whole)

        def combine(y: Tensor) -> Tensor:
            y = weighted(y)
            return rules.disjoint_(y, elected(y, ctx, zero, squares), agg, divisor)

        return combine

    def _majority(self, place: spaces.Placement, stack: UpdateStack, ctx: Context, whole: Whole) -> Tensor:
        return self._sign_total(place, stack, ctx, whole).sign().view(-1, 1, 1, 1)

    def _sign_total(self, place: spaces.Placement, stack: UpdateStack, ctx: Context, whole: Whole) -> Tensor:
        """The sum of the elected signs of each module, ``(G,)``."""
        squares = self._voting_squares(place, stack, ctx, whole)
        total = torch.zeros(stack.G, dtype=torch.float64, device=place.coordinates.like.device)
        for y in self._sparse(place, stack, ctx):
            total += elected(y, ctx, 0.0, squares).sum((-3, -2, -1))
        return total

    def _voting_squares(
        self, place: spaces.Placement, stack: UpdateStack, ctx: Context, whole: Whole
    ) -> Tensor | None:
        """The squared norms that shares are taken of, ``(G or 1, T, 1, 1)``; ``None`` if votes need none."""
        if not _by_share(ctx):
            return None
        if whole.squares is not None:
            return whole.squares[list(stack.tasks)].to(place.coordinates.like).view(1, -1, 1, 1)
        return self._squares(place, stack, ctx).view(stack.G, stack.T, 1, 1)

    def _squares(self, place: spaces.Placement, stack: UpdateStack, ctx: Context) -> Tensor:
        """The squared norm of each task after sparsification, ``(G, T)``."""
        like = place.coordinates.like
        total = torch.zeros((stack.G, stack.T), dtype=torch.float64, device=like.device)
        for y in self._sparse(place, stack, ctx):
            total += y.square().sum((-2, -1))
        return total

    def _sparse(self, place: spaces.Placement, stack: UpdateStack, ctx: Context) -> Iterator[Tensor]:
        """The weighted entries that vote, block by block."""
        weighted = weighting(ctx, stack, place.coordinates.like)
        apply = self.sparsifier.prepare(place, stack, ctx)
        for x, start in entry_blocks(place.coordinates, ctx.budget):
            yield weighted(apply(x, start))

    def _global_majority(self, ctx: Context) -> bool:
        return self.election and _over_all_modules(ctx)

    def _global_squares(self, ctx: Context) -> bool:
        return self._global_majority(ctx) and _by_share(ctx)

    def _finds_squares(self, index: int, ctx: Context) -> bool:
        return self._global_squares(ctx) and index == self.sparsifier.surveys(ctx)


def elected(y: Tensor, ctx: Context, zero: Tensor | float, squares: Tensor | None = None) -> Tensor:
    """The sign of each entry as the recipe elects it, :func:`merging.rules.elect`.

    A tie between counts stands for + in full space. The axes of KnOTS and Core Space are singular vectors,
    which have no sign of their own: there the sum of the entries decides a tie.
    """
    assert isinstance(ctx.params, VotingParams)
    method = ctx.params.majority_sign_method
    if method == "frequency" and ctx.space in ("knots", "core"):
        zero = rules.elect(y, "total", zero)
    return rules.elect(y, method, zero, squares)


def _opened(ctx: Context) -> tuple[Context, Whole]:
    """The context as the sparsifier expects it, and what is known of the whole model beside."""
    if not isinstance(ctx.shared, Whole):
        return ctx, Whole(ctx.shared)
    return replace(ctx, shared=ctx.shared.inner), ctx.shared


def _over_all_modules(ctx: Context) -> bool:
    compat, scope = (getattr(ctx.params, name, None) for name in ("compat", "trim_scope"))
    return compat == "paper" and scope == "global"


def _by_share(ctx: Context) -> bool:
    return str(getattr(ctx.params, "majority_sign_method", "")).startswith("norm")


def placed(stack: UpdateStack, ctx: Context) -> spaces.Placement:
    """The stack in the coordinates of the recipe's space. Raises ``isotropize_in_full_space``."""
    assert isinstance(ctx.params, SpaceParams)
    if ctx.params.isotropize and ctx.space == "full":
        raise isotropize_in_full_space()
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
