"""How adapters relate to each other before any merge: the diagnostics of the inputs alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from merging.diagnostics import measure
from merging.diagnostics.telling import Measured, module_data
from merging.diagnostics.whole import whole_model
from merging.execute import load_stack, single_threaded, units
from merging.planning import prepare
from merging.recipe import Recipe


def compare(paths: Sequence[str | Path]) -> dict[str, Any]:
    """Pairwise diagnostics of two or more adapters: ``summary``, ``models`` and ``modules``, as in a report.

    Matrices are in the order of ``paths``. A module that an adapter lacks counts as zero; other base models
    and fully trained tensors are no obstacle. Raises :class:`InputError` where shapes differ.
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
    device = torch.device("cpu")
    measured: dict[str, Measured] = {}
    with prepare(recipe, canonical=False) as prepared, single_threaded():
        for batch in units(prepared, device):
            found = measure(load_stack(prepared, batch, device), None)
            for name, facts in zip(batch.names, found, strict=True):
                measured[name] = Measured(batch.tasks, batch.m, batch.n, facts)
    ordered = dict(sorted(measured.items()))
    whole = whole_model(list(ordered.values()), len(paths))
    models = [{"model": str(path), **data} for path, data in zip(paths, whole.inputs, strict=True)]
    return {
        "summary": whole.summary,
        "models": models,
        "modules": {name: module_data(module) for name, module in ordered.items()},
    }
