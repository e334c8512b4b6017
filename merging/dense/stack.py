"""The task vectors of one tensor as rows that are read when they are needed.

A :class:`DenseStack` has the interface of an ``UpdateStack`` as far as entry-wise methods use it
(:class:`~merging.updates.Coordinates`), so that the same kernels serve adapters and whole models. Nothing of
the size of a tensor is held: each block of rows is read with positioned reads, upcast, and the base taken
away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from merging.formats.adapter import Adapter
from merging.formats.tensor_set import TensorSet
from merging.formats.tensors import TORCH_NAMES

PICK_NUMBERS = 1 << 19
"""Entries read at once for a sample."""

DENSE_STEP = 16
"""Where at most so many rows are skipped, a sample reads them too."""


class Rows(Protocol):
    """A matrix that gives out its rows."""

    def load(self, start: int, stop: int, out: Tensor) -> None:
        """Write the rows ``start:stop`` into ``out (rows, n)``, in its dtype."""
        ...

    def pick(self, row_step: int, col_step: int, out: Tensor) -> None:
        """Write every ``row_step``-th row and ``col_step``-th column into ``out``."""
        ...


class StoredRows:
    """The rows of a stored tensor, seen as a matrix of ``n`` columns. For one thread."""

    def __init__(self, source: TensorSet, key: str, n: int) -> None:
        self._m = math.prod(source.infos[key].shape) // n if n else 0
        self._source = source
        self._key = key
        self._n = n
        self._dtype: torch.dtype = getattr(torch, TORCH_NAMES[source.infos[key].dtype])
        self._raw = torch.empty(0, dtype=self._dtype)

    def load(self, start: int, stop: int, out: Tensor) -> None:
        out.copy_(self._read(start, stop))

    def pick(self, row_step: int, col_step: int, out: Tensor) -> None:
        # Whole runs of rows are read where few are left out: fewer calls.
        rows = max(1, PICK_NUMBERS // self._n // row_step) if row_step <= DENSE_STEP else 1
        for place in range(0, len(out), rows):
            start = place * row_step
            stop = min(self._m, start + (rows - 1) * row_step + 1)
            out[place : place + rows].copy_(self._read(start, stop)[::row_step, ::col_step])

    def _read(self, start: int, stop: int) -> Tensor:
        """The stored rows, in a buffer that the next call overwrites."""
        count = (stop - start) * self._n
        if self._raw.numel() < count:
            self._raw = torch.empty(count, dtype=self._dtype)
        raw = self._raw[:count]
        self._source.read_into(
            self._key, raw.view(torch.uint8).numpy().data, start * self._n * self._dtype.itemsize
        )
        return raw.view(stop - start, self._n)


class HeldRows:
    """The rows of a tensor in memory."""

    def __init__(self, matrix: Tensor) -> None:
        self._matrix = matrix

    def load(self, start: int, stop: int, out: Tensor) -> None:
        out.copy_(self._matrix[start:stop])

    def pick(self, row_step: int, col_step: int, out: Tensor) -> None:
        out.copy_(self._matrix[::row_step, ::col_step])


class ProductRows:
    """The rows of ``left (m, r) @ right (r, n)``, made block by block: an adapter is never written out."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self._left = left
        self._right = right

    def load(self, start: int, stop: int, out: Tensor) -> None:
        torch.matmul(self._left[start:stop], self._right, out=out)

    def pick(self, row_step: int, col_step: int, out: Tensor) -> None:
        torch.matmul(self._left[::row_step], self._right[:, ::col_step], out=out)


def adapter_rows(adapter: Adapter, name: str, dtype: torch.dtype) -> ProductRows:
    """The update of a module in the layout of the base weight."""
    module = adapter.modules[name]
    B, A = adapter.factors(name, dtype=dtype)
    if module.kind == "embedding" or module.fan_in_fan_out:
        return ProductRows(A.mT.contiguous(), B.mT.contiguous())
    return ProductRows(B, A)


class DenseStack:
    """The task vectors of one tensor of ``m`` rows and ``n`` columns, ``G = 1``.

    ``parts[t]`` are the rows of task ``tasks[t]``; where ``whole[t]``, they are those of a whole model and
    the ``base`` is taken away. ``scales`` multiply the task vectors. For one thread.
    """

    G = 1

    def __init__(
        self,
        name: str,
        shape: tuple[int, int],
        tasks: tuple[int, ...],
        parts: Sequence[Rows],
        whole: Sequence[bool],
        base: Rows | None,
        dtype: torch.dtype,
        scales: Sequence[float] = (),
    ) -> None:
        self.names = (name,)
        self.m, self.n = shape
        self.tasks = tasks
        self.like = torch.empty(0, dtype=dtype)
        self._parts = parts
        self._whole = whole
        self._base = base
        self._scales = scales
        self._held: tuple[int, int] | None = None
        self._base_rows = self.like

    @property
    def T(self) -> int:
        return len(self.tasks)

    def base_rows(self, start: int, stop: int) -> Tensor:
        """The rows of the base ``(rows, n)``; zeros without one. Valid until the next call."""
        if self._held != (start, stop):
            if self._base_rows.shape != (stop - start, self.n):
                self._base_rows = self.like.new_empty((stop - start, self.n))
            if self._base is None:
                self._base_rows.zero_()
            else:
                self._base.load(start, stop, self._base_rows)
            self._held = (start, stop)
        return self._base_rows

    def rows(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = self.like.new_empty((1, self.T, stop - start, self.n))
        for t, part in enumerate(self._parts):
            target = out[0, t]
            part.load(start, stop, target)
            if self._whole[t]:
                target.sub_(self.base_rows(start, stop))
            if self._scales:
                target.mul_(self._scales[t])
        return out

    def grid(self, row_step: int, col_step: int) -> Tensor:
        found = self.like.new_empty((1, self.T, -(-self.m // row_step), -(-self.n // col_step)))
        base = torch.empty_like(found[0, 0])
        if self._base is not None and any(self._whole):
            self._base.pick(row_step, col_step, base)
        for t, part in enumerate(self._parts):
            target = found[0, t]
            part.pick(row_step, col_step, target)
            if self._whole[t]:
                target.sub_(base)
            if self._scales:
                target.mul_(self._scales[t])
        return found

    def task(self, t: int) -> Tensor:
        whole = self.like.new_empty((1, self.m, self.n))
        self._parts[t].load(0, self.m, whole[0])
        if self._whole[t]:
            whole[0].sub_(self.base_rows(0, self.m))
        return whole.mul_(self._scales[t]) if self._scales else whole
