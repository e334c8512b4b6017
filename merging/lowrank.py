"""The algebra of low-rank updates: joint frames, thin SVDs, compression, inner products.

Nothing here forms an ``m x n`` matrix. All functions work on batches: ``B (G, m, r)``, ``A (G, r, n)``.
QR runs in the dtype of the factors (float32 or float64), the small cores in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from merging.updates import LowRank, UpdateStack


def rank_rtol(dtype: torch.dtype) -> float:
    """Singular values below this fraction of the largest are rounding noise of that dtype."""
    return 1e-10 if dtype == torch.float64 else 1e-6


@dataclass(frozen=True)
class Orthonormal:
    """``Q (..., m, p)`` of a QR decomposition, kept as Householder reflectors.

    Most uses multiply ``Q`` by a few columns, which costs a fraction of writing ``Q`` out.
    """

    reflectors: Tensor
    tau: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """That of all entries."""
        return self.tau.dtype

    @cached_property
    def matrix(self) -> Tensor:
        """``Q`` itself."""
        matrix: Tensor = torch.linalg.householder_product(self.reflectors, self.tau)
        return matrix

    def to(self, dtype: torch.dtype) -> Orthonormal:
        """The same basis in another floating-point type; orthonormal to the precision of that type."""
        return Orthonormal(self.reflectors.to(dtype), self.tau.to(dtype))

    def times(self, X: Tensor) -> Tensor:
        """``Q @ X`` in the dtype of ``Q``; ``X`` is ``(..., p, k)``."""
        if self._written:
            return self.matrix @ X.to(self.dtype)
        padded = self.tau.new_zeros((*X.shape[:-2], X.shape[-1], self.reflectors.shape[-2])).mT
        padded[..., : X.shape[-2], :] = X
        return torch.ormqr(self.reflectors, self.tau, padded)

    def project(self, Y: Tensor) -> Tensor:
        """``Q^T @ Y`` in the dtype of ``Q``; ``Y`` is ``(..., m, k)``."""
        Y = Y.to(self.dtype)
        if self._written:
            return self.matrix.mT @ Y
        return torch.ormqr(self.reflectors, self.tau, Y, transpose=True)[..., : self.tau.shape[-1], :]

    @property
    def _written(self) -> bool:
        # Elsewhere one matrix product beats a loop of reflections over the batch.
        return self.tau.device.type != "cpu"


def qr(matrix: Tensor) -> tuple[Orthonormal, Tensor]:
    """Reduced QR decomposition ``(..., m, r)`` into ``Q (..., m, p)`` and ``R (..., p, r)``."""
    packed, tau = torch.geqrf(matrix)
    p = tau.shape[-1]
    return Orthonormal(packed[..., :p], tau), packed[..., :p, :].triu()


@dataclass(frozen=True)
class JointFrame:
    """Orthonormal bases of everything the tasks can reach, and the tasks in these bases.

    ``left`` is ``(G, m, p)`` with orthonormal columns, ``right`` is ``(G, q, n)`` with orthonormal rows,
    ``p = min(m, R)``, ``q = min(n, R)``; they are written out on demand. ``cores`` is the same stack in small
    coordinates (float64): ``delta_t = left @ cores.B[t] @ cores.A[t] @ right``, exactly. ``dtype`` is the one
    in which it was computed; the bases come in that of the stack.
    """

    columns: Orthonormal
    rows: Orthonormal
    cores: UpdateStack
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """``m, n``."""
        return self.columns.reflectors.shape[-2], self.rows.reflectors.shape[-2]

    @property
    def left(self) -> Tensor:
        return self.columns.matrix

    @property
    def right(self) -> Tensor:
        return self.rows.matrix.mT

    def lift(self, core: ThinSVD) -> ProductSVD:
        """An SVD in small coordinates as the SVD of an update of ``(G, m, n)``."""
        return ProductSVD(self.columns, core, self.rows)


def joint_frame(stack: UpdateStack, dtype: torch.dtype | None = None) -> JointFrame:
    """QR of the stacked factors (`B = Q_B R_B`, `A^T = Q_A R_A`). Cost ``O((m + n) R^2)``.

    ``dtype`` (default: that of the stack) is the precision of the decomposition. Kept with the stack: the
    merge and the diagnostics of a module share one frame, the most precise that was asked for.
    """
    known = stack.__dict__.get("_joint_frame")
    if isinstance(known, JointFrame) and dtype in (None, known.dtype):
        return known
    frame = _joint_frame(stack, dtype or stack.like.dtype)
    stack.__dict__["_joint_frame"] = frame
    return frame


def _joint_frame(stack: UpdateStack, dtype: torch.dtype) -> JointFrame:
    B, A = (factor.to(dtype) for factor in stack.joined())
    columns, core_B = qr(B)
    rows, core_A = qr(A.mT)
    cores = UpdateStack(
        stack.names,
        stack.tasks,
        stack.split(core_B.double(), dim=2),
        stack.split(core_A.double().mT, dim=1),
    )
    return JointFrame(columns.to(stack.like.dtype), rows.to(stack.like.dtype), cores, dtype)


def transposed(stack: UpdateStack) -> UpdateStack:
    """The stack of the transposed updates; it shares the joint frame."""
    frame = joint_frame(stack)
    flipped, cores = (
        UpdateStack(s.names, s.tasks, tuple(A.mT for A in s.A), tuple(B.mT for B in s.B))
        for s in (stack, frame.cores)
    )
    flipped.__dict__["_joint_frame"] = JointFrame(frame.rows, frame.columns, cores, frame.dtype)
    return flipped


@dataclass(frozen=True)
class ThinSVD:
    """``U @ diag(S) @ Vh`` with ``U (G, m, k)``, ``S (G, k)`` descending, ``Vh (G, k, n)``."""

    U: Tensor
    S: Tensor
    Vh: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """That of the vectors."""
        return self.U.dtype

    def balanced(self) -> LowRank:
        """``B = U sqrt(S)``, ``A = sqrt(S) Vh``: the canonical factors of the product."""
        root = self.S.sqrt()
        return LowRank(self.U * root.unsqueeze(-2), root.unsqueeze(-1) * self.Vh)

    def head(self, rank: int) -> ThinSVD:
        """The leading ``rank`` triplets."""
        return ThinSVD(self.U[..., :rank], self.S[..., :rank], self.Vh[..., :rank, :])

    def with_values(self, S: Tensor) -> ThinSVD:
        """The same vectors with other values."""
        return ThinSVD(self.U, S, self.Vh)


class ProductSVD(ThinSVD):
    """The SVD ``Q_B @ small @ Q_A^T``, whose vectors are written out only where they are asked for."""

    def __init__(self, columns: Orthonormal, small: ThinSVD, rows: Orthonormal) -> None:
        self.__dict__.update(columns=columns, small=small, rows=rows, S=small.S)

    columns: Orthonormal
    small: ThinSVD
    rows: Orthonormal

    @cached_property
    def U(self) -> Tensor:
        return self.columns.times(self.small.U)

    @cached_property
    def Vh(self) -> Tensor:
        return self.rows.times(self.small.Vh.mT).mT

    @property
    def dtype(self) -> torch.dtype:
        return self.columns.dtype

    def head(self, rank: int) -> ProductSVD:
        return ProductSVD(self.columns, self.small.head(rank), self.rows)

    def transposed(self) -> ProductSVD:
        """The SVD of the transposed product."""
        small = ThinSVD(self.small.Vh.mT, self.S, self.small.U.mT)
        return ProductSVD(self.rows, small, self.columns)

    def with_values(self, S: Tensor) -> ProductSVD:
        return ProductSVD(self.columns, self.small.with_values(S), self.rows)


def thin_svd(update: LowRank) -> ProductSVD:
    """SVD of a product from the QR of its factors; ``k = min(m, n, r)``. Cost ``O((m + n) r^2)``."""
    B, A = update.factors()
    columns, R_B = qr(B)
    rows, R_A = qr(A.mT)
    return ProductSVD(columns, core_svd(R_B.double() @ R_A.double().mT), rows)


def one_sided_svd(columns: Orthonormal, turn: Tensor, rows: Tensor) -> ProductSVD:
    """SVD of ``columns @ turn @ rows``, where the columns of ``turn (G, p, k)`` are orthonormal.

    Columns of ``turn`` may be zero where the rows ``(G, k, n)`` are.
    """
    basis, R = qr(rows.mT)
    small = core_svd(R.mT)
    return ProductSVD(columns, ThinSVD(turn.double() @ small.U, small.S, small.Vh), basis)


def core_svd(core: Tensor) -> ThinSVD:
    """SVD of small dense matrices ``(G, p, q)`` in float64."""
    U, S, Vh = torch.linalg.svd(core.double(), full_matrices=False)
    return ThinSVD(U, S, Vh)


def numerical_rank(S: Tensor, rtol: float) -> Tensor:
    """How many singular values exceed ``rtol`` times the largest; ``(G,)``, zero for a zero matrix."""
    largest = S[..., :1]
    return ((largest * rtol < S) & (S > 0)).sum(-1)


def rank_for_energy(S: Tensor, energy: float) -> Tensor:
    """The smallest rank that keeps the fraction ``energy`` of ``sum(S^2)``; ``(G,)``, at least 1."""
    squares = S.double() ** 2
    kept = squares.cumsum(-1)
    # A share within rounding of the target counts as reached.
    enough = kept >= energy * kept[..., -1:] * (1 - 1e-12)
    return enough.long().argmax(-1) + 1


def inner(left: LowRank, right: LowRank) -> Tensor:
    """Frobenius inner products ``<left, right>``, ``(G,)`` in float64, from ``r x r`` matrices."""
    if left.B is None or left.A is None:
        left, right = right, left
    if left.B is None or left.A is None:
        return (left.any.double() * right.any.double()).sum((-2, -1))
    if right.B is None or right.A is None:  # <B A, D> = <B^T D, A>
        return ((left.B.mT @ right.any).double() * left.A.double()).sum((-2, -1))
    gram_B = left.B.mT @ right.B
    gram_A = left.A @ right.A.mT
    return (gram_B.double() * gram_A.double()).sum((-2, -1))


def squared_norm(update: LowRank) -> Tensor:
    """Squared Frobenius norms, ``(G,)`` in float64."""
    if update.B is None or update.A is None:
        return (update.any.double() ** 2).sum((-2, -1))
    return inner(update, update).clamp_min(0.0)
