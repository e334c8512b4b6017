"""How adapters relate to each other before any merge, and to their plain mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from merging.diagnostics import measure
from merging.diagnostics.telling import Measured, inputs_data, module_data, relation
from merging.diagnostics.whole import whole_model
from merging.execute import load_stack, single_threaded, units
from merging.preparing import Batch, Prepared, prepare
from merging.recipe import Recipe
from merging.updates import LowRank

SAMPLE = 512
"""Rows at which entries are sampled: more than in a merge, as this is all there is to do."""


def compare(paths: Sequence[str | Path]) -> dict[str, Any]:
    """Diagnostics of two or more adapters: ``summary``, ``models`` and ``modules``, as in a report.

    Matrices are in the order of ``paths``. What a report tells of the merged update is told of the mean of
    all adapters here (``mean``, ``against_mean``). A module that an adapter lacks counts as zero; other base
    models and fully trained tensors are no obstacle. Raises :class:`InputError` where shapes differ.
    """
    recipe = Recipe.load(
        {
            "merge_method": "linear",
            "models": [{"model": str(path)} for path in paths],
            "missing_modules": "zero",
            "modules_to_save": "drop",
            "allow_base_mismatch": True,
        }
    )
    measured: dict[str, Measured] = {}
    with prepare(recipe, canonical=False) as prepared, single_threaded():
        for batch in units(prepared, torch.device("cpu")):
            measured |= _measured(prepared, batch)
    labels = [str(path) for path in paths]
    modules = {name: measured[name] for name in sorted(measured)}
    whole = whole_model(list(modules.values()), len(labels))
    return {
        "summary": _renamed(whole.summary),
        "models": _models(labels, list(modules.values()), range(len(labels)), whole.inputs),
        "modules": {
            name: {
                **_renamed(module_data(module)),
                "models": _models(labels, [module], module.tasks, inputs_data(module)),
            }
            for name, module in modules.items()
        },
    }


def _measured(prepared: Prepared, batch: Batch) -> dict[str, Measured]:
    stack = load_stack(prepared, batch, torch.device("cpu"))
    weights = torch.full((stack.T,), 1.0 / len(prepared.adapters), dtype=torch.float64)
    mean = LowRank(*stack.scaled(weights).joined())
    found = measure(stack, mean, weights=weights, sample=SAMPLE)
    return {
        name: Measured(batch.tasks, batch.m, batch.n, facts)
        for name, facts in zip(batch.names, found, strict=True)
    }


def _models(
    labels: Sequence[str], modules: Sequence[Measured], tasks: Sequence[int], data: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """An entry for each of ``tasks``: its own figures, and those against the mean, over ``modules``."""
    entries = []
    for task, own in zip(tasks, data, strict=True):
        norm2, square, product = 0.0, 0.0, 0.0
        for module in modules:
            merged = module.facts.merged
            assert merged is not None
            norm2 += float(merged.norm2)
            if task in module.tasks:
                at = module.tasks.index(task)
                square += float(module.facts.inputs.gram[at, at])
                product += float(merged.products[at])
        figures = dict(own)
        against = {key: figures.pop(key) for key in ("subspace_alignment", "l1_gap")}
        entries.append(
            {
                "model": labels[task],
                "norm": math.sqrt(square),
                **figures,
                "against_mean": {**relation(math.sqrt(norm2), square, product), **against},
            }
        )
    return entries


def _renamed(data: dict[str, Any]) -> dict[str, Any]:
    return {"mean" if key == "merged" else key: value for key, value in data.items()}
