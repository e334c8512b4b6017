"""Rules on singular structure. They commute with orthogonal maps, so they run in any joint frame.

The pieces of TSV, Iso-C, Iso-CTS and CART: noise floors, the SVD of every task from ``r x r`` matrices,
pseudo-polar whitening, isotropic spectra. Shapes: a frame is ``p x q`` with ``p = min(m, R)``,
``q = min(n, R)``; ``K`` counts stacked singular triplets. Small matrices are float64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from merging.kernels import Context, Merged
from merging.lowrank import JointFrame, ThinSVD, rank_rtol, thin_svd
from merging.updates import LowRank, UpdateStack

POLAR_RTOL = 1e-6
"""Directions of a stack of singular vectors below this fraction of the largest are duplicates."""

CLOSE = 1e-2
"""Below this smallest singular value of a stack of unit vectors, whitening magnifies their differences."""

NOISE = 8.0
"""Rounding of the QR of the factors, in units of ``eps * |B| |A|`` (up to 3.4 was measured)."""


def isotropize(
    svd: ThinSVD,
    denominator: int | Tensor | None = None,
    *,
    rtol: float | None = None,
    floor: Tensor | None = None,
) -> ThinSVD:
    """All singular values of the support set to their mean (Iso-C, arXiv 2502.04959, section 4).

    The support is what exceeds ``rtol`` times the largest value (default: rounding of the dtype of ``U``)
    and ``floor (G,)``. The mean runs over the size of the support, or over ``denominator`` values (a number,
    or ``(G,)``). Null directions stay null: a dense isotropic merge of a rank-deficient matrix would fill
    them with arbitrary vectors.
    """
    S = svd.S
    support = S > (rank_rtol(svd.dtype) if rtol is None else rtol) * S[..., :1]
    if floor is not None:
        support = support & (floor.unsqueeze(-1) < S)
    return svd.with_values(flat_spectrum(S, support, denominator))


def flat_spectrum(S: Tensor, alive: Tensor, denominator: int | Tensor | None = None) -> Tensor:
    """The mean of the values where ``alive``, at every such place; ``S`` and ``alive`` are ``(G, K)``."""
    count = alive.sum(-1) if denominator is None else torch.as_tensor(denominator, device=S.device)
    mean = (S * alive).sum(-1) / count.clamp_min(1)
    return mean.unsqueeze(-1) * alive


def weighted(stack: UpdateStack, ctx: Context) -> tuple[UpdateStack, list[float]]:
    """The tasks that count, and their weights: a task of weight zero is as good as absent.

    (It would otherwise still take part in whitening and in the number of tasks.) If all weights are zero,
    everything stays.
    """
    weights: list[float] = ctx.weights(stack).tolist()
    used = [t for t, weight in enumerate(weights) if weight != 0.0] or list(range(stack.T))
    if len(used) == stack.T:
        return stack, weights
    return UpdateStack(
        stack.names,
        tuple(stack.tasks[t] for t in used),
        tuple(stack.B[t] for t in used),
        tuple(stack.A[t] for t in used),
    ), [weights[t] for t in used]


@dataclass(frozen=True)
class Triplets:
    """Singular triplets of the tasks, side by side, in the coordinates of a joint frame.

    ``left (G, p, K)``, ``S (G, K)``, ``right (G, K, q)``. Where ``S`` is zero the vectors are zero too: such
    a triplet takes no part in anything. ``spread (G, K)`` bounds the rounding error of each unit vector.
    """

    left: Tensor
    S: Tensor
    right: Tensor
    spread: Tensor

    @property
    def alive(self) -> Tensor:
        return self.S > 0

    def head(self, count: int) -> Triplets:
        """The first ``count`` triplets."""
        return Triplets(
            self.left[..., :count], self.S[:, :count], self.right[:, :count], self.spread[:, :count]
        )

    def where(self, keep: Tensor) -> Triplets:
        """The same places with everything removed that is not in ``keep (G, K)``."""
        return Triplets(
            self.left * keep.unsqueeze(-2), self.S * keep, self.right * keep.unsqueeze(-1), self.spread * keep
        )

    def scaled(self, factor: float) -> Triplets:
        """The triplets of the update times ``factor``."""
        sign = -1.0 if factor < 0 else 1.0
        return replace(self, S=self.S * abs(factor), right=self.right * sign)


def join(parts: list[Triplets]) -> Triplets:
    """Triplets of several tasks side by side."""
    return Triplets(
        torch.cat([part.left for part in parts], -1),
        torch.cat([part.S for part in parts], -1),
        torch.cat([part.right for part in parts], -2),
        torch.cat([part.spread for part in parts], -1),
    )


def noise_floors(cores: UpdateStack, dtype: torch.dtype) -> Tensor:
    """What rounding may have added to each task, ``(G, T)``: singular values below it mean nothing.

    ``dtype`` is the one in which the joint frame was computed.
    """
    norms = [
        torch.linalg.matrix_norm(B) * torch.linalg.matrix_norm(A)
        for B, A in zip(cores.B, cores.A, strict=True)
    ]
    return NOISE * torch.finfo(dtype).eps * torch.stack(norms, dim=-1)


def triplets(svd: ThinSVD, floor: Tensor, rtol: float, largest: Tensor | None = None) -> Triplets:
    """An SVD without its noise: values below ``floor (G,)`` or ``rtol * largest (G,)`` are removed.

    ``largest`` is the scale of the task (default: the first singular value).
    """
    top = svd.S[:, 0] if largest is None else largest
    keep = torch.maximum(floor, rtol * top).unsqueeze(-1) < svd.S
    spread = floor.unsqueeze(-1) / torch.where(keep, svd.S, torch.ones_like(svd.S))
    return Triplets(svd.U, svd.S, svd.Vh, spread).where(keep)


def task_triplets(cores: UpdateStack, floors: Tensor, dtype: torch.dtype) -> list[Triplets]:
    """The SVD of every task from its factors: one batched ``r x r`` SVD per distinct rank."""
    rtol = rank_rtol(dtype)
    found: dict[int, Triplets] = {}
    for rank in sorted(set(cores.ranks)):
        tasks = [t for t, r in enumerate(cores.ranks) if r == rank]
        B = torch.stack([cores.B[t] for t in tasks])
        A = torch.stack([cores.A[t] for t in tasks])
        svd = thin_svd(LowRank(B, A))
        for i, t in enumerate(tasks):
            found[t] = triplets(ThinSVD(svd.U[i], svd.S[i], svd.Vh[i]), floors[:, t], rtol)
    return [found[t] for t in range(cores.T)]


def core_dimension(parts: list[Triplets]) -> Tensor:
    """How many directions the tasks reach, ``(G,)``: the smaller of the joint left and right ranks.

    It depends on the updates alone, not on how they are factored; generically ``min(m, n, R)``.
    """
    joined = join([_relative(part) for part in parts])
    spread = torch.linalg.vector_norm(joined.S * joined.spread, dim=-1, keepdim=True)
    ranks = []
    for columns in (joined.left, joined.right.mT):
        values = torch.linalg.svdvals(columns * joined.S.unsqueeze(-2))
        ranks.append((values > (POLAR_RTOL * values[:, :1]).maximum(spread)).sum(-1))
    return torch.minimum(*ranks)


def _relative(part: Triplets) -> Triplets:
    top = part.S[:, :1]
    return replace(part, S=part.S / torch.where(top > 0, top, torch.ones_like(top)))


@dataclass(frozen=True)
class Polar:
    """The nearest partial isometry to ``columns (G, p, K)``.

    ``smallest (G,)`` is the smallest singular value that was kept (1 if there is none), ``full (G,)`` says
    that the result has orthonormal columns.
    """

    matrix: Tensor
    smallest: Tensor
    full: Tensor


def pseudo_polar(columns: Tensor, spread: Tensor) -> Polar:
    """``P Q^T`` from ``columns = P D Q^T`` without the directions that are zero up to rounding.

    Columns that repeat others span nothing new; keeping their rounding noise would turn it into vectors of
    unit length. A direction is dropped below ``POLAR_RTOL`` of the largest or below the noise that the
    ``spread (G, K)`` of the columns puts into it.
    """
    P, D, Qh = torch.linalg.svd(columns, full_matrices=False)
    noise = torch.linalg.vector_norm(Qh * spread.unsqueeze(-2), dim=-1)
    keep = (POLAR_RTOL * D[:, :1]).maximum(noise) < D
    return Polar(
        (P * keep.unsqueeze(-2)) @ Qh,
        torch.where(keep, D, torch.ones_like(D)).amin(-1).clamp_max(1.0),
        keep.sum(-1) == columns.shape[-1],
    )


@dataclass(frozen=True)
class Whitened:
    """``left @ diag(S) @ right`` with whitened vectors, as an SVD; ``smallest (G,)``: see :class:`Polar`."""

    svd: ThinSVD
    smallest: Tensor


def whitened(parts: Triplets, values: Tensor | None = None) -> Whitened:
    """Whiten both stacks of singular vectors and put ``values (G, K)`` (default ``S``) between them.

    With independent vectors the outcome is an SVD as it stands; where some repeat or there are more than
    fit, the product of partial isometries needs one more small SVD.
    """
    S = parts.S if values is None else values
    left = pseudo_polar(parts.left, parts.spread)
    right = pseudo_polar(parts.right.mT, parts.spread)
    order = S.argsort(dim=-1, descending=True, stable=True)
    U = left.matrix.take_along_dim(order.unsqueeze(-2), -1)
    V = right.matrix.take_along_dim(order.unsqueeze(-2), -1)
    S = S.take_along_dim(order, -1)
    full = left.full & right.full
    svd = ThinSVD(U, S, V.mT)
    if not bool(full.all()):
        svd = _chosen(full, svd)
    return Whitened(svd, left.smallest.minimum(right.smallest))


def _chosen(full: Tensor, svd: ThinSVD) -> ThinSVD:
    """The SVD as it stands where ``full``, a proper one of its product elsewhere."""
    again = torch.linalg.svd(svd.U * svd.S.unsqueeze(-2) @ svd.Vh, full_matrices=False)
    again_svd = ThinSVD(again.U, again.S, again.Vh)
    if svd.S.shape[-1] > again.S.shape[-1]:  # more triplets than directions: full is nowhere true
        return again_svd
    count = svd.S.shape[-1]
    again_svd = again_svd.head(count)
    column = full.view(-1, 1, 1)
    return ThinSVD(
        torch.where(column, svd.U, again_svd.U),
        torch.where(column[..., 0], svd.S, again_svd.S),
        torch.where(column, svd.Vh, again_svd.Vh),
    )


def warn_of_overlap(stack: UpdateStack, found: Whitened, ctx: Context) -> None:
    """Say where tasks share directions almost: whitening then amplifies their small differences."""
    smallest = found.smallest.tolist()
    close = [(value, name) for value, name in zip(smallest, stack.names, strict=True) if value < CLOSE]
    if close:
        value, name = min(close)
        ctx.warn(
            "near_duplicate_directions",
            f"{len(close)} of {stack.G} modules hold nearly parallel singular directions of different models "
            f"(smallest singular value {value:.1e}, in {name}); whitening amplifies their difference. "
            "Remove near-duplicate models, or merge those by `linear` first.",
        )


def lifted(frame: JointFrame, svd: ThinSVD, ctx: Context) -> Merged:
    """An SVD in the coordinates of a frame as an SVD of the updates, cut to ``ctx.rank`` if that is set."""
    head = svd if ctx.rank is None else svd.head(ctx.rank)
    return Merged(frame.lift(head), (svd.S[:, head.S.shape[-1] :] ** 2).sum(-1))
