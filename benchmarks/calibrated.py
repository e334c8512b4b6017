"""Accuracy of methods that look at data, each beside the data-free merge it starts from.

Uses the real base model, adapters and unlabeled samples of the offline quality suite; labels are read by
the scorer only. Every comparison is paired: the same test texts under both merges, with the 95 %
bootstrap interval of the difference. Merges and scores are kept in the scratch folder, so that a run can
be continued.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.calibrated_inputs import Inputs, build
from benchmarks.suite import Hits, Suite

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Row:
    """One merge. ``start`` is the row that it is compared with; ``parts`` are the parameters of
    an ``osrm_project`` whose adapters are merged instead.
    """

    name: str
    method: str
    parameters: dict[str, Any] = field(default_factory=dict)
    start: str | None = None
    data: bool = False
    head: bool = False
    head_settings: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Any] | None = None
    more: dict[str, Any] = field(default_factory=dict)


def rows(steps: int, batch: int) -> Iterator[Row]:
    """The table: starts first."""
    yield Row("mean", "linear", {"normalize": True})
    yield Row("task arithmetic, 0.3", "linear", {"lambda": 0.3})
    yield Row("ties, core", "ties", more={"space": "core"})
    yield Row("tsv", "tsv")
    yield Row("regmean", "regmean", start="mean", data=True)
    for base, scale in (("task arithmetic, 0.3", {"lambda": 0.3}), ("ties, core", {}), ("tsv", {})):
        method = {"task arithmetic, 0.3": "linear", "ties, core": "ties"}.get(base, base)
        more = {"space": "core"} if method == "ties" else {}
        for beta in (0.3, 1.0):
            name = f"osrm_project, beta {beta:g} + {base}"
            yield Row(name, method, scale, base, parts={"beta": beta}, more=more)
    adapt = {"steps": steps, "batch_size": batch}
    yield Row("adarank cart, 0 steps", "adarank", {**adapt, "steps": 0, "origin": "cart"}, None, True, True)
    start = "task arithmetic, 0.3"
    yield Row("adarank, lr 0.001", "adarank", {**adapt, "lr": 1e-3}, start, True, True)
    yield Row("adarank, lr 0.01", "adarank", {**adapt, "lr": 1e-2}, start, True, True)
    diverse = {**adapt, "lr": 1e-2, "diversity": 1.0}
    yield Row("adarank, lr 0.01, diversity 1", "adarank", diverse, start, True, True)
    cart = {**adapt, "lr": 1e-2, "origin": "cart"}
    yield Row("adarank cart, lr 0.01", "adarank", cart, "adarank cart, 0 steps", True, True)
    yield Row(
        "adarank cart, lr 0.01, diversity 1",
        "adarank",
        {**cart, "diversity": 1.0},
        "adarank cart, 0 steps",
        True,
        True,
    )
    soft = {**adapt, "lr": 1e-2}
    yield Row("adarank, lr 0.01, head scale 10", "adarank", soft, start, True, True, {"scale": 10.0})


class Bench:
    """Merges and scores of one adapter set."""

    def __init__(self, suite: Suite, inputs: Inputs, scratch: Path, samples: int) -> None:
        self.suite = suite
        self.inputs = inputs
        self.samples = samples
        self.folder = scratch / "merged" / suite.name

    def merge(self, row: Row) -> tuple[Path, dict[str, Any]]:
        """The result directory of a row, made unless it is there, and its report."""
        out = self.folder / row.name.replace(", ", "-").replace(" ", "_")
        return self._merged(out, self._recipe(row))

    def _merged(self, out: Path, recipe: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
        from merging import engine

        told = out / "bench.json"
        if told.exists():
            return out, json.loads(told.read_text())
        begin = time.perf_counter()
        checkpoint = out.with_name(f"{out.name}.state")
        result = engine.merge(
            recipe, out, device="cpu", threads=1, overwrite=True, checkpoint=checkpoint, progress=_progress
        )
        report = {
            "seconds": round(time.perf_counter() - begin, 1),
            "norm": result.report["summary"].get("norm_ratio"),
            "warnings": result.report["warnings"],
            "calibration": result.report.get("calibration", {}),
            "tasks": sorted(result.report.get("tasks", {})),
        }
        told.write_text(json.dumps(report))
        return out, report

    def _recipe(self, row: Row) -> dict[str, Any]:
        plain = {"merge_method": row.method, "parameters": row.parameters, "output": {"dtype": "float32"}}
        if row.data:
            recipe = self.inputs.recipe(row.method, row.parameters, head=row.head)
            recipe["calibration"]["samples"] = self.samples
            if row.head:
                recipe["calibration"]["head"] = {**recipe["calibration"]["head"], **row.head_settings}
            return {**recipe, **row.more}
        adapters = [str(path) for path in self.inputs.adapters.values()]
        if row.parts is not None:
            calibration = {"samples": self.samples}
            recipe = self.inputs.recipe("osrm_project", row.parts, head=False, calibration=calibration)
            told = "-".join(f"{key}-{value}" for key, value in row.parts.items())
            out, report = self._merged(self.folder / f"osrm_project-{told}", recipe)
            adapters = [str(out / task) for task in report["tasks"]]
        return {**plain, "models": [{"model": path} for path in adapters], **row.more}

    def hits(self, row: Row) -> tuple[Hits, dict[str, Any]]:
        """Which test texts the merge gets right, and the report."""
        out, report = self.merge(row)
        return self.suite.hits(self.suite.load(out), "test"), report


def _progress(step: Any) -> None:
    if step.phase == "adapt" and step.done % 10 == 0:
        print(f"  {step.message}", file=sys.stderr, flush=True)


def told(bench: Bench, chosen: list[Row]) -> tuple[str, dict[str, Any]]:
    """The table for people, and the same as data."""
    suite = bench.suite
    hits: dict[str, Hits] = {}
    lines = [
        "| method | score | to its start | entropy | classes in use | s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    data: dict[str, Any] = {}
    for row in chosen:
        hits[row.name], report = bench.hits(row)
        found = hits[row.name]
        score = suite.score(found, "test")
        gap = ""
        entry: dict[str, Any] = {"score": score, "interval": suite.interval(found), **report}
        if row.start is not None and row.start in hits:
            entry["gap"] = score - suite.score(hits[row.start], "test")
            entry["gap_interval"] = suite.interval(found, hits[row.start])
            gap = f"{entry['gap']:+.3f} ± {entry['gap_interval']:.3f}"
        tasks = report["calibration"].get("tasks", [])
        seen = ["", ""]
        if tasks and "before" in tasks[0]:
            seen = [_change(tasks, "entropy"), _change(tasks, "classes_in_use")]
        cells = [row.name, f"{score:.3f} ± {entry['interval']:.3f}", gap, *seen, f"{report['seconds']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
        entry["accuracy"] = {task: float(right.mean()) for task, right in found.items()}
        data[row.name] = entry
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines), data


def _change(tasks: list[dict[str, Any]], key: str) -> str:
    before = sum(task["before"][key] for task in tasks) / len(tasks)
    after = sum(task["after"][key] for task in tasks) / len(tasks)
    return f"{before:.2f} to {after:.2f}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibrated", description=__doc__)
    parser.add_argument("--suite", type=Path, default=ROOT.parent / "shared" / "quality")
    parser.add_argument("--set", dest="set_", default="r16")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "merganser-calibrated")
    parser.add_argument("--limit", type=int, default=0, help="test texts per task; 0: all 500")
    parser.add_argument("--samples", type=int, default=256, help="unlabeled samples per task")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--only", help="names of rows, separated by semicolons; their starts are added")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    options.scratch.mkdir(parents=True, exist_ok=True)
    suite = Suite(options.suite.resolve(), options.set_, options.scratch, limit=options.limit)
    inputs = build(options.suite.resolve(), suite.adapters, options.scratch)
    chosen = list(rows(options.steps, options.batch))
    if options.only:
        wanted = options.only.split(";")
        starts = {row.start for row in chosen if row.name in wanted}
        chosen = [row for row in chosen if row.name in wanted or row.name in starts]
    text, data = told(Bench(suite, inputs, options.scratch, options.samples), chosen)
    print(text)
    (options.scratch / f"calibrated-{options.set_}.md").write_text(text + "\n")
    (options.scratch / f"calibrated-{options.set_}.json").write_text(json.dumps(data, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
