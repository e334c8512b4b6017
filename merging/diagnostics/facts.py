"""All measurements of a batch in one place, and the cut into modules."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TypeVar

from torch import Tensor

from merging.diagnostics.against import Against, AlignmentRule, relate_merged
from merging.diagnostics.entries import Conflicts, conflicts, draw_grid
from merging.diagnostics.inputs import Inputs, Joined, relate_inputs
from merging.lowrank import ThinSVD, joint_frame
from merging.updates import LowRank, UpdateStack

Part = TypeVar("Part", Inputs, Conflicts, Against)

SAMPLE = 128
"""Rows of the sampled grid in a merge; it has half as many columns."""


@dataclass(frozen=True)
class Facts:
    """What was measured of one module: its inputs, the sampled entries, the merged update against the inputs.

    The tensors are those of the parts, on the CPU, without the leading dimension ``G``. ``merged`` is
    ``None`` where only the inputs were measured.
    """

    inputs: Inputs
    entries: Conflicts
    merged: Against | None
    sampled: int


def measure(
    stack: UpdateStack,
    update: LowRank | None,
    *,
    svd: ThinSVD | None = None,
    weights: Tensor | None = None,
    seed: int = 0,
    sample: int = SAMPLE,
    rule: AlignmentRule = "paper",
) -> list[Facts]:
    """Measure a batch and its merged ``update``, if any; one entry per module, in the order of the stack.

    Works on the joint frame that the stack keeps, so a merge that used it has paid for most of this.
    The ``svd`` of the update, or ``weights (T,)`` that make it exactly a sum of the inputs, make it cheaper.
    ``sample`` is the number of rows at which entries are looked at, with half as many columns.
    """
    grid = draw_grid(stack, seed=seed, sample=sample)
    joined = Joined.of(joint_frame(stack).cores)
    inputs = _to_cpu(relate_inputs(stack, joined))
    entries = _to_cpu(conflicts(grid))
    merged = None
    if update is not None:
        merged = _to_cpu(relate_merged(stack, update, grid, joined, svd=svd, weights=weights, rule=rule))
    sampled = grid.rows.shape[-1] * grid.columns.shape[-1]
    return [
        Facts(_at(inputs, g), _at(entries, g), None if merged is None else _at(merged, g), sampled)
        for g in range(stack.G)
    ]


def _to_cpu(part: Part) -> Part:
    return type(part)(**{field.name: getattr(part, field.name).cpu() for field in fields(part)})


def _at(part: Part, g: int) -> Part:
    # A clone: a view would keep the whole batch in memory.
    return type(part)(**{field.name: getattr(part, field.name)[g].clone() for field in fields(part)})
