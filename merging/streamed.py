"""An exact order statistic of magnitudes in blocks, without a second tensor of the same size."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SMALL = 1 << 16
BLOCK = 1 << 19
SAMPLE_COLUMNS = 64


def kth_magnitude(values: Tensor, k: int) -> Tensor:
    """The ``k``-th largest (1-based) magnitude in a CPU tensor ``(..., n)``, as a 0-d tensor.

    Some of the columns bracket the answer; one pass over cache-sized blocks counts what lies above and
    collects what lies inside, and only that is ordered. The sample decides the cost, never the result.
    """
    N = values.numel()
    if not 1 <= k <= N:
        raise ValueError(f"k must be in 1..{N}, got {k}")
    flat = values.reshape(-1)
    if N > SMALL:
        low, high = _bracket(values, k / N)
        above, inside = 0, []
        for block in torch.split(flat, BLOCK):
            magnitudes = block.abs().numpy()  # numpy compares and picks several times faster than torch
            over = magnitudes > high
            above += int(np.count_nonzero(over))
            inside.append(magnitudes[(magnitudes >= low) & ~over])
        found = torch.from_numpy(np.concatenate(inside))
        if above < k <= above + found.numel():
            return found.kthvalue(found.numel() - (k - above) + 1).values
    return flat.abs().kthvalue(N - k + 1).values


def _bracket(values: Tensor, share: float) -> tuple[np.generic, np.generic]:
    """Two magnitudes between which the largest ``share`` of the entries ends, but for rare cases."""
    step = max(1, values.shape[-1] // SAMPLE_COLUMNS)
    sample = values[..., ::step].abs().flatten().numpy()
    count = sample.size
    # Three times the margin of independent draws: the entries of a column are not independent.
    margin = 12.0 * (count * share * (1.0 - share)) ** 0.5 + 12.0
    upper = count - min(max(int(share * count - margin), 0), count)
    lower = count - min(max(int(share * count + margin) + 1, 0), count)
    sample.partition(sorted({min(upper, count - 1), lower}))
    high = sample[upper] if upper < count else sample.dtype.type(np.inf)
    return sample[lower] if lower > 0 else sample.dtype.type(0.0), high
