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
    """Bernoulli masks of a batch, ``(G, T, rows, cols)``, handed out in row order.

    Of the rows of module ``g`` only the first ``widths[g]`` columns use up random numbers; columns that pad
    a frame are kept.
    """

    def __init__(self, stack: UpdateStack, ctx: Context, widths: Sequence[int]) -> None:
        self._widths = widths
        self._bits = [
            [task_bits(ctx.seed, ctx.digests[task], name) for task in stack.tasks] for name in stack.names
        ]

    def keep(self, x: Tensor, probability: Sequence[float] | Tensor) -> Tensor:
        """Ones (keep) and zeros for the next ``x.shape[-2]`` rows, in the shape, dtype and device of ``x``.

        ``probability`` of a one: a number per task, or one per entry in the shape of ``x``.
        """
        masks = torch.ones(x.shape, dtype=x.dtype)
        chances = probability.cpu() if isinstance(probability, Tensor) else probability
        for g, (row, width) in enumerate(zip(self._bits, self._widths, strict=True)):
            for t, bits in enumerate(row):
                mask = masks[g, t, :, :width].numpy()
                if isinstance(chances, Tensor):
                    _fill(mask, bits, chances[g, t, :, :width].double().numpy())
                else:
                    _fill(mask, bits, chances[t])
        return masks.to(x.device)


def _fill(mask: np.ndarray, bits: np.random.SFC64, probability: np.ndarray | float) -> None:
    rows, cols = mask.shape
    drawn = bits.random_raw(rows * ((cols + 1) // 2)).view(np.uint32).reshape(rows, -1)[:, :cols]
    if isinstance(probability, np.ndarray):
        np.less(drawn, probability * FULL, out=mask, casting="unsafe")
    elif probability >= 1.0:
        mask.fill(1.0)
    else:
        np.less(drawn, np.uint32(probability * FULL), out=mask, casting="unsafe")
