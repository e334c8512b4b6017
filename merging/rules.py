"""Entry-wise rules as pure functions.

Every function takes the entries of the tasks as ``x (..., T, rows, cols)`` and treats each position on its
own. Thresholds, masks and weights come in as arguments, so a rule never needs the whole tensor at once.
Functions that end in ``_`` work in place on their first argument. Comparisons are written as arithmetic on
0 and 1 in the dtype of the entries: on a CPU that is several times faster than masks of truth values.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
import torch
from torch import Tensor

SignMethod = Literal["total", "frequency", "normfrac", "normmass"]
Aggregate = Literal["mean", "sum", "max"]
Counting = Literal["floor", "inclusive", "complement"]

BINADES = 16
"""Powers of two below the largest number that short keys tell apart."""
MANY = 0.25
"""Share of rows from which on short keys are not worth trying."""
RADIX_COLUMNS = 1024
"""Rows from this length on are ordered faster by counting than by long keys."""
KEY_COLUMNS = 1536
"""Rows below this length are ordered faster by short keys, where those are exact."""


def trim(x: Tensor, threshold: Tensor) -> Tensor:
    """Zero what is smaller in magnitude than ``threshold (..., T, 1, 1)``; equal magnitudes stay."""
    return trim_(x.clone(), threshold)


def trim_(x: Tensor, threshold: Tensor) -> Tensor:
    """:func:`trim` in place."""
    return x.mul_(x.abs().ge_(threshold))


def band_(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Zero what lies outside the magnitudes ``low .. high`` (both ``(..., T, rows or 1, 1)``, both stay)."""
    x = trim_(x, low)
    return x.mul_(x.abs().le_(high))


def kept_count(entries: int, density: float, counting: Counting = "floor") -> int:
    """How many entries a density keeps: ``int(density * entries)``, at least one.

    ``inclusive`` is the counting of the TIES reference code, which keeps one more; ``complement`` is that
    of MergeLM, which rounds down the number of entries it drops.
    """
    if density >= 1.0:
        return entries
    kept = int(density * entries) + int(counting == "inclusive")
    if counting == "complement":
        kept = entries - int((1.0 - density) * entries + 1e-9)
    return min(entries, max(1, kept))


def elect(x: Tensor, method: SignMethod, zero: Tensor | float, squares: Tensor | None = None) -> Tensor:
    """The sign of each position over the tasks, ``(..., 1, rows, cols)``.

    ``total`` takes the sign of the sum, ``frequency`` the sign of the sum of signs. The other two compare
    each entry's share ``x^2 / ||x||^2`` of its own task, ``squares (..., T, 1, 1)`` being the ``||x||^2``:
    ``normfrac`` takes the sign of the largest share, ``normmass`` the sign of the sum of the signed shares.
    ``zero`` replaces a sign of zero (+1 in PEFT and mergekit, the majority sign of the tensor in the TIES
    paper's code).
    """
    total = _votes(x, method, squares)
    if isinstance(zero, float) and zero == 1.0:
        return total.ge_(0.0).mul_(2.0).sub_(1.0)
    sign = total.sign_()
    return sign.add_((sign == 0) * torch.as_tensor(zero, dtype=x.dtype, device=x.device))


def _votes(x: Tensor, method: SignMethod, squares: Tensor | None) -> Tensor:
    if method in ("total", "frequency"):
        return (x if method == "total" else x.sign()).sum(-3, keepdim=True)
    assert squares is not None
    inverse = squares.to(x).clamp_min(torch.finfo(x.dtype).tiny).reciprocal()
    if method == "normmass":
        return (x * x.abs()).mul_(inverse).sum(-3, keepdim=True)
    leader = (x * x).mul_(inverse).argmax(-3, keepdim=True)
    return x.gather(-3, leader)


def agreeing_(x: Tensor, sign: Tensor) -> Tensor:
    """The magnitudes of the entries that have the elected sign, zero elsewhere.

    A sign of zero counts as negative.
    """
    return x.mul_(_definite(sign)).clamp_min_(0.0)


def disjoint_(x: Tensor, sign: Tensor, agg: Aggregate, divisor_weights: Tensor | None = None) -> Tensor:
    """Combine the entries that agree with ``sign``, ``(..., rows, cols)``; ``x`` is used up.

    ``mean`` divides by the number of agreeing tasks, or by the sum of their ``divisor_weights (T, 1, 1)``;
    ``max`` is the largest magnitude times the sign.
    """
    definite = _definite(sign)
    kept = x.mul_(definite).clamp_min_(0.0)
    if agg == "max":
        return kept.amax(-3).mul_(sign.squeeze(-3))
    total = kept.sum(-3).mul_(definite.squeeze(-3))
    if agg == "sum":
        return total
    count = kept.sign_()
    if divisor_weights is None:
        return total.div_(count.sum(-3).clamp_min_(1.0))
    divisor = count.mul_(divisor_weights).sum(-3)
    return total.div_(divisor.masked_fill_(divisor.abs() < 1e-8, 1.0))


