"""RMM, reversible model merging (arXiv 2510.14163): a basis and coefficients instead of one adapter.

A position is a row of ``B`` or a column of ``A`` (``granularity: factor``: all of ``B``, all of ``A``). With
``x_t`` the vectors of the ``T`` tasks at a position, ``mu`` their mean and ``X = [x_t - mu] = U S V^T``:

    basis M = U[:, :p],   coefficients alpha = diag(S[:p]) V[:, :p]^T,   x_t ~ mu + M alpha_t

which is the best affine ``p``-dimensional approximation (Eckart-Young), exact for ``p >= min(r, T - 1)``.
Storage relative to the adapters, for equal ranks: ``(p (r + T) + r) / (r T)``.

The vectors depend on how an adapter splits its product: ``align: procrustes`` rotates ``B_t <- B_t Q``,
``A_t <- Q^T A_t`` towards the model with the largest norm. Smaller ranks are padded with zeros. The SVD
comes from Gram matrices of size ``min(r, T - 1)`` in float64; cost ``O((m + n) r T min(r, T))``.
"""

# ruff: noqa: N815  (A and B are the factors)

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from merging.catalog.named import RmmParams
from merging.errors import InputError
from merging.kernels import Context, LocalSplit, MultiMerged, module_chunks
from merging.lowrank import squared_norm
from merging.updates import LowRank, UpdateStack

TENSORS = ("mean_A", "basis_A", "coeff_A", "mean_B", "basis_B", "coeff_B")


@dataclass(frozen=True)
class Basis:
    """The artefact of ``G`` modules.

    ``mean_B (G, m, r)``, ``basis_B (G, m, r, p)``, ``coeff_B (G, m, p, T)`` (``(G, 1, p, T)`` for
    ``granularity: factor``), and the same of ``A`` by columns: ``mean_A (G, n, r)`` and so on.
    """

    mean_A: Tensor
    basis_A: Tensor
    coeff_A: Tensor
    mean_B: Tensor
    basis_B: Tensor
    coeff_B: Tensor

    @property
    def T(self) -> int:
        """How many tasks can be recovered."""
        return self.coeff_A.shape[-1]

    @property
    def rank(self) -> int:
        """``r``, the rank of every recovered update."""
        return self.mean_A.shape[-1]

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in TENSORS}


def fit(stack: UpdateStack, params: RmmParams) -> Basis:
    """The basis of a stack; tensors have its dtype. ``p`` never exceeds ``min(r, T - 1)``."""
    B, A = _padded(stack, max(stack.ranks))
    if params.align == "procrustes":
        B, A = _aligned(B, A)
    whole = params.granularity == "factor"
    mean_B, basis_B, coeff_B = _components(B, params.basis_size, whole)
    mean_A, basis_A, coeff_A = _components(A.mT, params.basis_size, whole)
    return Basis(mean_A, basis_A, coeff_A, mean_B, basis_B, coeff_B)


def recover(basis: Basis, t: int) -> tuple[Tensor, Tensor]:
    """``B (G, m, r)`` and ``A (G, r, n)`` of task ``t``. Cost ``O((m + n) r p)``."""
    B = _combined(basis.mean_B, basis.basis_B, basis.coeff_B[..., t])
    A = _combined(basis.mean_A, basis.basis_A, basis.coeff_A[..., t])
    return B, A.mT


def add_task(basis: Basis, B: Tensor, A: Tensor, *, align: str = "procrustes") -> Basis:
    """The basis with one more task, projected onto it without a new fit.

    ``B (G, m, r')``, ``A (G, r', n)`` with ``r' <= r``; ``align`` rotates them towards the mean first.
    Raises ``rank_exceeds_basis``.
    """
    if A.shape[-2] > basis.rank:
        raise InputError(
            "rank_exceeds_basis",
            f"an adapter of rank {A.shape[-2]} does not fit into a basis of rank {basis.rank}",
            remedy="Fit a new basis with this adapter among the inputs.",
        )
    missing = basis.rank - A.shape[-2]
    B, A = pad(B, (0, missing)), pad(A, (0, 0, 0, missing))
    if align == "procrustes":
        Q = rotation(B, A, basis.mean_B, basis.mean_A.mT)
        B, A = B @ Q, Q.mT @ A
    coeff_B = _projected(B - basis.mean_B, basis.basis_B, basis.coeff_B)
    coeff_A = _projected(A.mT - basis.mean_A, basis.basis_A, basis.coeff_A)
    return replace(
        basis,
        coeff_B=torch.cat([basis.coeff_B, coeff_B], dim=-1),
        coeff_A=torch.cat([basis.coeff_A, coeff_A], dim=-1),
    )


def storage_ratio(basis: Basis, ranks: tuple[int, ...]) -> float:
    """Numbers in the basis over numbers in adapters of these ranks."""
    kept = sum(tensor[0].numel() for tensor in basis.tensors().values())
    return kept / (sum(ranks) * (basis.mean_A.shape[1] + basis.mean_B.shape[1]))


def recon_error(basis: Basis, stack: UpdateStack) -> Tensor:
    """``|delta_t - recovered_t| / |delta_t|`` for the tasks of the basis, ``(G, T)`` in float64.

    For a task without an update the denominator is the largest norm among the tasks.
    """
    errors, norms = [], []
    for t, (B, A) in enumerate(zip(*_padded(stack, basis.rank), strict=True)):
        near_B, near_A = recover(basis, t)
        Q = rotation(B, A, near_B, near_A)
        B, A = B @ Q, Q.mT @ A
        # B A - B' A' = (B - B') A + B' (A - A'): the differences first, so that nothing cancels later.
        difference = LowRank(torch.cat([B - near_B, near_B], 2), torch.cat([A, A - near_A], 1))
        errors.append(squared_norm(difference).sqrt())
        norms.append(squared_norm(LowRank(B, A)).sqrt())
    error, norm = torch.stack(errors, dim=1), torch.stack(norms, dim=1)
    norm = torch.where(norm > 0, norm, norm.amax(1, keepdim=True))
    return torch.where(norm > 0, error / norm, error)


