"""Spaces: coordinates in which entry-wise rules act, and the way back.

``full``   the entries of the deltas themselves;
``knots``  KnOTS (arXiv 2410.19735): rows in the left singular basis of ``[delta_1 ... delta_T]``;
``core``   Core Space (arXiv 2509.17786): both sides in the singular bases of the stacked factors.

All three are isometric: norms and inner products of task vectors are the same in each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from merging.errors import InputError
from merging.lowrank import ThinSVD, core_svd, joint_frame, one_sided_svd, rank_rtol, thin_svd
from merging.updates import Coordinates, LowRank, UpdateStack


@dataclass(frozen=True)
class Placement:
    """A stack in some coordinates, and the way back.

    ``coordinates`` holds the tasks as ``p x q`` matrices. ``entries (G,)`` counts the coordinates that can be
    non-zero and ``widths (G,)`` those of one row: frames of a batch are padded with zero directions where
    the stacks are rank-deficient. ``lift`` takes a merged coordinate matrix ``(G, p, q)`` to an update of
    ``(G, m, n)``, exactly: full coordinates to a dense matrix next to an identity, others to an SVD.
    """

    coordinates: Coordinates
    lift: Callable[[Tensor], LowRank | ThinSVD]
    entries: Tensor
    widths: Tensor


def place(stack: Coordinates, space: str, *, gauge: str = "balanced") -> Placement:
    """The stack in the coordinates of ``space``; ``gauge`` matters in Core Space only."""
    if space == "full":
        entries = torch.full((stack.G,), stack.m * stack.n, dtype=torch.long)
        return Placement(stack, _dense, entries, torch.full_like(entries, stack.n))
    if not isinstance(stack, UpdateStack):
        raise InputError(
            "space_not_supported",
            f"the space {space!r} is defined for low-rank inputs only",
            remedy="Use `space: full` for full fine-tunes.",
            where={"field": "space"},
        )
    return knots(stack) if space == "knots" else core(stack, gauge=gauge)


def _dense(merged: Tensor) -> LowRank:
    return LowRank(None, merged) if merged.shape[-2] <= merged.shape[-1] else LowRank(merged, None)


def knots(stack: UpdateStack, *, with_values: bool = True) -> Placement:
    """KnOTS coordinates ``x_t = diag(s) V_t`` of size ``k x n`` without forming ``m x (T n)``.

    ``B = Q_B R_B``, ``A_t^T = Q_t R_t``; the SVD of the small ``[R_B,t R_t^T]_t`` gives the left basis.
    ``with_values=False`` divides by ``s`` and multiplies after the merge (the Core Space authors' variant).
    """
    frame = joint_frame(stack)
    dtype = stack.like.dtype
    small = [
        B @ torch.linalg.qr(A.mT, mode="r").R.mT for B, A in zip(frame.cores.B, frame.cores.A, strict=True)
    ]
    U, S, _ = torch.linalg.svd(torch.cat(small, dim=2), full_matrices=False)
    alive = S > rank_rtol(dtype) * S[:, :1]
    U = U * alive.unsqueeze(1)
    values = None if with_values else torch.where(alive, S, torch.ones_like(S)).unsqueeze(-1)
    rows = U.mT if values is None else U.mT / values
    coordinates = UpdateStack(
        stack.names, stack.tasks, tuple((rows @ block).to(dtype) for block in frame.cores.B), stack.A
    )

    def lift(merged: Tensor) -> ThinSVD:
        return one_sided_svd(frame.columns, U, merged if values is None else merged * values.to(merged))

    entries = alive.sum(-1).cpu() * stack.n
    return Placement(coordinates, lift, entries, torch.full_like(entries, stack.n))


def core(stack: UpdateStack, *, gauge: str = "balanced") -> Placement:
    """Core Space coordinates ``M_t = U^T delta_t V`` of size ``p x q`` (float64).

    ``U`` and ``V`` are the singular bases of the stacked factors, found from QR and small SVDs. The basis
    depends on how each adapter splits its product into factors; ``gauge="balanced"`` first rewrites every
    adapter as ``U sqrt(S), sqrt(S) V^T`` of its own SVD, so that only ``delta_t`` matters.
    """
    frame = joint_frame(stack)
    cores = balance(frame.cores) if gauge == "balanced" else frame.cores
    B, A = cores.joined()
    U, S_B, _ = torch.linalg.svd(B, full_matrices=False)
    V, S_A, _ = torch.linalg.svd(A.mT, full_matrices=False)
    rtol = rank_rtol(stack.like.dtype)
    alive_B = S_B > rtol * S_B[:, :1]
    alive_A = S_A > rtol * S_A[:, :1]
    U = U * alive_B.unsqueeze(1)
    V = V * alive_A.unsqueeze(1)
    coordinates = UpdateStack(
        stack.names,
        stack.tasks,
        tuple(U.mT @ block for block in cores.B),
        tuple(block @ V for block in cores.A),
    )

    def lift(merged: Tensor) -> ThinSVD:
        small = core_svd(merged)
        return frame.lift(ThinSVD(U @ small.U, small.S, small.Vh @ V.mT))

    entries = alive_B.sum(-1) * alive_A.sum(-1)
    return Placement(coordinates, lift, entries.cpu(), alive_A.sum(-1).cpu())


def balance(stack: UpdateStack) -> UpdateStack:
    """Every task in its canonical factors ``U sqrt(S), sqrt(S) V^T``; the products stay as they are.

    Singular values that are rounding noise are cut: their square roots would not look like noise any more.
    """
    rtol = rank_rtol(stack.like.dtype)
    factors = []
    for B, A in zip(stack.B, stack.A, strict=True):
        svd = thin_svd(LowRank(B, A))
        kept = ThinSVD(svd.U, svd.S * (svd.S > rtol * svd.S[..., :1]), svd.Vh)
        factors.append(kept.balanced().factors())
    return UpdateStack(
        stack.names,
        stack.tasks,
        tuple(B.to(stack.like.dtype) for B, _ in factors),
        tuple(A.to(stack.like.dtype) for _, A in factors),
    )
