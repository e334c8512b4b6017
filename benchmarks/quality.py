"""Accuracy of merges of really trained adapters, method by method, on the quality suite.

Needs the suite's folder (base model, adapters, tasks and its scorer); see ``docs/benchmarks.md``. Every
method runs through the engine with the defaults of the catalogue; ``--scan`` also chooses a factor on the
merged update on the validation split and reports the test split at that factor, as papers do.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import merging
from merging import catalog
from merging.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = ("slerp", "rmm", "core_space", "knots")
"""``slerp`` takes two models, ``rmm`` keeps every task apart, the last two are names of other entries."""


def scorer(folder: Path) -> Any:
    """The suite's ``evaluate.py`` as a module."""
    spec = importlib.util.spec_from_file_location("quality_evaluate", folder / "evaluate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cases(only: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """(label, recipe without models) for every data-free single-output method."""
    found: list[tuple[str, dict[str, Any]]] = []
    for name in catalog.names():
        method = catalog.get(name)
        if name in SKIPPED or method.contract.data or (only and name not in only):
            continue
        if name in ("linear", "svd"):
            found.append((f"{name}, lambda 1", {"merge_method": name}))
            found.append((f"{name}, lambda auto", {"merge_method": name, "parameters": {"lambda": "auto"}}))
            continue
        spaces = method.contract.spaces or (None,)
        for space in spaces if name in ("ties", "dare_ties") else spaces[-1:]:
            recipe = {"merge_method": name} | ({"space": space} if space else {})
            found.append((f"{name}, {space}" if len(spaces) > 1 else name, recipe))
    return found


class Suite:
    """One adapter set of the quality suite."""

    def __init__(self, folder: Path, name: str, limit: int, bf16: bool) -> None:
        self.module = scorer(folder)
        suite = self.module.suite_tasks("public")
        self.refs = suite["sets"][name]
        self.tasks: list[str] = self.refs["tasks"]
        self.adapters = [folder / "public" / "adapters" / name / task for task in self.tasks]
        self.limit = limit
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self.weights, self.ids = self.module.load_base(None)

    def score(self, deltas: dict[str, Any], split: str) -> dict[str, np.ndarray]:
        """Hits (0 or 1) per test text of each task."""
        _, hits = self.module.evaluate(
            self.weights, self.ids, deltas, "public", self.tasks, split, self.limit, self.dtype, None, 0
        )
        return dict(hits)

    def normalised(self, hits: dict[str, np.ndarray], split: str) -> float:
        return float(np.mean([hits[t].mean() / self.refs["single"][t][split] for t in self.tasks]))

    def interval(self, hits: dict[str, np.ndarray], rounds: int = 1000) -> float:
        """Half the width of the 95 % bootstrap interval of the normalised test accuracy."""
        rng = np.random.default_rng(0)
        total = np.zeros(rounds)
        for task in self.tasks:
            h = hits[task]
            drawn = h[rng.integers(0, len(h), (rounds, len(h)))].mean(1)
            total += drawn / self.refs["single"][task]["test"] / len(self.tasks)
        low, high = np.percentile(total, [2.5, 97.5])
        return float(high - low) / 2


def run(suite: Suite, label: str, recipe: dict[str, Any], scan: list[float]) -> dict[str, Any]:
    """Merge, score, and return one row."""
    started = time.perf_counter()
    models = [{"model": str(path)} for path in suite.adapters]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        result = merging.merge(Recipe.load({**recipe, "models": models, "output": LORA}), out)
        deltas = suite.module.load_adapter(str(out))
    hits = suite.score(deltas, "test")
    row: dict[str, Any] = {
        "label": label,
        "normalised": suite.normalised(hits, "test"),
        "interval": suite.interval(hits),
        "tasks": {task: float(hits[task].mean()) for task in suite.tasks},
        "norm_ratio": result.report["summary"]["norm_ratio"],
    }
    if scan:
        tried = {
            factor: suite.normalised(suite.score({k: factor * d for k, d in deltas.items()}, "val"), "val")
            for factor in scan
        }
        best = max(tried, key=lambda factor: tried[factor])
        row["scan"] = tried
        row["best_factor"] = best
        chosen = hits if best == 1.0 else suite.score({k: best * d for k, d in deltas.items()}, "test")
        row["best_normalised"] = suite.normalised(chosen, "test")
    row["seconds"] = time.perf_counter() - started
    return row


LORA = {"dtype": "float32"}


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: one line per method, one pair of columns per set."""
    sets = list(rows)
    scanned = any("best_normalised" in row for found in rows.values() for row in found)
    head = ["method"]
    for name in sets:
        head += [f"{name}", "norm"] + ([f"{name} scanned (factor)"] if scanned else [])
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for i, row in enumerate(rows[sets[0]]):
        cells = [f"`{row['label']}`"]
        for name in sets:
            if i >= len(rows[name]):
                cells += ["", ""] + ([""] if scanned else [])
                continue
            other = rows[name][i]
            cells += [f"{other['normalised']:.3f} ± {other['interval']:.3f}", f"{other['norm_ratio']:.2f}"]
            if "best_normalised" in other:
                cells.append(f"{other['best_normalised']:.3f} ({other['best_factor']:g})")
            elif scanned:
                cells.append("")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Run the suite and print the table; the rows as JSON go to ``--out``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--suite", type=Path, default=ROOT.parent / "shared" / "quality")
    parser.add_argument("--sets", default="r16,r16b")
    parser.add_argument("--methods", default="", help="comma-separated names; default: all")
    parser.add_argument("--scan", default="", help="factors to try on the validation split, e.g. 0.7,1,1.4")
    parser.add_argument("--limit", type=int, default=0, help="use the first N texts of each split")
    parser.add_argument("--bf16", action="store_true", help="score in bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    scan = [float(x) for x in args.scan.split(",") if x]
    rows: dict[str, list[dict[str, Any]]] = {}
    for name in args.sets.split(","):
        suite = Suite(args.suite, name, args.limit, args.bf16)
        base = suite.score({}, "test")
        rows[name] = [
            {
                "label": "base, no adapter",
                "normalised": suite.normalised(base, "test"),
                "interval": suite.interval(base),
                "tasks": {task: float(base[task].mean()) for task in suite.tasks},
                "norm_ratio": 0.0,
            }
        ]
        for label, recipe in cases([x for x in args.methods.split(",") if x]):
            row = run(suite, label, recipe, scan)
            rows[name].append(row)
            print(f"{name} {label}: {row['normalised']:.3f}", file=sys.stderr, flush=True)
            if args.out is not None:
                args.out.write_text(json.dumps(rows, indent=1))
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