def rotation(B: Tensor, A: Tensor, to_B: Tensor, to_A: Tensor) -> Tensor:
    """The orthogonal ``Q (..., r, r)`` that brings ``(B Q, Q^T A)`` nearest to ``(to_B, to_A)``."""
    overlap = B.mT @ to_B + A @ to_A.mT
    U, _, Vh = torch.linalg.svd(overlap.double())
    Q: Tensor = U @ Vh
    return Q.to(B.dtype)


def split(stack: UpdateStack, ctx: Context) -> MultiMerged:
    """Fit and recover every task; facts ``storage_ratio (G,)`` and ``recon_error (G, T)``."""
    params = ctx.params
    assert isinstance(params, RmmParams)
    stack = stack.scaled(ctx.weights(stack))
    double, copies = 8, 4
    per_module = copies * double * (stack.m + stack.n) * max(stack.ranks) * stack.T
    bases, errors = [], []
    for piece in module_chunks(stack, per_module, ctx.budget):
        bases.append(fit(piece, params))
        errors.append(recon_error(bases[-1], piece))
    basis = Basis(*(torch.cat([getattr(part, name) for part in bases]) for name in TENSORS))
    ratio = storage_ratio(basis, stack.ranks)
    if ratio >= 1.0:
        ctx.warn("basis_not_smaller", "the basis is not smaller than the adapters: lower `basis_size`")
    facts = {
        "storage_ratio": torch.full((stack.G,), ratio, dtype=torch.float64),
        "recon_error": torch.cat(errors),
    }
    updates = tuple(LowRank(*recover(basis, t)) for t in range(basis.T))
    return MultiMerged(updates, basis.tensors(), facts)


def _padded(stack: UpdateStack, rank: int) -> tuple[Tensor, Tensor]:
    """All factors at one rank: ``(T, G, m, r)`` and ``(T, G, r, n)``."""
    B = torch.stack([pad(B, (0, rank - B.shape[2])) for B in stack.B])
    A = torch.stack([pad(A, (0, 0, 0, rank - A.shape[1])) for A in stack.A])
    return B, A


def _aligned(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Every task rotated towards the one with the largest norm, chosen per module."""
    norms = torch.stack([squared_norm(LowRank(b, a)) for b, a in zip(B, A, strict=True)])
    reference = norms.argmax(0)
    at = torch.arange(B.shape[1], device=B.device)
    Q = rotation(B, A, B[reference, at], A[reference, at])
    return B @ Q, Q.mT @ A


def _components(x: Tensor, size: int, whole: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean ``(G, P, r)``, basis ``(G, P, r, p)``, coefficients ``(G, P or 1, p, T)`` of ``(T, G, P, r)``."""
    T, G, P, r = x.shape
    X = x.permute(1, 2, 3, 0).double()
    if whole:
        X = X.reshape(G, 1, P * r, T)
    mean = X.mean(-1)
    # T centred vectors span at most T - 1 dimensions: contrasts orthogonal to (1, ..., 1) lose nothing,
    # so that a full basis is exact however small its last direction is.
    contrasts = _contrasts(T).to(X)
    Y = X @ contrasts
    p = min(size, Y.shape[-2], T - 1)
    if Y.shape[-2] <= T - 1:
        basis = _leading(Y @ Y.mT, p)
        coeff = (basis.mT @ Y) @ contrasts.mT
    else:
        W = _leading(Y.mT @ Y, p)
        columns = Y @ W
        lengths = columns.norm(dim=-2, keepdim=True)
        total = Y.flatten(-2).norm(dim=-1)[..., None, None]
        alive = lengths > 1e-13 * total
        basis = torch.where(alive, columns / lengths, torch.zeros_like(columns))
        coeff = (lengths * alive).mT * (contrasts @ W).mT
    return mean.view(G, P, r).to(x), basis.view(G, P, r, p).to(x), coeff.to(x)


def _leading(gram: Tensor, p: int) -> Tensor:
    """The eigenvectors of the ``p`` largest eigenvalues, descending, as columns."""
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors.flip(-1)[..., :p]


def _contrasts(T: int) -> Tensor:
    """An orthonormal basis ``(T, T - 1)`` of the vectors of sum zero (Helmert)."""
    columns: Tensor = torch.zeros((T, T - 1), dtype=torch.float64)
    for j in range(1, T):
        columns[:j, j - 1] = 1.0
        columns[j, j - 1] = -float(j)
    lengths: Tensor = columns.norm(dim=0)
    return columns / lengths


def _combined(mean: Tensor, basis: Tensor, coeff: Tensor) -> Tensor:
    """``mean + basis @ coeff`` at every position."""
    x = mean.clone()
    for j in range(basis.shape[-1]):
        x.addcmul_(basis[..., j], coeff[..., j : j + 1])
    return x


def _projected(x: Tensor, basis: Tensor, coeff: Tensor) -> Tensor:
    """Least-squares coefficients of ``x (G, P, r)``, ``(G, P or 1, p, 1)``."""
    G, positions, p = coeff.shape[:3]
    size = x[0].numel() // positions
    columns = basis.reshape(G, positions, size, p).double()
    solved: Tensor = torch.linalg.pinv(columns) @ x.reshape(G, positions, size, 1).double()
    return solved.to(basis)


rmm = LocalSplit(split)
