"""How the task updates of a batch relate to each other, from their ``R x R`` cores in the joint frame.

``P (R, T)`` below marks which joined column belongs to which task, so that ``P^T M P`` adds up the blocks of
an ``R x R`` matrix. Undefined values (of a zero update) are NaN. All results are float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from merging.diagnostics.spectra import NAN
from merging.lowrank import joint_frame, rank_rtol, thin_svd
from merging.spectral import NOISE, POLAR_RTOL
from merging.updates import LowRank, UpdateStack


@dataclass(frozen=True)
class Inputs:
    """The inputs of ``G`` modules among themselves.

    ``gram (G, T, T)``: Frobenius inner products. ``singular (G, T, r)``: singular values, padded with zeros.
    ``row_overlap``, ``column_overlap (G, T, T)``: ``|V_i^T V_j|_F^2 / min(r_i, r_j)`` of orthonormal bases.
    ``sti (G,)``: singular task interference. ``whitening_columns``, ``whitening_rows (G,)``: the smallest
    singular value of all tasks' singular vectors side by side. ``average_error2``, ``mean2 (G,)``: see
    :func:`factor_average_error`, and the squared norm of the mean update.
    """

    gram: Tensor
    singular: Tensor
    row_overlap: Tensor
    column_overlap: Tensor
    sti: Tensor
    whitening_columns: Tensor
    whitening_rows: Tensor
    average_error2: Tensor
    mean2: Tensor


@dataclass(frozen=True)
class Joined:
    """The cores of all tasks side by side, ``B (G, p, R)`` and ``A (G, R, q)``, and what follows from them.

    ``P (R, T)`` as above; ``left_gram``, ``right_gram (G, R, R)``: ``B^T B`` and ``A A^T``.
    """

    B: Tensor
    A: Tensor
    P: Tensor
    left_gram: Tensor
    right_gram: Tensor

    @staticmethod
    def of(cores: UpdateStack) -> Joined:
        """From the cores of a joint frame."""
        B, A = cores.joined()
        owner = torch.repeat_interleave(torch.arange(cores.T), torch.tensor(cores.ranks))
        return Joined(B, A, membership(owner, cores.T, B), B.mT @ B, A @ A.mT)

    def gram(self) -> Tensor:
        """``<delta_i, delta_j> = sum((B_i^T B_j) * (A_i A_j^T))`` for all pairs; ``(G, T, T)``, symmetric."""
        gram = self.P.mT @ (self.left_gram * self.right_gram) @ self.P
        return (gram + gram.mT) / 2


def membership(owner: Tensor, tasks: int, like: Tensor) -> Tensor:
    """``P (K, T)``: one where column ``k`` belongs to task ``owner[k]``, zero elsewhere."""
    return torch.nn.functional.one_hot(owner, tasks).to(like)


def relate_inputs(stack: UpdateStack, joined: Joined | None = None) -> Inputs:
    """Measure a batch. Cost beyond the joint frame: ``O(R^3)``."""
    cores = joint_frame(stack).cores
    joined = joined or Joined.of(cores)
    bases = task_bases(cores, stack.like.dtype)
    U_gram, V_gram = bases.left.mT @ bases.left, bases.right.mT @ bases.right
    gram = joined.gram()
    return Inputs(
        gram=gram,
        singular=bases.singular,
        row_overlap=_overlap(V_gram, bases),
        column_overlap=_overlap(U_gram, bases),
        sti=_interference(bases.values, U_gram, V_gram),
        whitening_columns=_smallest(U_gram, bases.values),
        whitening_rows=_smallest(V_gram, bases.values),
        average_error2=factor_average_error(joined, cores.ranks),
        mean2=_mean_square(gram, rank_rtol(stack.like.dtype)),
    )


@dataclass(frozen=True)
class Bases:
    """Singular triplets of all tasks side by side, tasks of equal rank together.

    ``left (G, p, K)``, ``values (G, K)``, ``right (G, q, K)``; what is below rounding is zero in all three.
    ``owner (K, T)`` says whose a column is; ``singular (G, T, r)`` has the values by task.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    owner: Tensor
    singular: Tensor


