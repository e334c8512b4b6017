"""LoRA-LEGO (arXiv 2409.16167): cluster the rank-one units of all adapters.

Unit ``j`` of a task is row ``a_j`` of ``A`` and column ``b_j`` of ``B``: ``delta = sum_j b_j a_j``.

1. pool all ``R`` units of a module as vectors ``x = [a; b]`` (the scale is folded into both halves);
2. cluster them into ``k`` groups by k-means, seeded per module;
3. centroid ``c`` = (weighted) mean of the members;
4. ``param_reweight``: ``c *= mean |x| / |c|`` in the infinity or Euclidean norm;
5. ``A`` and ``B`` of the result are the halves of the centroids, ``B (G, m, k)``, ``A (G, k, n)``;
6. ``output_reweight``: ``B *= sqrt(mean input rank / k)``.

``b a = (-b)(-a) = (b / s)(s a)``, but 2 and 4 see the difference: ``canonicalize`` balances the halves and
turns each unit towards its best match (largest absolute cosine) in the model with the largest norm. Units
that contribute nothing (a zero half) then have no weight. Clustering works on the ``R x R`` Gram matrix,
which holds all distances; cost ``O((m + n) R^2)``.
"""

# ruff: noqa: N815  (A and B are the factors)

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from merging.catalog.named import LegoParams
from merging.errors import InputError
from merging.kernels import Context, Local, Merged, module_chunks
from merging.kmeans import kmeans, shares
from merging.lowrank import rank_rtol
from merging.rules import task_generator
from merging.updates import LowRank, UpdateStack


@dataclass(frozen=True)
class Units:
    """The pool of a batch: unit ``j`` is ``[turn_A[j] * A[j]; turn_B[j] * B[:, j]]``.

    ``B (G, m, R)``, ``A (G, R, n)``; Gram matrices of the halves ``(G, R, R)``, factors, and sample weights
    ``(G, R)`` in float64; ``task (R,)`` tells where a unit comes from.
    """

    B: Tensor
    A: Tensor
    gram_B: Tensor
    gram_A: Tensor
    turn_B: Tensor
    turn_A: Tensor
    weights: Tensor
    task: Tensor

    def gram(self, *, unit_halves: bool = False) -> Tensor:
        """Inner products of the units, or of units whose halves are each divided by their norm."""
        grams = []
        for gram, turn in ((self.gram_A, self.turn_A), (self.gram_B, self.turn_B)):
            gram = gram * turn.unsqueeze(-1) * turn.unsqueeze(-2)
            if unit_halves:
                inverse = _inverse(_norms(gram))
                gram = gram * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)
            grams.append(gram)
        return grams[0] + grams[1]


def pool(stack: UpdateStack, weights: Tensor) -> Units:
    """The units of a stack as they are; ``weights`` is ``(T,)``."""
    B, A = stack.joined()
    task = torch.cat([torch.full((rank,), t, device=B.device) for t, rank in enumerate(stack.ranks)])
    wide_B, wide_A = B.double(), A.double()
    ones = wide_A.new_ones((stack.G, stack.R))
    sample = weights.to(wide_A)[task].expand_as(ones)
    return Units(B, A, wide_B.mT @ wide_B, wide_A @ wide_A.mT, ones, ones, sample, task)


def canonical(units: Units) -> Units:
    """Balanced halves and signs that agree with the model of the largest norm."""
    norm_A, norm_B = _norms(units.gram_A), _norms(units.gram_B)
    turn_A = (norm_B * _inverse(norm_A)).sqrt()
    turn_B = (norm_A * _inverse(norm_B)).sqrt()
    balanced = replace(
        units, turn_A=turn_A, turn_B=turn_B, weights=units.weights * ((norm_A > 0) & (norm_B > 0))
    )
    gram = balanced.gram()
    inverse = _inverse(_norms(gram))
    cosine = gram * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)
    # The squared norm of a task's delta: sum of <b_i, b_j> <a_i, a_j> over its own units.
    same = units.task.unsqueeze(0) == units.task.unsqueeze(1)
    energy = (units.gram_A * units.gram_B * same).sum(-1)
    tasks = int(units.task[-1]) + 1
    total = energy.new_zeros((energy.shape[0], tasks)).index_add_(1, units.task, energy)
    reference = units.task.unsqueeze(0) == total.argmax(dim=1, keepdim=True)
    match = cosine.abs().masked_fill(~reference.unsqueeze(1), -1.0).argmax(dim=-1, keepdim=True)
    sign = torch.where(cosine.gather(-1, match).squeeze(-1) < 0, -1.0, 1.0)
    return replace(balanced, turn_A=turn_A * sign, turn_B=turn_B * sign)


