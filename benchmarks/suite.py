"""The offline quality suite: its scorer, its adapter sets, and the scores found so far."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Deltas = Mapping[str, Tensor]
Hits = dict[str, np.ndarray]
BOOTSTRAP = 2000


class Suite:
    """The scorer of the suite, one adapter set of it, and a store of scores.

    ``limit`` and ``val`` bound the texts per task of the test and validation split (0: all).
    """

    def __init__(
        self, folder: Path, name: str, scratch: Path, *, limit: int = 0, val: int = 150, bf16: bool = True
    ) -> None:
        spec = importlib.util.spec_from_file_location("quality_suite", folder / "evaluate.py")
        assert spec is not None
        assert spec.loader is not None
        self.code = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.code)
        self.name = name
        self.limits = {"test": limit, "val": min(limit or val, val or limit)}
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        refs = self.code.suite_tasks("public")["sets"][name]
        self.tasks: list[str] = refs["tasks"]
        self.single: dict[str, dict[str, float]] = refs["single"]
        self.adapters = {task: folder / refs["adapters"][task] for task in self.tasks}
        self._store = scratch / "scores"
        self._store.mkdir(parents=True, exist_ok=True)
        self._base: Any = None

    def hits(self, deltas: Deltas, split: str, tasks: list[str] | None = None) -> Hits:
        """Per task, which texts of ``split`` the base model plus ``deltas`` gets right."""
        tasks = tasks or self.tasks
        limit = self.limits[split]
        which = "all" if len(tasks) == len(self.tasks) else "-".join(tasks)
        name = f"{_digest(deltas)}-{split}-{limit}-{which}-{str(self.dtype).removeprefix('torch.')}"
        path = self._store / f"{name}.npz"
        if path.exists():
            with np.load(path) as stored:
                return {task: stored[task] for task in tasks}
        if self._base is None:
            self._base = self.code.load_base()
        weights, ids = self._base
        _, hits = self.code.evaluate(
            weights, ids, dict(deltas), "public", tasks, split, limit, self.dtype, None, 0
        )
        found = {task: np.asarray(hits[task], dtype=bool) for task in tasks}
        np.savez_compressed(path, **found)  # type: ignore[arg-type]
        return found

    def score(self, hits: Hits, split: str) -> float:
        """Normalised accuracy."""
        return float(np.mean([hits[task].mean() / self.single[task][split] for task in self.tasks]))

    def load(self, folder: Path) -> Deltas:
        """The dense deltas of an adapter directory, as the scorer reads them."""
        found: dict[str, Tensor] = self.code.load_adapter(str(folder))
        return found

    def interval(self, hits: Hits, other: Hits | None = None) -> float:
        """Half of the 95 % bootstrap interval of the score, or of the paired difference to ``other``."""
        rng = np.random.default_rng(0)
        total = np.zeros(BOOTSTRAP)
        for task in self.tasks:
            values = hits[task].astype(float) - (0.0 if other is None else other[task].astype(float))
            drawn = values[rng.integers(0, len(values), (BOOTSTRAP, len(values)))].mean(1)
            total += drawn / self.single[task]["test"] / len(self.tasks)
        low, high = np.percentile(total, [2.5, 97.5])
        return float(high - low) / 2


def _digest(deltas: Deltas) -> str:
    total = hashlib.sha256()
    for name in sorted(deltas):
        total.update(name.encode())
        total.update(deltas[name].contiguous().numpy().tobytes())
    return total.hexdigest()[:24]
