"""Run a dense plan shard by shard. A shard needs nothing of the others, so they may be made anywhere.

``settle`` makes the passes over the whole model that some recipes ask for (``lambda: auto``, thresholds over
the model, equal norms); most need none. ``merge_shard`` writes one output file and tells what it measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from merging import __version__, catalog
from merging.dense import blocks
from merging.dense.describe import IDLE_BYTES, job_bytes
from merging.dense.extract import write_extracted
from merging.dense.jobs import TensorJob
from merging.dense.plan import DensePlan, ShardPlan
from merging.dense.settled import Settled
from merging.dense.stack import DenseStack, StoredRows
from merging.dense.watch import Watch
from merging.errors import MergeFailure
from merging.execute import in_order
from merging.formats.checkpoint_out import ShardWriter
from merging.formats.guard import ITEM_BYTES
from merging.formats.task_vector import BASE_KEY, KIND, KIND_KEY
from merging.formats.writer import TensorSpec
from merging.kernels import Context

Tick = Callable[[str], None]
Result = TypeVar("Result")

_COPY_BYTES = 4 << 20


@dataclass(frozen=True)
class ShardResult:
    """A finished shard: its file name, sha256, size, what was measured, and warnings. JSON-able."""

    index: int
    file: str
    sha256: str
    nbytes: int
    tensors: tuple[dict[str, Any], ...]
    warnings: tuple[dict[str, str], ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, data: dict[str, Any]) -> ShardResult:
        """The inverse of :meth:`to_dict`."""
        return cls(**{**data, "tensors": tuple(data["tensors"]), "warnings": tuple(data["warnings"])})


def header_metadata(plan: DensePlan) -> dict[str, str]:
    """What the header of every written file says."""
    found = {
        "format": "pt",
        "merganser.method": plan.resolved.method.name,
        "merganser.recipe_digest": plan.digest,
        "merganser.version": __version__,
    }
    if plan.recipe.output.format == "delta":
        found[KIND_KEY] = KIND
        if plan.base is not None:
            found[BASE_KEY] = plan.digest_of(plan.base)
    return found


def thread_limit(plan: DensePlan, threads: int, memory_budget: int | None) -> int:
    """How many threads fit into ``memory_budget`` bytes for the whole process; at least one."""
    if memory_budget is None:
        return threads
    return max(1, min(threads, (memory_budget - IDLE_BYTES) // job_bytes(plan)))


class DenseRunner:
    """A plan ready to run. ``tick`` is told of every finished tensor and may raise to stop."""

    def __init__(self, plan: DensePlan, *, threads: int = 1, tick: Tick = lambda phase: None) -> None:
        self.plan = plan
        self.threads = threads
        self.tick = tick
        self.warnings: list[dict[str, str]] = []
        method = plan.resolved.method
        self.kernel = catalog.load_kernel(method)
        output = plan.recipe.output
        self.context = Context(
            params=plan.resolved.params,
            per_model=plan.resolved.per_model,
            digests=tuple(plan.digest_of(model) for model in plan.models),
            space="full",
            seed=plan.recipe.seed,
            rank=output.rank if method.name == "svd" and output.format != "lora" else None,
            warn=self._warn,
        )

    @property
    def passes(self) -> int:
        """How often every tensor is visited."""
        return 1 + int(self._equalizes) + self._surveys + int(self._auto)

    def settle(self) -> Settled:
        """The passes over the whole model."""
        found = Settled()
        if self._equalizes:
            found = replace(found, scales=self._scales())
        for index in range(self._surveys):
            context = replace(self.context, shared=found.shared)
            partials = self.map(partial(self._survey, index, context, found.scales), "survey")
            found = replace(found, shared=self.kernel.reduce(index, partials, context))
        params = self.plan.resolved.params
        if params.lambda_ == "auto":
            return replace(found, lambda_=self._calibrated(found))
        return replace(found, lambda_=float(params.lambda_))

    def merge_shard(self, shard: ShardPlan, folder: Path, settled: Settled) -> ShardResult:
        """Write one shard into ``folder``; it appears whole or not at all."""
        self.warnings = []  # each shard tells its own, whoever makes it and whatever came before
        part = folder / f"{shard.file}.part"
        part.unlink(missing_ok=True)
        metadata = header_metadata(self.plan)
        found: Sequence[blocks.Measured | None]
        if self.plan.recipe.output.format == "lora":
            digest, found = write_extracted(self, shard, part, settled, metadata)
        else:
            specs = [TensorSpec(job.name, self.plan.dtype(job), job.shape) for job in shard.jobs]
            with ShardWriter(part, specs, metadata) as writer:
                found = self.map(partial(self._write, writer, settled), "merge", shard.jobs)
                digest = writer.finish()
        nbytes = part.stat().st_size
        part.rename(folder / shard.file)
        tensors = tuple(one.to_dict() for one in found if one is not None)
        return ShardResult(shard.index, shard.file, digest, nbytes, tensors, tuple(self.warnings))

    def merge_tensor(
        self, job: TensorJob, settled: Settled, emit: blocks.Emit | None, stack: DenseStack | None = None
    ) -> blocks.Measured:
        """Merge one tensor, handing the unscaled update to ``emit`` block by block.

        Without ``emit`` it is one of the passes before the merge, which tell no diagnostics.
        """
        stack = stack or blocks.open_stack(self.plan, job, settled.scales)
        watch = None
        if emit is not None:
            watch = Watch(
                job.name, job.matrix, len(job.tasks), seed=self.context.seed, factor=settled.lambda_
            )
        context = replace(self.context, shared=settled.shared)
        try:
            found = blocks.merged_blocks(
                stack, self.kernel, self.plan.resolved.method.name, context, vector=len(job.shape) != 2
            )
            measured = blocks.measured(job, found, emit, watch)
        except (MergeFailure, RuntimeError):
            blocks.check_inputs(self.plan, job)  # the cause, if it is in the inputs
            raise
        if not all(math.isfinite(value) for value in (measured.norm2, *measured.inputs2, *measured.inner)):
            blocks.check_inputs(self.plan, job)
        return measured

    def _write(self, writer: ShardWriter, settled: Settled, job: TensorJob) -> blocks.Measured | None:
        dtype = self.plan.dtype(job)
        if not job.inputs:
            self._copy(writer, job, dtype)
            return None
        width = job.matrix[1] * ITEM_BYTES[dtype]
        stack = blocks.open_stack(self.plan, job, settled.scales)
        absolute = self.plan.recipe.output.format == "checkpoint"

        def emit(start: int, update: Tensor) -> None:
            if settled.lambda_ != 1.0:
                update.mul_(settled.lambda_)
            rows = update.add_(stack.base_rows(start, start + len(update))) if absolute else update
            writer.write(job.name, start * width, _bytes(blocks.checked_cast(rows, dtype, job.name)))

        return self.merge_tensor(job, settled, emit, stack)

    def _copy(self, writer: ShardWriter, job: TensorJob, dtype: str) -> None:
        """A tensor of the base as it is, or in the dtype of the output."""
        base = self.plan.base
        assert base is not None
        if dtype == job.dtype:
            size = job.numel * ITEM_BYTES[dtype]
            for start in range(0, size, _COPY_BYTES):
                piece = bytearray(min(_COPY_BYTES, size - start))
                base.read_into(job.name, memoryview(piece), start)
                writer.write(job.name, start, memoryview(piece))
            return
        m, n = job.matrix
        rows = StoredRows(base, job.name, n)
        step = max(1, _COPY_BYTES // max(1, 8 * n))
        for start in range(0, m, step):
            block = torch.empty(min(step, m - start), n, dtype=torch.float64)
            rows.load(start, start + len(block), block)
            data = _bytes(blocks.checked_cast(block, dtype, job.name))
            writer.write(job.name, start * n * ITEM_BYTES[dtype], data)

    def _survey(self, index: int, context: Context, scales: tuple[float, ...], job: TensorJob) -> Any:
        stack: Any = blocks.open_stack(self.plan, job, scales)
        return self.kernel.survey(index, stack, context)

    def _scales(self) -> tuple[float, ...]:
        """Factors that bring each model's whole update to the mean norm."""
        squares = [0.0] * len(self.plan.models)
        for tasks, found in self.map(self._squares, "norms"):
            for task, square in zip(tasks, found, strict=True):
                squares[task] += square
        norms = [math.sqrt(square) for square in squares]
        mean = sum(norms) / len(norms)
        return tuple(mean / norm if norm > 0.0 else 1.0 for norm in norms)

    def _squares(self, job: TensorJob) -> tuple[tuple[int, ...], tuple[float, ...]]:
        stack = blocks.open_stack(self.plan, job)
        return job.tasks, blocks.squares(stack, self.context)

    def _calibrated(self, settled: Settled) -> float:
        """``lambda: auto``: the norm of the merged update becomes the documented multiple of the inputs'."""
        wanted = self.plan.resolved.auto_norm
        norm2, squares = 0.0, [0.0] * len(self.plan.models)
        for one in self.map(lambda job: self.merge_tensor(job, settled, None), "norms"):
            norm2 += one.norm2
            for task, square in zip(one.tasks, one.inputs2, strict=True):
                squares[task] += square
        if wanted is None or norm2 == 0.0:
            return 1.0
        mean = sum(math.sqrt(square) for square in squares) / len(squares)
        return wanted * mean / math.sqrt(norm2)

    def map(
        self,
        function: Callable[[TensorJob], Result],
        phase: str,
        jobs: Sequence[TensorJob] | None = None,
    ) -> list[Result]:
        """Apply ``function`` to tensors (default: all that are merged), in order."""
        chosen = [job for job in self.plan.jobs if job.inputs] if jobs is None else jobs
        found = []
        for _, result in in_order(function, chosen, self.threads):
            found.append(result)
            self.tick(phase)
        return found

    @property
    def _equalizes(self) -> bool:
        return self.plan.recipe.prepare.equalize_norms

    @property
    def _surveys(self) -> int:
        count: int = self.kernel.surveys(self.context)
        return count

    @property
    def _auto(self) -> bool:
        return self.plan.resolved.params.lambda_ == "auto"

    def _warn(self, code: str, message: str) -> None:
        entry = {"code": code, "message": message}
        if entry not in self.warnings:
            self.warnings.append(entry)


def merge_shard(
    plan: DensePlan, index: int, out: Path, *, settled: Settled | None = None, threads: int = 1
) -> ShardResult:
    """Make the shard ``index`` of a plan in the folder ``out``.

    ``settled`` comes from :meth:`DenseRunner.settle`; without it this makes the passes itself, if there are
    any.
    """
    runner = DenseRunner(plan, threads=threads)
    return runner.merge_shard(plan.shards[index], out, settled or runner.settle())


def _bytes(rows: Tensor) -> memoryview:
    return rows.reshape(-1).contiguous().view(torch.uint8).numpy().data