def rebuild(units: Units, labels: Tensor, k: int, params: LegoParams, rank: float) -> LowRank:
    """Steps 3 to 6 for given labels ``(G, R)``; ``rank`` is the mean rank of the inputs."""
    share = shares(labels, units.weights, k)
    A = (share * units.turn_A.unsqueeze(-1)).mT.to(units.A.dtype) @ units.A
    B = units.B @ (share * units.turn_B.unsqueeze(-1)).to(units.B.dtype)
    factor = A.new_ones((A.shape[0], k), dtype=torch.float64)
    if params.param_reweight:
        if params.norm == "inf":
            own = _largest(units.A, units.turn_A, dim=-1).maximum(_largest(units.B, units.turn_B, dim=-2))
            norms = A.abs().amax(-1).maximum(B.abs().amax(-2)).double()
        else:
            gram = units.gram()
            own = _norms(gram)
            norms = (share * (gram @ share)).sum(-2).clamp_min(0.0).sqrt()
        mean = (share * own.unsqueeze(-1)).sum(-2)
        # Members that cancel leave rounding noise: no direction to stretch.
        defined = norms > rank_rtol(A.dtype) * mean
        factor = torch.where(defined, mean * _inverse(norms), torch.zeros_like(mean))
    A = A * factor.unsqueeze(-1).to(A.dtype)
    if params.output_reweight:
        factor = factor * (rank / k) ** 0.5
    return LowRank(B * factor.unsqueeze(-2).to(B.dtype), A)


def merge(stack: UpdateStack, ctx: Context) -> Merged:
    """Raises ``zero_weight_sum`` if no model has weight, ``k_too_large`` if ``k`` exceeds the pool."""
    stack, weights = _weighted(stack, ctx)
    double = 8
    per_module = 2 * double * (stack.m + stack.n) * stack.R
    pieces = [_merge(piece, weights, ctx) for piece in module_chunks(stack, per_module, ctx.budget)]
    return Merged(LowRank(torch.cat([B for B, _ in pieces]), torch.cat([A for _, A in pieces])))


def _merge(stack: UpdateStack, weights: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
    params = ctx.params
    assert isinstance(params, LegoParams)
    k = params.k or max(stack.ranks)
    if k > stack.R:
        raise InputError(
            "k_too_large",
            f"{stack.names[0]}: k is {k}, but the models have only {stack.R} ranks together",
            remedy="Lower `k`, or leave it out for the largest rank of the inputs.",
            where={"module": stack.names[0], "field": "parameters.k"},
        )
    units = pool(stack, weights)
    if params.canonicalize:
        units = canonical(units)
    generators = [task_generator(ctx.seed, "lora_lego", name) for name in stack.names]
    gram = units.gram(unit_halves=params.features == "unit_halves")
    labels = kmeans(gram, units.weights, k, generators)
    return rebuild(units, labels, k, params, stack.R / stack.T).factors()


def _weighted(stack: UpdateStack, ctx: Context) -> tuple[UpdateStack, Tensor]:
    """The stack without the models of weight 0, and the weights of the others."""
    weights = ctx.weights(stack)
    chosen = [t for t in range(stack.T) if weights[t] > 0]
    if not chosen:
        raise InputError(
            "zero_weight_sum",
            f"all models that have {stack.names[0]} have weight 0",
            where={"module": stack.names[0], "field": "parameters.weight"},
        )
    kept = UpdateStack(
        stack.names,
        tuple(stack.tasks[t] for t in chosen),
        tuple(stack.B[t] for t in chosen),
        tuple(stack.A[t] for t in chosen),
    )
    return kept, weights[chosen]


def _norms(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()


def _inverse(x: Tensor) -> Tensor:
    return torch.where(x > 0, 1.0 / x, torch.zeros_like(x))


def _largest(half: Tensor, turn: Tensor, dim: int) -> Tensor:
    return half.abs().amax(dim).double() * turn.abs()


lora_lego = Local(merge)
