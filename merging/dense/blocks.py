"""Merge one tensor: in one pass of row blocks where the method is linear, through its kernel otherwise.

Blocks have a fixed size (they fit into a CPU cache), whatever the memory or the number of threads, so that
the same numbers are added in the same order: the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merging.catalog.linear import SlerpParams
from merging.dense import spectral
from merging.dense.jobs import Input, TensorJob
from merging.dense.plan import DensePlan
from merging.dense.stack import DenseStack, HeldRows, Rows, StoredRows, adapter_rows
from merging.dense.watch import Watch
from merging.errors import InputError, MergeFailure
from merging.formats.adapter import Adapter
from merging.formats.tensor_set import TensorSet
from merging.formats.tensors import TORCH_NAMES
from merging.kernels import Context, row_blocks
from merging.methods.linear import task_weights
from merging.methods.slerp import COLLINEAR, MERGEKIT_COLLINEAR, arc

STREAM_BUDGET = 6 << 21
"""For :func:`row_blocks`: blocks of 2 MB, which the passes of a linear merge find in the cache."""

Emit = Callable[[int, Tensor], None]
"""Takes the finished rows ``(rows, n)`` from a row on, in the dtype of the computation."""


@dataclass
class Measured:
    """What one merged tensor tells the report: squared norms and inner products, per task and in whole.

    All are of the unscaled merged update. ``discarded`` is the squared norm given up by a truncation;
    ``diagnostics`` is what a :class:`~merging.dense.watch.Watch` found.
    """

    name: str
    m: int
    n: int
    tasks: tuple[int, ...]
    norm2: float = 0.0
    inputs2: tuple[float, ...] = ()
    inner: tuple[float, ...] = ()
    discarded: float = 0.0
    rank: int | None = None
    diagnostics: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "tasks": list(self.tasks),
            "inputs2": list(self.inputs2),
            "inner": list(self.inner),
        }


def open_stack(plan: DensePlan, job: TensorJob, scales: Sequence[float] = ()) -> DenseStack:
    """The task vectors of a tensor; only the factors of adapters are read now."""
    dtype = torch.float64 if job.wide else torch.float32
    n = job.matrix[1]
    base: Rows | None = None
    if plan.base is not None and job.in_base:
        base = StoredRows(plan.base, job.name, n)
    return DenseStack(
        job.name,
        job.matrix,
        job.tasks,
        [_rows(plan, entry, n, dtype) for entry in job.inputs],
        [entry.kind == "full" for entry in job.inputs],
        base,
        dtype,
        [scales[task] for task in job.tasks] if scales else (),
    )


def _rows(plan: DensePlan, entry: Input, n: int, dtype: torch.dtype) -> Rows:
    model = plan.models[entry.model]
    if isinstance(model, Adapter):
        if entry.kind == "full":
            return HeldRows(model.full_tensor(entry.key).reshape(-1, n))
        return adapter_rows(model, entry.key, dtype)
    return StoredRows(model, entry.key, n)


@dataclass(frozen=True)
class Blocks:
    """The merged update of one tensor, block by block, with the task vectors of the block.

    Yields ``(start, update (rows, n), tasks (T, rows, n))``; both tensors may be written to and are valid
    until the next block. ``discarded`` is the squared norm that a truncation gave up.
    """

    stack: DenseStack
    blocks: Iterator[tuple[int, Tensor, Tensor]]
    discarded: float = 0.0


def merged_blocks(stack: DenseStack, kernel: Any, method: str, ctx: Context, *, vector: bool) -> Blocks:
    """Merge a tensor by ``method``; ``vector`` says that it is no matrix.

    Linear methods stream: one pass, nothing of the size of the tensor. Entry-wise methods hold the merged
    matrix. Spectral ones hold the task vectors too, and give vectors the mean of the weighted updates.
    """
    # DenseStack has what these functions use of an UpdateStack
    some: Any = stack
    if method == "linear":
        return Blocks(stack, _combined(stack, task_weights(some, ctx).tolist(), ctx))
    if method == "slerp":
        return Blocks(stack, _combined(stack, _arc(stack, ctx), ctx))
    if method in spectral.METHODS:
        if vector:
            weights = task_weights(some, ctx) if method == "svd" else ctx.weights(stack) / stack.T
            return Blocks(stack, _combined(stack, weights.tolist(), ctx))
        update, discarded = spectral.merge(stack, kernel, method, ctx)
        return Blocks(stack, _replayed(stack, update, ctx), discarded)
    dense = kernel.merge(some, ctx).update.dense()[0]
    return Blocks(stack, _replayed(stack, dense, ctx))


def _combined(
    stack: DenseStack, coefficients: Sequence[float], ctx: Context
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """``sum_t c_t x_t`` in one pass."""
    total: Tensor | None = None
    for x, start in _blocks(stack, ctx):
        if total is None or total.shape != x.shape[1:]:
            total = torch.empty_like(x[0])
        torch.mul(x[0], coefficients[0], out=total)
        for entries, factor in zip(x[1:], coefficients[1:], strict=True):
            total.add_(entries, alpha=factor)
        yield start, total, x


def _replayed(stack: DenseStack, dense: Tensor, ctx: Context) -> Iterator[tuple[int, Tensor, Tensor]]:
    """A merged matrix in the blocks of the task vectors."""
    for x, start in _blocks(stack, ctx):
        yield start, dense[start : start + x.shape[1]], x


def _blocks(stack: DenseStack, ctx: Context) -> Iterator[tuple[Tensor, int]]:
    buffer: Tensor | None = None
    for start, stop in row_blocks(stack, STREAM_BUDGET):
        if buffer is not None and buffer.shape[-2] != stop - start:
            buffer = None
        buffer = stack.rows(start, stop, buffer)
        yield buffer[0], start


def _arc(stack: DenseStack, ctx: Context) -> list[float]:
    """The coefficients of slerp, weights included, from one pass over the tensor."""
    params = ctx.params
    assert isinstance(params, SlerpParams)
    weights = ctx.weights(stack)
    line = torch.tensor([1.0 - params.t, params.t], dtype=torch.float64)
    if stack.T == 1:
        return [float(line[stack.tasks[0]] * weights[0])]
    products = torch.zeros(3, dtype=torch.float64)
    for x, _ in _blocks(stack, ctx):
        first, second = x.flatten(1).double()
        products += torch.stack([first @ first, second @ second, first @ second])
    size = float((products[0] * products[1]).sqrt())
    cosine = float(products[2] * weights.sign().prod()) / size if size * float(weights.prod()) else 2.0
    limit = MERGEKIT_COLLINEAR if params.compat == "mergekit" else COLLINEAR
    clamped = torch.tensor([max(-1.0, min(1.0, cosine)) if cosine <= 1.5 else 2.0], dtype=torch.float64)
    found: list[float] = (arc(clamped, params.t, line, limit)[0] * weights).tolist()
    return found


def squares(stack: DenseStack, ctx: Context) -> tuple[float, ...]:
    """The squared norm of every task vector."""
    found = [0.0] * stack.T
    for x, _ in _blocks(stack, ctx):
        for t, task in enumerate(x.flatten(1)):
            found[t] += float(torch.dot(task, task))
    return tuple(found)


def measured(job: TensorJob, found: Blocks, emit: Emit | None, watch: Watch | None = None) -> Measured:
    """Run through the blocks, hand each to ``emit`` and measure it against the task vectors.

    ``watch`` sees them before. Raises ``non_finite_tensor`` where a task vector is not finite.
    """
    m, n = job.matrix
    T = len(job.tasks)
    norm2, inputs2, inner = 0.0, [0.0] * T, [0.0] * T
    for start, update, x in found.blocks:
        flat = update.reshape(-1)
        norm2 += float(torch.dot(flat, flat))
        for t in range(T):
            task = x[t].view(-1)
            inputs2[t] += float(torch.dot(task, task))
            inner[t] += float(torch.dot(task, flat))
        if watch is not None:
            watch.see(start, update, x)
        if emit is not None:
            emit(start, update)
    measures = Measured(job.name, m, n, job.tasks, norm2, tuple(inputs2), tuple(inner), found.discarded)
    if watch is not None:
        measures.diagnostics = watch.found()
    return measures


def check_inputs(plan: DensePlan, job: TensorJob) -> None:
    """Raise ``non_finite_tensor`` naming the first input of a tensor that is not finite."""
    sources = [
        (model, entry.key) for entry in job.inputs if isinstance(model := plan.models[entry.model], TensorSet)
    ]
    if plan.base is not None and job.in_base:
        sources.append((plan.base, job.name))
    m, n = job.matrix
    for model, key in sources:
        rows = StoredRows(model, key, n)
        block = torch.empty(1, n, dtype=torch.float64)
        for row in range(m):
            rows.load(row, row + 1, block)
            if not math.isfinite(float(block.sum())):
                raise InputError(
                    "non_finite_tensor",
                    f"{model.label}: tensor {key} holds NaN or infinite values",
                    remedy="The file is damaged or its training diverged; export it again",
                    where={"file": model.file_of(key), "tensor": key, "model": model.label},
                )


def checked_cast(rows: Tensor, dtype: str, name: str) -> Tensor:
    """Rows in the dtype of the file. Raises ``result_not_finite`` or ``result_overflow``."""
    wanted: torch.dtype = getattr(torch, TORCH_NAMES[dtype])
    if not rows.numel():
        return rows.to(wanted)
    low, high = (float(value) for value in rows.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise MergeFailure("result_not_finite", f"tensor {name} is not finite", where={"tensor": name})
    if max(-low, high) > torch.finfo(wanted).max:
        raise MergeFailure(
            "result_overflow",
            f"tensor {name} has values beyond the range of {dtype}",
            remedy="Ask for output dtype float32 or bfloat16",
            where={"tensor": name},
        )
    return rows.to(wanted)
