"""LoRA extraction: the merged update of whole matrices, cut to a rank or to a share of its energy.

Weights of linear and convolution layers become factors. Everything else (norms, biases, embeddings) has no
place in a LoRA: where it changed, the recipe's ``modules_to_save`` decides: ``error``, ``drop``, or
``average``, which keeps the merged tensor whole in the adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from merging.compress import RankRule, compress
from merging.dense import blocks
from merging.dense.jobs import TensorJob, is_embedding
from merging.dense.plan import ShardPlan
from merging.dense.stack import DenseStack
from merging.errors import InputError
from merging.formats.peft_keys import Kind
from merging.formats.writer import TensorSpec, write_safetensors
from merging.kernels import Merged
from merging.spool import Spool
from merging.updates import LowRank

if TYPE_CHECKING:
    from merging.dense.runner import DenseRunner
    from merging.dense.settled import Settled

B_TAIL, A_TAIL = ".lora_B", ".lora_A"


@dataclass(frozen=True)
class Extracted:
    """The parts of one tensor: factors ``(m, k)`` and ``(k, n)``, or the whole tensor, or nothing."""

    measured: blocks.Measured
    parts: dict[str, Tensor]


def module_kind(job: TensorJob) -> Kind | None:
    """What layer a tensor is the weight of, by its name and shape; ``None`` if no LoRA fits it."""
    if not job.name.endswith(".weight") or is_embedding(job.name):
        return None
    if len(job.shape) == 2:
        return "linear"
    return "conv2d" if len(job.shape) == 4 else None


def write_extracted(
    runner: DenseRunner, shard: ShardPlan, path: Path, settled: Settled, metadata: dict[str, str]
) -> tuple[str, list[blocks.Measured]]:
    """Extract every tensor of a shard into the file ``path``; its sha256 and what was measured."""
    specs: list[TensorSpec] = []
    found: list[blocks.Measured] = []
    with Spool(path.parent) as spool:
        for one in runner.map(lambda job: extract(runner, settled, job), "merge", shard.jobs):
            found.append(one.measured)
            for name, tensor in one.parts.items():
                specs.append(
                    TensorSpec(name, "F64" if tensor.dtype == torch.float64 else "F32", tuple(tensor.shape))
                )
                spool.put(name, tensor)
        if not specs:  # a file needs a tensor
            specs.append(TensorSpec("empty", "F32", (0,)))
            spool.put("empty", torch.empty(0))
        return write_safetensors(path, specs, (spool.get(spec.name) for spec in specs), metadata), found


def extract(runner: DenseRunner, settled: Settled, job: TensorJob) -> Extracted:
    """Merge one tensor and factor it."""
    stack = blocks.open_stack(runner.plan, job, settled.scales)
    m, n = job.matrix
    update = stack.like.new_empty((m, n))

    def emit(start: int, rows: Tensor) -> None:
        torch.mul(rows, settled.lambda_, out=update[start : start + len(rows)])

    measured = runner.merge_tensor(job, settled, emit, stack)
    kind = module_kind(job)
    if kind is None:
        return Extracted(measured, _kept(runner, job, stack, update, measured))
    output = runner.plan.recipe.output
    rule = RankRule(output.rank, output.energy, output.max_rank)
    cut = compress(
        Merged(LowRank(None, update.unsqueeze(0))), rule, seed=runner.context.seed, names=(job.name,)
    )
    rank = int(cut.ranks[0])
    B, A = cut.update.factors()
    measured.rank = rank
    measured.discarded += float(cut.discarded[0]) / (settled.lambda_**2 or 1.0)
    return Extracted(
        measured,
        {
            job.name + B_TAIL: B[0, :, :rank].to(update.dtype).contiguous(),
            job.name + A_TAIL: A[0, :rank].to(update.dtype).contiguous(),
        },
    )


def _kept(
    runner: DenseRunner, job: TensorJob, stack: DenseStack, update: Tensor, measured: blocks.Measured
) -> dict[str, Tensor]:
    choice = runner.plan.recipe.modules_to_save
    if measured.norm2 == 0.0:
        return {}
    if choice == "average" and job.in_base:
        for start in range(0, stack.m, 1024):
            stop = min(start + 1024, stack.m)
            update[start:stop].add_(stack.base_rows(start, stop))
        return {job.name: update.reshape(job.shape)}
    if choice == "drop":
        runner.context.warn(
            "full_tensors_dropped",
            f"{job.name} changed but has no place in a LoRA; it was left out, as modules_to_save: drop says",
        )
        measured.discarded = measured.norm2
        return {}
    raise InputError(
        "full_tensors_changed",
        f"{job.name} differs from the base and cannot become a LoRA",
        remedy="Set modules_to_save: average to keep such tensors whole in the adapter, or drop to leave "
        "them out",
        where={"tensor": job.name, "field": "modules_to_save"},
    )
