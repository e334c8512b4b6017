"""Exact order statistics of magnitudes, without sorting everything.

The tie rule of the whole library: a threshold keeps every entry whose magnitude is at least the threshold,
so equal magnitudes live or die together and no result depends on the order of entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALL = 1 << 15
SAMPLE = 1 << 14


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The ``k``-th largest (1-based) of a 1-D tensor of non-negative numbers, as a 0-d tensor.

    Large CPU tensors: a strided sample brackets the answer, one pass counts what lies above the bracket and
    only the entries inside are ordered. The sample decides the cost, never the result.
    """
    N = values.numel()
    if not 1 <= k <= N:
        raise ValueError(f"k must be in 1..{N}, got {k}")
    if N <= SMALL or values.device.type != "cpu":
        return values.kthvalue(N - k + 1).values
    low, high = _bracket(values, k)
    above = int((values > high).sum())
    inside = values[(values >= low) & (values <= high)]
    if above < k <= above + inside.numel():
        return inside.kthvalue(inside.numel() - (k - above) + 1).values
    return values.kthvalue(N - k + 1).values


def _bracket(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Two sample values between which the ``k``-th largest lies but for rare cases."""
    sample = values[:: values.numel() // SAMPLE].sort(descending=True).values
    count = sample.numel()
    share = k / values.numel()
    margin = 4.0 * (count * share * (1.0 - share)) ** 0.5 + 4.0
    first = min(max(int(share * count - margin), 0), count - 1)
    last = min(max(int(share * count + margin) + 1, 0), count - 1)
    high = sample[first] if first > 0 else values.max()
    low = sample[last] if last < count - 1 else values.new_zeros(())
    return low, high


def batched_kth_largest(values: Tensor, k: Tensor) -> Tensor:
    """The ``k[g]``-th largest along the last dimension of ``(G, T, N)``; ``k`` is ``(G, T)``; ``(G, T)``.

    For coordinates small enough to sort. ``k = 0`` gives infinity (keep nothing).
    """
    ordered = values.sort(dim=-1, descending=True).values
    index = (k - 1).clamp(0, values.shape[-1] - 1)
    picked = ordered.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    return torch.where(k > 0, picked, torch.full_like(picked, float("inf")))