def task_bases(cores: UpdateStack, dtype: torch.dtype) -> Bases:
    """The SVD of every task by one batched ``r x r`` SVD per distinct rank; ``dtype``: of the factors."""
    widest = max(min(rank, cores.m, cores.n) for rank in cores.ranks)
    singular = cores.like.new_zeros(cores.G, cores.T, widest)
    left, values, right, owner = [], [], [], []
    for rank in sorted(set(cores.ranks)):
        tasks = [t for t, r in enumerate(cores.ranks) if r == rank]
        B = torch.stack([cores.B[t] for t in tasks], 1)
        A = torch.stack([cores.A[t] for t in tasks], 1)
        svd = thin_svd(LowRank(B, A))
        noise = NOISE * torch.finfo(dtype).eps * torch.linalg.matrix_norm(B) * torch.linalg.matrix_norm(A)
        keep = svd.S > torch.maximum(noise.unsqueeze(-1), rank_rtol(dtype) * svd.S[..., :1])
        S = svd.S * keep
        singular[:, tasks, : S.shape[-1]] = S
        values.append(S.flatten(1))
        left.append((svd.U * keep.unsqueeze(-2)).movedim(1, 2).flatten(2))
        right.append((svd.Vh.mT * keep.unsqueeze(-2)).movedim(1, 2).flatten(2))
        owner += [t for t in tasks for _ in range(S.shape[-1])]
    P = membership(torch.tensor(owner), cores.T, singular)
    return Bases(torch.cat(left, -1), torch.cat(values, -1), torch.cat(right, -1), P, singular)


def factor_average_error(joined: Joined, ranks: tuple[int, ...]) -> Tensor:
    """How wrong averaging the factors would be: ``|E|_F^2``, ``(G,)``.

    ``E = mean_t (B_t - mean B)(A_t - mean A)`` is what ``(mean B)(mean A)`` misses of the mean update
    (the residual of FedEx-LoRA, arXiv 2410.09432). It depends on how the products are split into factors;
    the scale of an adapter is taken as split evenly. NaN where the ranks differ.
    """
    if len(set(ranks)) > 1:
        return torch.full_like(joined.left_gram[:, 0, 0], NAN)
    T = len(ranks)
    product = _centred(joined.left_gram, T) * _centred(joined.right_gram, T)
    return product.sum((1, 2, 3, 4)).clamp_min(0.0) / T**2


def null_space_ratio(stack: UpdateStack, x: Tensor) -> Tensor:
    """The share of each activation that an adapter does not read: ``|x - P_A x| / |x|``, ``(G, T, N)``.

    ``x`` is ``(N, n)``; ``P_A`` projects on the row space of the task's update. (The coverage term of NSC;
    ``sqrt(1 - r / n)`` on average over directions without preference.)
    """
    frame = joint_frame(stack)
    bases = task_bases(frame.cores, stack.like.dtype)
    x = x.double()
    ratios = []
    for t in range(stack.T):
        rows = (bases.right * bases.owner[:, t]).mT @ frame.right.double()
        rest = x - (x @ rows.mT) @ rows
        ratios.append(torch.linalg.vector_norm(rest, dim=-1) / torch.linalg.vector_norm(x, dim=-1))
    return torch.stack(ratios, 1)


def _overlap(gram: Tensor, bases: Bases) -> Tensor:
    counts = (bases.values > 0).to(gram) @ bases.owner
    smaller = torch.minimum(counts.unsqueeze(-1), counts.unsqueeze(-2))
    shared = bases.owner.mT @ gram**2 @ bases.owner
    return torch.where(smaller > 0, (shared / smaller).clamp_max(1.0), NAN)


def _interference(S: Tensor, U_gram: Tensor, V_gram: Tensor) -> Tensor:
    """``|(U^T U - I) S (V^T V - I)|``, summed over entries (TSV, arXiv 2412.00081); ``(G,)``.

    Removed triplets have zero values and zero vectors and add nothing.
    """
    eye = torch.eye(U_gram.shape[-1], dtype=U_gram.dtype, device=U_gram.device)
    return ((U_gram - eye) @ ((V_gram - eye) * S.unsqueeze(-1))).abs_().sum((-2, -1))


def _smallest(gram: Tensor, values: Tensor) -> Tensor:
    """The smallest singular value of the unit vectors behind ``gram``; 0 below rounding, 1 without any."""
    found = torch.linalg.eigvalsh(gram + torch.diag_embed((values == 0).to(gram)))
    low, high = found[..., 0], found[..., -1]
    return torch.where(low > POLAR_RTOL**2 * high, low, 0.0).sqrt().clamp_max(1.0)


def _mean_square(gram: Tensor, rtol: float) -> Tensor:
    """``|mean_t delta_t|^2``; zero where the updates cancel up to rounding."""
    mean2 = gram.mean((-2, -1))
    return torch.where(mean2 > rtol * gram.diagonal(dim1=-2, dim2=-1).mean(-1), mean2, 0.0)


def _centred(gram: Tensor, tasks: int) -> Tensor:
    """The Gram matrix after the mean over tasks is taken off every factor; ``(G, T, r, T, r)``."""
    rank = gram.shape[-1] // tasks
    blocks = gram.reshape(-1, tasks, rank, tasks, rank)
    blocks = blocks - blocks.mean(1, keepdim=True)
    return blocks - blocks.mean(3, keepdim=True)
