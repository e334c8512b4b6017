"""Diagnostics of a dense merge, gathered while the blocks of its tensors pass by.

Cosines and the change of a layer's outputs are measured on a sample of rows, signs on a sample of the entries
of these rows, drawn as for adapters (:mod:`merging.diagnostics.entries`): a merge of whole models reads and
writes most of its time, and even inner products of every pair would show. Spectra and overlaps of subspaces
would take an SVD of every task vector, more than most merges cost, and are left out.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from merging.diagnostics.entries import conflicts_of, draw
from merging.diagnostics.facts import SAMPLE
from merging.diagnostics.telling import MATRIX_MODELS, cosine, imbalance, matrix, number
from merging.diagnostics.whole import Mean
from merging.rules import task_generator


class Watch:
    """Sees the blocks of one ``m x n`` tensor; ``factor`` is ``lambda``."""

    def __init__(self, name: str, shape: tuple[int, int], T: int, *, seed: int, factor: float) -> None:
        generator = task_generator(seed, "diagnostics", name)
        rows, columns = draw(*shape, SAMPLE, [generator])
        self._rows, self._columns = rows[0].tolist(), columns[0]
        self._factor = factor
        self._gram = torch.zeros(T, T, dtype=torch.float64) if T <= MATRIX_MODELS else None
        self._gaps = torch.zeros(T, dtype=torch.float64)
        self._entries: list[Tensor] = []

    def see(self, start: int, update: Tensor, x: Tensor) -> None:
        """Rows from ``start`` on: the unscaled merged update ``(rows, n)`` and the tasks ``(T, rows, n)``."""
        low, high = (bisect_left(self._rows, row) for row in (start, start + x.shape[1]))
        if low == high:
            return
        places = torch.tensor(self._rows[low:high]) - start
        rows = x[:, places]
        lengths = torch.linalg.vector_norm(update[places] * self._factor - rows, dim=-1)
        self._gaps += lengths.double().sum(-1)
        if self._gram is not None:
            flat = rows.flatten(1)
            self._gram += (flat @ flat.mT).double()
        self._entries.append(rows[..., self._columns])

    def found(self) -> dict[str, Any]:
        """Plain data of the tensor, for :func:`module_data` and :func:`whole_data`."""
        entries = torch.cat(self._entries, 1).flatten(1)
        signs = conflicts_of(entries.unsqueeze(0))
        few = self._gram is not None
        return {
            "gram": self._gram.tolist() if self._gram is not None else None,
            "pairs": signs.pairs[0].tolist() if few else None,
            "conflict": float(signs.conflict),
            "of_sum": float(signs.of_sum),
            "of_parts": float(signs.of_parts),
            "sampled": entries.shape[-1],
            "l1_gap": (self._gaps * math.sqrt(2.0 / math.pi) / len(self._rows)).tolist(),
        }


def module_data(tensor: dict[str, Any]) -> dict[str, Any] | None:
    """The diagnostics of one tensor; ``None`` if a shard was made by a version that told none."""
    found = tensor.get("diagnostics")
    if found is None:
        return None
    return {
        "cosine": _cosine(found["gram"]),
        "norm_imbalance": imbalance(torch.diag(torch.tensor(tensor["inputs2"], dtype=torch.float64))),
        "sign_conflict": number(found["conflict"]),
        "cancellation": _cancellation(found["of_sum"], found["of_parts"]),
        "sampled_entries": found["sampled"],
    }


def gaps(tensor: dict[str, Any]) -> list[float | None]:
    """The L1 gap of every input of one tensor."""
    found = tensor.get("diagnostics")
    return [None] * len(tensor["tasks"]) if found is None else [number(gap) for gap in found["l1_gap"]]


def whole_data(tensors: Sequence[dict[str, Any]], models: int) -> tuple[dict[str, Any], list[float | None]]:
    """The diagnostics of all tensors together, and the L1 gap of every model.

    They are combined as those of adapters are (:mod:`merging.diagnostics.whole`).
    """
    gram = torch.zeros(models, models, dtype=torch.float64)
    pairs, gaps = Mean(models, models), Mean(models)
    conflict, of_sum, of_parts = Mean(), Mean(), Mean()
    squares = torch.zeros(models, dtype=torch.float64)
    few, sampled = True, 0
    for tensor in tensors:
        found = tensor.get("diagnostics")
        if found is None:
            continue
        index = torch.tensor(tensor["tasks"])
        place = (index.unsqueeze(1), index)
        size = float(tensor["m"] * tensor["n"])
        squares[index] += _tensor(tensor["inputs2"])
        gaps.add(_tensor(found["l1_gap"]), float(tensor["m"]), index)
        conflict.add(_tensor(found["conflict"]), size)
        of_sum.add(_tensor(found["of_sum"]), size)
        of_parts.add(_tensor(found["of_parts"]), size)
        sampled += found["sampled"]
        if found["gram"] is None:
            few = False
            continue
        gram[place] += _tensor(found["gram"])
        pairs.add(_tensor(found["pairs"]), size, place)
    summary = {
        "cosine": matrix(cosine(gram)) if few else None,
        "norm_imbalance": imbalance(torch.diag(squares)),
        "sign_conflict": number(conflict.value()),
        "sign_conflict_pairs": matrix(pairs.value()) if few else None,
        "cancellation": _cancellation(float(of_sum.value()), float(of_parts.value())),
        "sampled_entries": sampled,
    }
    return summary, [number(value) for value in gaps.value().tolist()]


def _tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _cosine(gram: list[list[float]] | None) -> list[list[float | None]] | None:
    return None if gram is None else matrix(cosine(_tensor(gram)))


def _cancellation(of_sum: float, of_parts: float) -> float | None:
    return number(1.0 - of_sum / of_parts) if of_parts > 0.0 else None
