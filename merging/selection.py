"""Exact order statistics of magnitudes, without sorting everything.

The tie rule of the whole library: a threshold keeps every entry whose magnitude is at least the threshold,
so equal magnitudes live or die together and no result depends on the order of entries.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SMALL = 1 << 15
SAMPLE = 1 << 14
SORTABLE = 1 << 16


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The ``k``-th largest (1-based) of a 1-D tensor of non-negative numbers, as a 0-d tensor.

    Large CPU tensors: a strided sample brackets the answer, one pass counts what lies above the bracket and
    only the entries inside are ordered. The sample decides the cost, never the result.
    """
    N = values.numel()
    if not 1 <= k <= N:
        raise ValueError(f"k must be in 1..{N}, got {k}")
    if values.device.type != "cpu":
        return batched_kth_largest(values.view(1, 1, N), torch.tensor([[k]], device=values.device))[0, 0]
    if N > SMALL:
        data = values.numpy()  # numpy compares and picks several times faster than torch
        low, high = _bracket(data, k)
        above, inside = split(data, low, high)
        if above < k <= above + inside.size:
            values, k, N = torch.from_numpy(inside), k - above, inside.size
    return values.kthvalue(N - k + 1).values


def split(data: np.ndarray, low: float, high: float) -> tuple[int, np.ndarray]:
    """How many entries exceed ``high``, and those in ``[low, high]``."""
    over = data > high
    inside = data >= low
    inside &= ~over
    return int(np.count_nonzero(over)), np.compress(inside.ravel(), data.ravel())


def _bracket(data: np.ndarray, k: int) -> tuple[float, float]:
    """Two sample values between which the ``k``-th largest lies but for rare cases."""
    sample = np.sort(data[:: data.size // SAMPLE])[::-1]
    count = sample.size
    share = k / data.size
    margin = 4.0 * (count * share * (1.0 - share)) ** 0.5 + 4.0
    first = int(share * count - margin)
    last = int(share * count + margin) + 1
    high = float(sample[first]) if first > 0 else float("inf")
    low = float(sample[last]) if last < count - 1 else 0.0
    return low, high


def batched_kth_largest(values: Tensor, k: Tensor) -> Tensor:
    """The ``k[g, t]``-th largest along the last dimension of ``values (G, T, N)`` (non-negative); ``(G, T)``.

    ``k = 0`` gives infinity (keep nothing). Stays on the device: no value is read back.
    """
    if values.shape[-1] > SORTABLE:
        picked = _by_bisection(values, k)
    else:
        ordered = values.sort(dim=-1, descending=True).values
        index = (k - 1).clamp(0, values.shape[-1] - 1)
        picked = ordered.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    return torch.where(k > 0, picked, torch.full_like(picked, float("inf")))


def _by_bisection(values: Tensor, k: Tensor) -> Tensor:
    """The largest number that at least ``k`` entries reach, bit by bit from the leading one.

    Bits of non-negative floating-point numbers order like the numbers. Takes one byte per entry beyond
    ``values``, where a sort would take twelve and more.
    """
    integer = torch.int64 if values.dtype == torch.float64 else torch.int32
    bits = (values if values.dtype == torch.float64 else values.float()).view(integer)
    found = torch.zeros_like(k, dtype=integer)
    for position in range(62 if integer == torch.int64 else 30, -1, -1):
        candidate = found | (1 << position)
        reached = (bits >= candidate.unsqueeze(-1)).sum(-1) >= k
        found = torch.where(reached, candidate, found)
    return found.view(torch.float64 if integer == torch.int64 else torch.float32).to(values.dtype)
