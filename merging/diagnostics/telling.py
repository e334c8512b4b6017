"""Measurements of a module as plain JSON data, as they stand in ``report.json``.

Numbers are rounded to ``DIGITS`` significant digits, undefined ones are ``None``. ``factor`` is ``lambda``,
which is settled after everything has been measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from merging.diagnostics.facts import Facts
from merging.diagnostics.spectra import NORMS, figures

DIGITS = 6

MATRIX_MODELS = 16
"""With more models than this, matrices over pairs are told for the whole model only."""


@dataclass(frozen=True)
class Measured:
    """The facts of one module: ``m x n``, with the indices of the models that have it."""

    tasks: tuple[int, ...]
    m: int
    n: int
    facts: Facts

    @cached_property
    def figures(self) -> dict[str, Tensor]:
        """Figures of the spectra of the inputs, ``(T,)`` each."""
        return figures(self.facts.inputs.singular)

    @cached_property
    def merged_figures(self) -> dict[str, Tensor]:
        """Figures of the spectrum of the merged update before ``lambda``; empty without one."""
        return {} if self.facts.merged is None else figures(self.facts.merged.singular)

    def relation(self, factor: float) -> dict[str, Tensor]:
        """Alignment with and Gaussian L1 gap to every input, ``(T,)``; empty without a merged update."""
        merged = self.facts.merged
        if merged is None:
            return {}
        return {"subspace_alignment": merged.alignment, "l1_gap": merged.gap(factor)}


def module_data(module: Measured, factor: float = 1.0) -> dict[str, Any]:
    """One module: the inputs among themselves and, if there is one, the spectrum of the merged update."""
    inputs, entries, merged = module.facts.inputs, module.facts.entries, module.facts.merged
    few = len(module.tasks) <= MATRIX_MODELS
    data: dict[str, Any] = {
        "cosine": matrix(cosine(inputs.gram)) if few else None,
        "row_overlap": matrix(inputs.row_overlap) if few else None,
        "column_overlap": matrix(inputs.column_overlap) if few else None,
        "norm_imbalance": imbalance(inputs.gram),
        "sti": number(inputs.sti),
        "sti_relative": number(inputs.sti / inputs.singular.sum()),
        "whitening_min_rows": number(inputs.whitening_rows),
        "whitening_min_columns": number(inputs.whitening_columns),
        "sign_conflict": number(entries.conflict),
        "cancellation": number(1.0 - entries.of_sum / entries.of_parts),
        "sampled_entries": module.facts.sampled,
        "factor_average_error": number((inputs.average_error2 / inputs.mean2).sqrt()),
    }
    if merged is not None:
        rank = {"alignment_rank": number(merged.alignment_rank)}
        data["merged"] = rank | scaled(module.merged_figures, factor)
    return data


def inputs_data(module: Measured, factor: float = 1.0) -> list[dict[str, Any]]:
    """Each input of a module, in the order of the models that have it."""
    return rows(module.relation(factor) | module.figures)


def relation(norm: float, square: float, product: float) -> dict[str, float | None]:
    """Cosine, retention ``<M, D> / |D|^2`` and relative error ``|M - D| / |D|`` of merged M and input D."""
    if square == 0.0:
        return {"cosine": None, "retention": None, "relative_error": None}
    size = math.sqrt(square)
    error = max(norm**2 - 2.0 * product + square, 0.0)
    return {
        "cosine": product / (norm * size) if norm > 0.0 else None,
        "retention": product / square,
        "relative_error": math.sqrt(error) / size,
    }


def number(value: Tensor | float) -> float | None:
    """A JSON number of ``DIGITS`` significant digits; ``None`` if it is not finite."""
    plain = float(value)
    return float(f"{plain:.{DIGITS}g}") if math.isfinite(plain) else None


def matrix(values: Tensor) -> list[list[float | None]]:
    """Nested lists of numbers."""
    return [[number(value) for value in row] for row in values.tolist()]


def rows(columns: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """One entry per position of the columns."""
    lists = {key: [number(value) for value in column.tolist()] for key, column in columns.items()}
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def scaled(values: Mapping[str, Tensor], factor: float) -> dict[str, float | None]:
    """Figures of an update times ``factor``: only the norms change."""
    return {key: number(value * abs(factor) if key in NORMS else value) for key, value in values.items()}


def cosine(gram: Tensor) -> Tensor:
    """Cosines from inner products; NaN where an update is zero."""
    norms = gram.diagonal().clamp_min(0.0).sqrt()
    return (gram / norms.outer(norms)).clamp(-1.0, 1.0)


def imbalance(gram: Tensor) -> float | None:
    """The largest norm over the smallest; ``None`` if the smallest is zero."""
    squares = gram.diagonal().clamp_min(0.0)
    return number((squares.max() / squares.min()).sqrt())