def disjoint(x: Tensor, sign: Tensor, agg: Aggregate, divisor_weights: Tensor | None = None) -> Tensor:
    """:func:`disjoint_` that leaves ``x`` as it is."""
    return disjoint_(x.clone(), sign, agg, divisor_weights)


def row_ranks(x: Tensor) -> Tensor:
    """The rank of each entry within its row by magnitude, 1 for the smallest, in the dtype of ``x``.

    Equal magnitudes rank in the order of their columns.
    """
    (ranks,) = by_rank(x, torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device))
    return ranks


def by_rank(x: Tensor, *tables: Tensor) -> tuple[Tensor, ...]:
    """Per table the value of each entry's rank within its row by magnitude.

    The last axis of a table is the rank, the smallest magnitude first; its other axes broadcast.
    """
    order = _row_order(x)
    return tuple(
        torch.empty(x.shape, dtype=table.dtype, device=x.device).scatter_(-1, order, table.expand(x.shape))
        for table in tables
    )


def task_generator(seed: int, digest: str, module: str) -> torch.Generator:
    """The random stream of one task in one module: independent of order, layer and worker."""
    generator = torch.Generator(device="cpu")
    generator.manual_seed(int.from_bytes(_key(seed, digest, module)[:8], "little") >> 1)
    return generator


def task_bits(seed: int, digest: str, module: str) -> np.random.SFC64:
    """The same key as a stream of 64-bit numbers, several times faster to draw from."""
    return np.random.SFC64(int.from_bytes(_key(seed, digest, module), "little"))


def _key(seed: int, digest: str, module: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{digest}\0{module}".encode()).digest()


def _definite(sign: Tensor) -> Tensor:
    """``+1`` where the sign is positive, ``-1`` elsewhere."""
    return sign.mul(2.0).sub_(1.0).sign_()


def _row_order(x: Tensor) -> Tensor:
    """Columns of each row by ascending magnitude, equal ones by column."""
    size = x.abs()
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return size.sort(dim=-1, stable=True).indices
    return _packed_order(size) if x.shape[-1] < KEY_COLUMNS else _long_order(size)


def _packed_order(size: Tensor) -> Tensor:
    """The stable order of rows of non-negative float32 numbers, by keys of 32 bits where that is exact.

    A key is the number and its column. Differences of 16-bit weights have few digits, so that what a key
    leaves out of the number is zero in nearly every row; the other rows are sorted by longer keys.
    """
    n = size.shape[-1]
    bits = size.contiguous().view(torch.int32).numpy()
    width = max(1, (n - 1).bit_length())
    top = int(bits.max(initial=0))
    least = max(0, (top >> 23) - BINADES + 1) << 23
    left = max(0, (top - least).bit_length() - (32 - width))
    kept = np.maximum(bits, least)
    kept -= least
    cut = (np.bitwise_or.reduce(kept, axis=-1) & ((1 << left) - 1)) != 0
    if least:
        cut |= ((bits != 0) & (bits <= least)).any(-1)
    if not bits.size or cut.mean() > MANY:
        return _long_order(size)
    keys = kept.view(np.uint32)
    keys >>= np.uint32(left)
    keys <<= np.uint32(width)
    keys |= np.arange(n, dtype=np.uint32)
    keys.sort(axis=-1)
    keys &= np.uint32((1 << width) - 1)
    order = torch.from_numpy(keys.view(np.int32)).long()
    if cut.any():
        rows = torch.from_numpy(cut)
        order[rows] = _long_order(size[rows])
    return order


def _long_order(size: Tensor) -> Tensor:
    """The stable order of rows of non-negative float32 numbers, whatever their digits."""
    if size.shape[-1] >= RADIX_COLUMNS:
        return _radix_order(size)
    # Distinct integer keys sort several times faster than a stable sort of floats, to the same order.
    keys = size.contiguous().view(torch.int32).long() << 32 | torch.arange(size.shape[-1])
    keys.numpy().sort(axis=-1)
    return keys.bitwise_and_(0xFFFFFFFF)


def _radix_order(size: Tensor) -> Tensor:
    """The stable order of rows of non-negative float32 numbers, by two sorts of halves of their bits.

    (numpy sorts 16-bit numbers stably by counting, in a fifth of the time of any other stable sort.)
    """
    halves = size.contiguous().view(torch.int16).numpy().view(np.uint16).reshape(*size.shape, 2)
    low, high = (np.ascontiguousarray(halves[..., i]) for i in (0, 1))
    first = torch.from_numpy(low.argsort(axis=-1, kind="stable"))
    by_low = torch.from_numpy(high.view(np.int16)).gather(-1, first)
    second = by_low.numpy().view(np.uint16).argsort(axis=-1, kind="stable")
    return first.gather(-1, torch.from_numpy(second))
