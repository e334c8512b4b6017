"""Random keep-masks that depend on the inputs only, not on how the work is cut or ordered.

Each task of each module has its own stream, keyed by the recipe's seed, the content of the input and the
name of the module. Every row of a matrix starts at a fixed place of the stream. The numbers are drawn on
the CPU, so that all devices drop the same entries.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from merging.kernels import Context
from merging.rules import task_bits
from merging.updates import UpdateStack

FULL = 1 << 32


class MaskStream:
    """Bernoulli masks of a batch, ``(G, T, rows, cols)``, handed out in row order."""

    def __init__(self, stack: UpdateStack, ctx: Context, cols: int) -> None:
        self._cols = cols
        self._bits = [
            [task_bits(ctx.seed, ctx.digests[task], name) for task in stack.tasks] for name in stack.names
        ]

    def keep(self, x: Tensor, probability: Sequence[float] | Tensor) -> Tensor:
        """Ones (keep) and zeros for the next ``x.shape[-2]`` rows, in the shape, dtype and device of ``x``.

        ``probability`` of a one: a number per task, or one per entry in the shape of ``x``.
        """
        masks = torch.empty(x.shape, dtype=x.dtype)
        cuts = probability.cpu() if isinstance(probability, Tensor) else probability
        for g, row in enumerate(self._bits):
            for t, bits in enumerate(row):
                cut = cuts[g, t].double().numpy() if isinstance(cuts, Tensor) else cuts[t]
                self._fill(masks[g, t].numpy(), bits, cut)
        return masks.to(x.device)

    def _fill(self, mask: np.ndarray, bits: np.random.SFC64, probability: np.ndarray | float) -> None:
        rows, cols = mask.shape
        drawn = bits.random_raw(rows * ((cols + 1) // 2)).view(np.uint32).reshape(rows, -1)[:, :cols]
        if isinstance(probability, np.ndarray):
            np.less(drawn, probability * FULL, out=mask, casting="unsafe")
        elif probability >= 1.0:
            mask.fill(1.0)
        else:
            np.less(drawn, np.uint32(probability * FULL), out=mask, casting="unsafe")
