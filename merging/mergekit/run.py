"""Run a checked mergekit configuration: shard by shard, block by block, into a result directory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merging import __version__
from merging.dense.runner import ShardResult
from merging.errors import MergeFailure
from merging.execute import in_order
from merging.formats.checkpoint_out import ShardWriter
from merging.formats.guard import ITEM_BYTES
from merging.formats.tensor_set import TensorSet
from merging.formats.tensors import TORCH_NAMES
from merging.formats.writer import TensorSpec
from merging.mergekit.arithmetic import Work, merge
from merging.mergekit.plan import MergekitPlan, Shard
from merging.mergekit.schedule import Input, Output

Tick = Callable[[str], None]


class StoredRows:
    """A stored tensor, flat, read with positioned reads. For one thread.

    The last range stays in its buffer, so that several users of one block read it once.
    """

    def __init__(self, source: TensorSet, name: str) -> None:
        info = source.infos[name]
        self.size = math.prod(info.shape)
        self._source, self._name = source, name
        self._dtype: torch.dtype = getattr(torch, TORCH_NAMES[info.dtype])
        self._buffer = torch.empty(0, dtype=self._dtype)
        self._span = (0, 0)

    def read(self, start: int, stop: int) -> Tensor:
        """Entries in their stored dtype; valid until the next call."""
        if self._span != (start, stop):
            if self._buffer.numel() < stop - start:
                self._buffer = torch.empty(stop - start, dtype=self._dtype)
            view = self._buffer[: stop - start].view(torch.uint8).numpy().data.cast("B")
            self._source.read_into(self._name, view, start * self._dtype.itemsize)
            self._span = (start, stop)
        return self._buffer[: stop - start]


def header_metadata(plan: MergekitPlan) -> dict[str, str]:
    """What the header of every written file says."""
    return {
        "format": "pt",
        "merganser.method": plan.config.method.name,
        "merganser.recipe_digest": plan.digest,
        "merganser.version": __version__,
    }


def merge_shard(
    plan: MergekitPlan,
    shard: Shard,
    folder: Path,
    *,
    threads: int = 1,
    tick: Tick = lambda phase: None,
) -> ShardResult:
    """Write one shard into ``folder``; it appears whole or not at all."""
    part = folder / f"{shard.file}.part"
    part.unlink(missing_ok=True)
    specs = [TensorSpec(output.name, output.out_dtype, output.shape) for output in shard.outputs]
    with ShardWriter(part, specs, header_metadata(plan)) as writer:
        for _ in in_order(lambda output: _write(plan, output, writer), shard.outputs, threads):
            tick("merge")
        digest = writer.finish()
    nbytes = part.stat().st_size
    part.rename(folder / shard.file)
    return ShardResult(shard.index, shard.file, digest, nbytes, (), ())


def _write(plan: MergekitPlan, output: Output, writer: ShardWriter) -> None:
    dtype: torch.dtype = getattr(torch, TORCH_NAMES[output.out_dtype])
    keys = tuple(plan.digest_of(item.model) for item in output.inputs)
    work = Work(output, plan.config.method, plan.config.seed, keys)

    def emit(start: int, block: Tensor) -> None:
        found = block.to(dtype)
        if found.is_floating_point():
            _check(found, block, output, plan)
        data = found.contiguous().view(torch.uint8).numpy().data.cast("B")
        writer.write(output.name, start * ITEM_BYTES[output.out_dtype], data)

    merge(work, [StoredRows(plan.models[item.model], item.tensor) for item in output.inputs], emit)


def _check(found: Tensor, block: Tensor, output: Output, plan: MergekitPlan) -> None:
    """Raises ``result_overflow``, ``non_finite_tensor`` or ``result_not_finite``."""
    if all(math.isfinite(float(value)) for value in found.aminmax()):
        return
    if all(math.isfinite(float(value)) for value in block.aminmax()):
        raise MergeFailure(
            "result_overflow",
            f"tensor {output.name} has values beyond the range of {output.out_dtype}",
            remedy="Set out_dtype to bfloat16 or float32.",
            where={"tensor": output.name},
        )
    _find_not_finite(output.inputs, plan)
    raise MergeFailure(
        "result_not_finite", f"tensor {output.name} is not finite", where={"tensor": output.name}
    )


def _find_not_finite(inputs: Sequence[Input], plan: MergekitPlan) -> None:
    for item in inputs:
        rows = StoredRows(plan.models[item.model], item.tensor)
        for start in range(0, rows.size, 1 << 20):
            part: Any = rows.read(start, min(rows.size, start + (1 << 20)))
            if not bool(torch.isfinite(part).all()):
                raise MergeFailure(
                    "non_finite_tensor",
                    f"{item.model}: tensor {item.tensor} holds NaN or infinite values",
                    remedy="The file is damaged or its training diverged; export it again.",
                    where={"model": item.model, "tensor": item.tensor},
                )
