"""Rules on singular structure. They commute with orthogonal maps, so they run in any joint frame."""

from __future__ import annotations

import torch

from merging.lowrank import ThinSVD, rank_rtol


def isotropize(svd: ThinSVD, denominator: int | None = None) -> ThinSVD:
    """All singular values of the support set to their mean (Iso-C, arXiv 2502.04959, section 4).

    The mean runs over the numerical rank, or over ``denominator`` values. Null directions stay null: a
    dense isotropic merge of a rank-deficient matrix would fill them with arbitrary vectors.
    """
    S = svd.S
    support = S > rank_rtol(svd.U.dtype) * S[..., :1]
    count = support.sum(-1, keepdim=True).clamp_min(1)
    size = count if denominator is None else torch.full_like(count, denominator)
    mean = (S * support).sum(-1, keepdim=True) / size
    return ThinSVD(svd.U, mean * support, svd.Vh)
