"""Measurements of a whole model: the block-diagonal matrix of its modules.

Inner products, nuclear norms and interference add up, spectral norms take the maximum. What does not follow
from that is a mean over modules, weighted as said at each place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merging.diagnostics.spectra import NAN
from merging.diagnostics.telling import Measured, cosine, imbalance, matrix, number, rows, scaled


@dataclass(frozen=True)
class Whole:
    """The whole model: ``summary`` and one entry per model in ``inputs``."""

    summary: dict[str, Any]
    inputs: list[dict[str, Any]]


class Mean:
    """A weighted mean of arrays of one shape that skips what is undefined (not finite)."""

    def __init__(self, *shape: int) -> None:
        self._total = torch.zeros(shape, dtype=torch.float64)
        self._weight = torch.zeros(shape, dtype=torch.float64)

    def add(self, value: Tensor, weight: Tensor | float, place: Any = ...) -> None:
        """Add ``value`` at ``place`` (an index; each position at most once)."""
        defined = value.isfinite()
        self._weight[place] += defined * weight
        self._total[place] += torch.where(defined, value, 0.0) * weight

    def value(self) -> Tensor:
        """The mean; NaN where nothing was added."""
        return self._total / self._weight


def whole_model(modules: Sequence[Measured], models: int, factor: float = 1.0) -> Whole:
    """Combine the modules of ``models`` models; ``factor`` as in :mod:`~merging.diagnostics.telling`."""
    summary = _summary(modules, models)
    if merged := _merged(modules):
        summary["merged"] = scaled(merged, factor)
    return Whole(summary, rows(_inputs(modules, models, factor)))


def _summary(modules: Sequence[Measured], models: int) -> dict[str, Any]:
    """Overlaps are weighted by the norms of the pair, shares of entries by ``m n``."""
    gram = torch.zeros(models, models, dtype=torch.float64)
    row, column, pairs = Mean(models, models), Mean(models, models), Mean(models, models)
    conflict, of_sum, of_parts = Mean(), Mean(), Mean()
    for module in modules:
        inputs, entries = module.facts.inputs, module.facts.entries
        index = torch.tensor(module.tasks)
        place = (index.unsqueeze(1), index)
        gram[place] += inputs.gram
        norms = inputs.gram.diagonal().clamp_min(0.0).sqrt()
        row.add(inputs.row_overlap, norms.outer(norms), place)
        column.add(inputs.column_overlap, norms.outer(norms), place)
        size = float(module.m * module.n)
        pairs.add(entries.pairs, size, place)
        conflict.add(entries.conflict, size)
        of_sum.add(entries.of_sum, size)
        of_parts.add(entries.of_parts, size)
    inputs_of = [module.facts.inputs for module in modules]
    sti = _sum([inputs.sti for inputs in inputs_of])
    error2 = _sum([inputs.average_error2 for inputs in inputs_of])
    return {
        "cosine": matrix(cosine(gram)),
        "row_overlap": matrix(row.value()),
        "column_overlap": matrix(column.value()),
        "sign_conflict_pairs": matrix(pairs.value()),
        "norm_imbalance": imbalance(gram),
        "sti": number(sti),
        "sti_relative": number(sti / _sum([inputs.singular.sum() for inputs in inputs_of])),
        "whitening_min_rows": _least([inputs.whitening_rows for inputs in inputs_of]),
        "whitening_min_columns": _least([inputs.whitening_columns for inputs in inputs_of]),
        "sign_conflict": number(conflict.value()),
        "cancellation": number(1.0 - of_sum.value() / of_parts.value()),
        "sampled_entries": sum(module.facts.sampled for module in modules),
        "factor_average_error": number((error2 / _sum([inputs.mean2 for inputs in inputs_of])).sqrt()),
    }


def _merged(modules: Sequence[Measured]) -> dict[str, Tensor]:
    """Figures of the merged update; ranks are means weighted by energy. Empty without one."""
    means: dict[str, Mean] = {}
    for module in modules:
        if module.facts.merged is not None:
            for key, value in module.merged_figures.items():
                means.setdefault(key, Mean()).add(value, module.facts.merged.norm2)
    if not means:
        return {}
    told = [module.merged_figures for module in modules if module.merged_figures]
    return {key: mean.value() for key, mean in means.items()} | {
        "spectral_norm": torch.stack([figures["spectral_norm"] for figures in told]).max(),
        "nuclear_norm": torch.stack([figures["nuclear_norm"] for figures in told]).sum(),
    }


def _inputs(modules: Sequence[Measured], models: int, factor: float) -> dict[str, Tensor]:
    """By model: alignment is the plain mean over modules, the gap that per output feature, ranks are
    weighted by energy.
    """
    means: dict[str, Mean] = {}
    largest = torch.full((models,), NAN, dtype=torch.float64)
    total = torch.zeros(models, dtype=torch.float64)
    for module in modules:
        index = torch.tensor(module.tasks)
        energy = module.facts.inputs.gram.diagonal()
        weights = {"subspace_alignment": 1.0, "l1_gap": float(module.m)}
        for key, value in (module.relation(factor) | module.figures).items():
            means.setdefault(key, Mean(models)).add(value, weights.get(key, energy), index)
        largest[index] = largest[index].fmax(module.figures["spectral_norm"])
        total[index] += module.figures["nuclear_norm"]
    found = {key: mean.value() for key, mean in means.items()}
    return found | {"spectral_norm": largest, "nuclear_norm": total}


def _sum(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).sum() if values else torch.zeros((), dtype=torch.float64)


def _least(values: Sequence[Tensor]) -> float | None:
    return number(torch.stack(list(values)).min()) if values else None
