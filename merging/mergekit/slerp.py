"""mergekit's slerp: the arc between two whole weights, in float32, with norms and products by chunks.

The chunks are part of the arithmetic: sums in another order differ in the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from merging.mergekit.entries import Entries

CHUNK = 1 << 20
SMALL = 1e-8
COLLINEAR = 0.9995


def merge(t: Tensor, entries: Entries, first: int, second: int, emit: Callable[[int, Tensor], None]) -> None:
    """Hand out the point ``t`` of the way from one input to the other."""
    dtype = torch.float64 if entries.dtype == torch.float64 else torch.float32

    def chunks() -> Iterator[tuple[int, Tensor, Tensor]]:
        for start in range(0, entries.size, CHUNK):
            stop = min(start + CHUNK, entries.size)
            x, y = (entries.rows(i, start, stop).to(dtype).unsqueeze(0) for i in (first, second))
            yield start, x, y

    t = t.to(dtype).reshape(1, 1)
    norms = [[torch.linalg.vector_norm(v, dim=1, keepdim=True) for v in (x, y)] for _, x, y in chunks()]
    a, b = (torch.linalg.vector_norm(torch.stack(part), dim=0) for part in zip(*norms, strict=True))
    a, b = (torch.where(norm > SMALL, norm, torch.ones_like(norm)) for norm in (a, b))
    parts = [((x / a) * (y / b)).sum(dim=1, keepdim=True) for _, x, y in chunks()]
    cosine = torch.stack(parts).sum(dim=0).clamp(-1, 1)
    line = cosine.abs() > COLLINEAR
    theta = torch.acos(torch.where(line, torch.zeros_like(cosine), cosine))
    sine = torch.sin(theta)
    from_first = torch.where(line, 1 - t, torch.sin((1 - t) * theta) / sine)
    from_second = torch.where(line, t, torch.sin(t * theta) / sine)
    for start, x, y in chunks():
        emit(start, (from_first * x + from_second * y).to(entries.dtype).squeeze(0))
