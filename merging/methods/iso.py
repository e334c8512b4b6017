"""Isotropic merging, Iso-C and Iso-CTS (arXiv 2502.04959): one value for all singular directions.

Iso-C: ``sum_t w_t delta_t = U S V^T``; ``delta = mean(S) U V^T``.

Iso-CTS keeps the ``k`` leading directions of the sum (common space), adds of every task the ``s`` leading
directions of what the common left space does not hold, ``delta_t - U_c U_c^T delta_t``, whitens both sides
(``P Q^T`` from ``P D Q^T``) and gives all of them the mean of the ``k + T s`` values.

Low-rank updates: the sum has a support of rank ``rho <= R``, and only the support is made isotropic (the
dense algorithm on a rank-deficient sum gives arbitrary null vectors the same weight as the signal). The
mean runs over ``rank`` = the support, ``core`` = the directions the models reach, or ``full`` = ``min(m,
n)`` as in the paper; they differ by a constant factor. Iso-CTS divides the ``d`` directions the models
reach: ``T s = round((d - int(d f)) / T) T``, at most ``d``, and ``k = d - T s``. A task of negative weight
is subtracted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from merging.catalog.spectral import IsoCtsParams, IsoParams
from merging.kernels import Context, Local, Merged
from merging.lowrank import JointFrame, ThinSVD, core_svd, joint_frame, rank_rtol, thin_svd
from merging.spectral import (
    Triplets,
    core_dimension,
    flat_spectrum,
    isotropize,
    join,
    lifted,
    noise_floors,
    task_triplets,
    triplets,
    weighted,
    whitened,
)
from merging.updates import LowRank, UpdateStack


@dataclass(frozen=True)
class Scene:
    """A batch in its joint frame: weighted cores, noise of each task ``(G, T)`` and of the sum ``(G,)``."""

    frame: JointFrame
    cores: UpdateStack
    floors: Tensor
    floor: Tensor
    dtype: torch.dtype

    @property
    def size(self) -> int:
        return min(self.cores.m, self.cores.n)

    def total(self) -> ThinSVD:
        """The SVD of the weighted sum."""
        B, A = self.cores.joined()
        return core_svd(B @ A)

    def parts(self) -> list[Triplets]:
        """The singular triplets of the weighted tasks."""
        return task_triplets(self.cores, self.floors, self.dtype)


def _scene(stack: UpdateStack, ctx: Context, dtype: torch.dtype | None = None) -> Scene:
    stack, weights = weighted(stack, ctx)
    frame = joint_frame(stack, dtype)
    cores = frame.cores.scaled(torch.tensor(weights, dtype=torch.float64))
    floors = noise_floors(cores, frame.dtype)
    return Scene(frame, cores, floors, torch.linalg.vector_norm(floors, dim=-1), frame.dtype)


def _denominator(scene: Scene, ctx: Context, reach: Tensor | None = None) -> int | Tensor | None:
    assert isinstance(ctx.params, IsoParams)
    if ctx.params.iso_denominator == "rank":
        return None
    if ctx.params.iso_denominator == "full":
        return min(scene.frame.shape)
    return core_dimension(scene.parts()) if reach is None else reach


def merge_iso_c(stack: UpdateStack, ctx: Context) -> Merged:
    """Iso-C of a batch, on the support of the sum."""
    scene = _scene(stack, ctx)
    svd = isotropize(scene.total(), _denominator(scene, ctx), rtol=rank_rtol(scene.dtype), floor=scene.floor)
    return lifted(scene.frame, svd, ctx)


def split_sizes(reach: Tensor, tasks: int, fraction: float) -> tuple[Tensor, Tensor]:
    """``(k, s)``: common directions, and directions per task, of ``reach`` directions; integers.

    Rounds half to even as the reference does, and clips where the reference would run out of directions.
    """
    reach = reach.double()
    s = torch.round((reach - torch.floor(reach * fraction)) / tasks)
    s = s.minimum(torch.floor(reach / tasks))
    return (reach - tasks * s).long(), s.long()


def merge_iso_cts(stack: UpdateStack, ctx: Context) -> Merged:
    """Iso-CTS of a batch; sizes are chosen per module, from the directions its models reach."""
    assert isinstance(ctx.params, IsoCtsParams)
    # The whitened directions are nearly dependent by construction: one may hang on the last digits of the
    # factors, so that the frame is found in float64 whatever their dtype.
    scene = _scene(stack, ctx, torch.float64)
    T, fraction = scene.cores.T, ctx.params.common_space_fraction
    parts = scene.parts()
    reach = core_dimension(parts)
    k, s = split_sizes(reach, T, fraction)
    # Array sizes must not depend on the data: room for whatever `reach` may turn out to be.
    most_k, most_s = (int(x.max()) for x in split_sizes(torch.arange(scene.size + 1), T, fraction))
    total = triplets(scene.total(), scene.floor, rank_rtol(scene.dtype)).head(most_k)
    common = total.where(_first(total, k))
    stacked = join([common, *_residuals(scene, parts, common, s, most_s)])
    values = flat_spectrum(stacked.S, stacked.alive, _denominator(scene, ctx, reach))
    return lifted(scene.frame, whitened(stacked, values).svd, ctx)


def _residuals(scene: Scene, parts: list[Triplets], common: Triplets, s: Tensor, most: int) -> list[Triplets]:
    """The leading triplets of every task outside the common left space."""
    if most == 0:
        return []
    found = []
    for t, (B, A) in enumerate(zip(scene.cores.B, scene.cores.A, strict=True)):
        outside = B - common.left @ (common.left.mT @ B)
        svd = thin_svd(LowRank(outside, A))
        rest = triplets(svd, scene.floors[:, t], rank_rtol(scene.dtype), parts[t].S[:, 0]).head(most)
        found.append(rest.where(_first(rest, s)))
    return found


def _first(found: Triplets, count: Tensor) -> Tensor:
    """Marks the first ``count (G,)`` places."""
    return torch.arange(found.S.shape[-1], device=count.device) < count.unsqueeze(-1)


iso_c = Local(merge_iso_c)
iso_cts = Local(merge_iso_cts)
