"""How a merged update relates to its inputs: products, aligned energy, and the change of layer outputs.

For a merged update ``M = B A`` the products of its factors with those of all tasks (``k x R`` each) give the
inner product with every task exactly. Most methods make ``B`` and ``A`` from an SVD inside the joint frame:
then these products come from small matrices. Otherwise they are formed, and the SVD takes one more QR.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from merging.diagnostics.entries import Grid
from merging.diagnostics.inputs import Joined
from merging.diagnostics.spectra import NAN
from merging.lowrank import (
    ProductSVD,
    ThinSVD,
    inner,
    joint_frame,
    rank_for_energy,
    squared_norm,
    thin_svd,
)
from merging.spectral import NOISE
from merging.updates import LowRank, UpdateStack

ORTHOGONAL = 1e-5
"""Columns whose cosines are at most this count as orthogonal."""

ALIGNMENT_ERROR = 0.05
"""SAR keeps the left singular vectors that approximate the merged update to this relative error."""

AlignmentRule = Literal["paper", "code"]


@dataclass(frozen=True)
class Against:
    """The merged update of ``G`` modules against its ``T`` inputs; float64, NaN where undefined.

    ``norm2 (G,)``, ``products (G, T)``: squared norm and inner products. ``singular (G, k)``: its singular
    values; ``k = 0`` where they were not computed. ``alignment (G, T)``: the subspace alignment ratio, with
    ``alignment_rank (G,)`` vectors. ``row_merged (G, s)``, ``row_cross``, ``row_inputs (G, s, T)``: squared
    lengths of sampled rows of the merged update, their products with those of the inputs, and the squared
    lengths of the latter, with a relative error of ``rounding (G,)``.
    """

    norm2: Tensor
    products: Tensor
    singular: Tensor
    alignment: Tensor
    alignment_rank: Tensor
    row_merged: Tensor
    row_cross: Tensor
    row_inputs: Tensor
    rounding: Tensor

    def gap(self, factor: float) -> Tensor:
        """``E |(factor M - delta_t) x|_1 / m`` for ``x ~ N(0, I)``; ``(T,)``, of one module.

        That is ``sqrt(2 / pi)`` times the mean length of the rows of ``factor M - delta_t``. Its three parts
        cancel where ``M`` is close to an input: rows that differ by less than rounding count as equal.
        """
        merged, inputs = factor**2 * self.row_merged.unsqueeze(-1), self.row_inputs
        squares = merged - 2.0 * factor * self.row_cross + inputs
        resolved = squares > self.rounding * (merged + inputs)
        return math.sqrt(2.0 / math.pi) * torch.where(resolved, squares, 0.0).sqrt().mean(-2)


def relate_merged(
    stack: UpdateStack,
    update: LowRank,
    grid: Grid,
    joined: Joined | None = None,
    *,
    svd: ThinSVD | None = None,
    weights: Tensor | None = None,
    rule: AlignmentRule = "paper",
) -> Against:
    """Measure ``update (G, m, n)`` against the stack it was made of at the rows of ``grid``.

    ``svd`` is that of the update, if known; ``weights (T,)`` says that the update is exactly that sum of the
    inputs. With either, the cores suffice. A dense update has no singular values here (that would cost more
    than the merge), hence no alignment.
    """
    joined = joined or Joined.of(joint_frame(stack).cores)
    update = LowRank(*(None if part is None else part.to(stack.like) for part in (update.B, update.A)))
    P = joined.P
    A_blocks = joined.right_gram * (P @ P.mT)
    input_rows = torch.cat(grid.B, 2).double()
    row_inputs = ((input_rows @ A_blocks) * input_rows) @ P
    if update.B is None or update.A is None:
        norm2, products, row_merged, row_products = _dense(update, stack, grid.rows)
        singular = norm2.new_zeros(stack.G, 0)
        alignment, kept = torch.full_like(products, NAN), torch.full_like(norm2, NAN)
    else:
        if weights is not None:
            pair = _weighted(joined, weights)
        elif svd is not None:
            pair = _decomposed(stack, update.B, update.A, joined, svd)
        else:
            pair = _pair(stack, update.B, update.A)
        products = (pair.left * pair.right).sum(-2) @ P
        norm2 = (pair.left_gram * pair.right_gram).sum((-2, -1)).clamp_min(0.0)
        merged_rows = update.B.take_along_dim(grid.rows.unsqueeze(-1), 1).double()
        row_merged = ((merged_rows @ pair.right_gram) * merged_rows).sum(-1)
        row_products = merged_rows @ pair.right
        singular, vectors = _left_vectors(pair)
        singular = torch.where(singular > _noise(pair, stack.like.dtype), singular, 0.0)
        energies = ((vectors @ A_blocks) * vectors) @ P
        squares = (joined.left_gram * A_blocks).sum(-1) @ P
        alignment, kept = _alignment(singular, energies, squares, rule)
    row_cross = (row_products * input_rows) @ P
    rounding = torch.full_like(norm2, NOISE * torch.finfo(stack.like.dtype).eps)
    return Against(norm2, products, singular, alignment, kept, row_merged, row_cross, row_inputs, rounding)


@dataclass(frozen=True)
class _Pair:
    """A merged update ``B A`` of rank ``k`` next to the joined factors ``Bs``, ``As`` of the tasks.

    ``left = B^T Bs``, ``right = A As^T (G, k, R)``; ``left_gram = B^T B``, ``right_gram = A A^T (G, k, k)``.
    """

    B: Tensor
    A: Tensor
    Bs: Tensor
    left: Tensor
    right: Tensor
    left_gram: Tensor
    right_gram: Tensor


def _pair(stack: UpdateStack, B: Tensor, A: Tensor) -> _Pair:
    Bs, As = stack.joined()
    products = (B.mT @ Bs, A @ As.mT, B.mT @ B, A @ A.mT)
    return _Pair(B, A, Bs, *(product.double() for product in products))


def _decomposed(stack: UpdateStack, B: Tensor, A: Tensor, joined: Joined, svd: ThinSVD) -> _Pair:
    """``B = U sqrt(S)``, ``A = sqrt(S) Vh``; in coordinates of the frame where the method stayed in it."""
    frame = joint_frame(stack)
    root = svd.S.double().clamp_min(0.0).sqrt().unsqueeze(-1)
    if isinstance(svd, ProductSVD) and svd.columns is frame.columns:
        left = root * (svd.small.U.double().mT @ joined.B)
    else:
        left = torch.cat([B.mT @ other for other in stack.B], -1).double()
    if isinstance(svd, ProductSVD) and svd.rows is frame.rows:
        right = root * (svd.small.Vh.double() @ joined.A.mT)
    else:
        right = torch.cat([A @ other.mT for other in stack.A], -1).double()
    gram = torch.diag_embed(svd.S.double())
    return _Pair(B, A, joined.B, left, right, gram, gram)


def _weighted(joined: Joined, weights: Tensor) -> _Pair:
    """The sum of the tasks times ``weights (T,)``, in the coordinates of the frame."""
    w = joined.P @ weights.to(joined.P)
    left = joined.left_gram * w.unsqueeze(-1)
    return _Pair(joined.B * w, joined.A, joined.B, left, joined.right_gram, left * w, joined.right_gram)


def _left_vectors(pair: _Pair) -> tuple[Tensor, Tensor]:
    """Singular values ``(G, k)`` of the merged update, and ``U^T Bs (G, k, R)``."""
    if _orthogonal(pair.left_gram) and _orthogonal(pair.right_gram):
        sizes = pair.left_gram.diagonal(dim1=-2, dim2=-1).sqrt()
        S, order = (sizes * pair.right_gram.diagonal(dim1=-2, dim2=-1).sqrt()).sort(-1, descending=True)
        vectors = pair.left / torch.where(sizes > 0, sizes, 1.0).unsqueeze(-1)
        return S, vectors.take_along_dim(order.unsqueeze(-1), -2)
    svd = thin_svd(LowRank(pair.B, pair.A))
    return svd.S, svd.small.U.mT @ svd.columns.project(pair.Bs).double()


def _noise(pair: _Pair, dtype: torch.dtype) -> Tensor:
    """What rounding of the factors may have put into the singular values, ``(G, 1)``."""
    left, right = (
        gram.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True) for gram in (pair.left_gram, pair.right_gram)
    )
    return NOISE * torch.finfo(dtype).eps * (left * right).sqrt()


def _orthogonal(gram: Tensor) -> bool:
    sizes = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
    limit = ORTHOGONAL * sizes.unsqueeze(-1) * sizes.unsqueeze(-2)
    return bool((gram.abs() - torch.diag_embed(sizes**2) <= limit).all())


def _alignment(S: Tensor, energies: Tensor, squares: Tensor, rule: AlignmentRule) -> tuple[Tensor, Tensor]:
    """``|U_k^T delta_t|_F / |delta_t|_F`` (SAR, arXiv 2502.04959, eq. 5 and 6) and ``k``.

    ``energies (G, k, T)`` holds ``|u_i^T delta_t|^2``, ``squares (G, T)`` holds ``|delta_t|^2``.

    The paper keeps the fewest vectors whose remainder is at most ``ALIGNMENT_ERROR`` of the norm; its public
    code counts those before the square root of the energy share exceeds ``1 - ALIGNMENT_ERROR``.
    """
    if rule == "paper":
        kept = rank_for_energy(S, 1.0 - ALIGNMENT_ERROR**2)
    else:
        share = (S**2).cumsum(-1) / (S**2).sum(-1, keepdim=True)
        kept = (share.sqrt() > 1.0 - ALIGNMENT_ERROR).long().argmax(-1)
    chosen = torch.arange(S.shape[-1], device=S.device) < kept.unsqueeze(-1)
    ratio = (energies * chosen.unsqueeze(-1)).sum(-2).clamp_min(0.0) / squares
    defined = (S[:, :1] > 0) & (squares > 0)
    return (
        torch.where(defined, ratio.sqrt().clamp_max(1.0), NAN),
        torch.where(S[:, 0] > 0, kept.double(), NAN),
    )


def _dense(update: LowRank, stack: UpdateStack, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``norm2``, ``products``, ``row_merged``, and the sampled rows times ``As^T``, of a dense update."""
    tasks = [LowRank(B, A) for B, A in zip(stack.B, stack.A, strict=True)]
    products = torch.stack([inner(task, update) for task in tasks], dim=-1)
    sampled = update.any.take_along_dim(rows.unsqueeze(-1), 1)
    row_products = torch.cat([sampled @ A.mT for A in stack.A], -1).double()
    return squared_norm(update), products, (sampled.double() ** 2).sum(-1), row_products
