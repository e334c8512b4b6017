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

        ``probability`` of a one: a number per task, or one per entry in the shape of ``x``, which may be what
        :func:`limits` made of it beforehand.
        """
        masks = torch.empty(x.shape, dtype=x.dtype)
        chances = probability.cpu() if isinstance(probability, Tensor) else probability
        for g, (row, width) in enumerate(zip(self._bits, self._widths, strict=True)):
            masks[g, :, :, width:] = 1.0
            for t, bits in enumerate(row):
                mask = masks[g, t, :, :width].numpy()
                if isinstance(chances, Tensor):
                    _fill(mask, bits, _per_entry(chances[g, t, :, :width]))
                else:
                    _fill(mask, bits, chances[t])
        return masks.to(x.device)


def limits(chances: Tensor) -> Tensor:
    """The 32-bit numbers up to which a drawn one keeps its entry, as the bits of ``int32``."""
    numbers = (chances.double() * FULL).ceil().sub_(1.0).clamp_(0.0, FULL - 1.0)
    return torch.from_numpy(numbers.cpu().numpy().astype(np.uint32).view(np.int32)).to(chances.device)


def _per_entry(chances: Tensor) -> np.ndarray:
    """Limits as ``uint32``, or probabilities as multiples of one in 2 ** 32."""
    if chances.dtype == torch.int32:
        return chances.numpy().view(np.uint32)
    return chances.double().numpy() * FULL


def _fill(mask: np.ndarray, bits: np.random.SFC64, probability: np.ndarray | float) -> None:
    rows, cols = mask.shape
    drawn = bits.random_raw(rows * ((cols + 1) // 2)).view(np.uint32).reshape(rows, -1)[:, :cols]
    if isinstance(probability, np.ndarray):
        compare = np.less_equal if probability.dtype == np.uint32 else np.less
        compare(drawn, probability, out=mask, casting="unsafe")
    elif probability >= 1.0:
        mask.fill(1.0)
    else:
        np.less(drawn, np.uint32(probability * FULL), out=mask, casting="unsafe")
