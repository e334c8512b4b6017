"""Accuracy of merged adapters on real tasks, by the offline quality suite.

Merges the adapter sets of the suite with every method of the catalogue through the engine, and scores the
results on the test split: with the default ``lambda``, and with the norm that is best on the validation
split. A score is the mean over tasks of the accuracy over that of the task's own adapter. Scores are kept in
the scratch folder, so that a run can be continued.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.suite import Deltas, Hits, Suite
from benchmarks.variants import Variant, variants

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Score:
    """One variant on one set. Norms are in units of the mean norm of the adapters."""

    lambda_: float
    ratio: float
    rank: int
    hits: Hits
    tuned_ratio: float
    tuned_hits: Hits
    scan: dict[float, float]


def merged(variant: Variant, suite: Suite, scratch: Path) -> tuple[Path, dict[str, Any]]:
    """The result directory of a variant (made anew) and its report."""
    from merging import engine

    models = [{"model": str(path)} for path in suite.adapters.values()]
    out = scratch / "merged" / suite.name / variant.name.replace(", ", "-").replace(" ", "_")
    recipe = {**variant.recipe(), "models": models}
    result = engine.merge(recipe, out, device="cpu", threads=1, overwrite=True)
    return out, result.report


def score(variant: Variant, suite: Suite, scratch: Path) -> Score:
    """Merge, score with the default scale, and with the scale that is best on the validation split."""
    out, report = merged(variant, suite, scratch)
    summary = report["summary"]
    deltas = suite.load(out)
    ratio = float(summary["norm_ratio"])

    def scaled(target: float) -> Deltas:
        return {name: delta * (target / ratio) for name, delta in deltas.items()}

    scan: dict[float, float] = {}
    tuned_ratio = ratio
    if variant.multiples:
        scan[ratio] = suite.score(suite.hits(deltas, "val"), "val")
        for target in variant.multiples:
            if abs(target - ratio) > 1e-2 * ratio:
                scan[target] = suite.score(suite.hits(scaled(target), "val"), "val")
        tuned_ratio = max(scan, key=lambda target: scan[target])
    hits = suite.hits(deltas, "test")
    tuned = hits if tuned_ratio == ratio else suite.hits(scaled(tuned_ratio), "test")
    return Score(float(summary["lambda"]), ratio, int(summary["max_rank"]), hits, tuned_ratio, tuned, scan)


def score_parts(variant: Variant, suite: Suite, scratch: Path) -> Score:
    """A multi-output method: every task is scored with the adapter that is recovered for it."""
    out, _ = merged(variant, suite, scratch)
    hits: Hits = {}
    for task, folder in zip(suite.tasks, _part_folders(out, suite), strict=True):
        hits |= suite.hits(suite.load(folder), "test", [task])
    return Score(1.0, float("nan"), 0, hits, float("nan"), hits, {})


def _part_folders(out: Path, suite: Suite) -> list[Path]:
    """The folder of each task, found by the model that the part's own report names."""
    by_model = {}
    for path in sorted(out.iterdir()):
        if (path / "report.json").exists():
            [entry] = json.loads((path / "report.json").read_text())["inputs"]
            by_model[entry["model"]] = path
    return [by_model[str(suite.adapters[task])] for task in suite.tasks]


def table(found: dict[str, dict[str, Score]], suites: dict[str, Suite], reference: str) -> str:
    """The table for people: per set the score at defaults and tuned, and the difference to ``reference``."""
    head = ["method"]
    for name in suites:
        head += [f"{name}: default", "norm", f"to {reference}", "tuned", "norm"]
    lines = [_row(head), _row(["---"] * len(head))]
    for method, scores in found.items():
        cells = [method]
        for name, suite in suites.items():
            cells += _cells(scores.get(name), found.get(reference, {}).get(name), suite)
        lines.append(_row(cells))
    return "\n".join(lines)


def _cells(one: Score | None, reference: Score | None, suite: Suite) -> list[str]:
    if one is None:
        return [""] * 5
    default, tuned = suite.score(one.hits, "test"), suite.score(one.tuned_hits, "test")
    difference = ""
    if reference is not None and reference is not one:
        gap = default - suite.score(reference.hits, "test")
        difference = f"{gap:+.3f} ± {suite.interval(one.hits, reference.hits):.3f}"
    first = [f"{default:.3f} ± {suite.interval(one.hits):.3f}", _norm(one.ratio), difference]
    return [*first, f"{tuned:.3f}", _norm(one.tuned_ratio)] if one.scan else [*first, "", ""]


def _norm(ratio: float) -> str:
    return "" if np.isnan(ratio) else f"{ratio:.2f}"


def alone(suite: Suite) -> str:
    """The score of the base model without any adapter."""
    hits = suite.hits({}, "test")
    return f"{suite.score(hits, 'test'):.3f} ± {suite.interval(hits):.3f}"


def per_task(found: dict[str, dict[str, Score]], suite: Suite) -> str:
    """Accuracy per task at defaults."""
    lines = [_row(["method", *suite.tasks]), _row(["---"] * (1 + len(suite.tasks)))]
    single = [f"{suite.single[task]['test']:.3f}" for task in suite.tasks]
    lines.append(_row(["each task's own adapter", *single]))
    for method, scores in found.items():
        if suite.name in scores:
            hits = scores[suite.name].hits
            lines.append(_row([method, *(f"{hits[task].mean():.3f}" for task in suite.tasks)]))
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def run(chosen: list[Variant], suites: dict[str, Suite], scratch: Path) -> dict[str, dict[str, Score]]:
    """Scores by variant and set. A variant that fails is reported and left out."""
    from merging import catalog
    from merging.errors import MergeError

    found: dict[str, dict[str, Score]] = {}
    for variant in chosen:
        parts = catalog.get(variant.method).contract.multi_output
        scorer: Callable[[Variant, Suite, Path], Score] = score_parts if parts else score
        for name, suite in suites.items():
            try:
                one = scorer(variant, suite, scratch)
            except MergeError as error:
                print(f"{name} {variant.name}: {error}", file=sys.stderr)
                continue
            found.setdefault(variant.name, {})[name] = one
            scan = " ".join(f"{key:.2f}:{value:.3f}" for key, value in sorted(one.scan.items()))
            text = f"{suite.score(one.hits, 'test'):.3f} at {one.ratio:.2f}"
            text += f", {suite.score(one.tuned_hits, 'test'):.3f} at {one.tuned_ratio:.2f}"
            print(f"{name:5} {variant.name}: {text} | val {scan}", file=sys.stderr, flush=True)
    return found


def data(found: dict[str, dict[str, Score]], suites: dict[str, Suite]) -> dict[str, Any]:
    """The table as data, with the validation scores and the accuracy per task."""
    return {
        method: {
            name: {
                "lambda": one.lambda_,
                "norm": one.ratio,
                "rank": one.rank,
                "default": suites[name].score(one.hits, "test"),
                "interval": suites[name].interval(one.hits),
                "tuned_norm": one.tuned_ratio,
                "tuned": suites[name].score(one.tuned_hits, "test"),
                "validation": {f"{key:.3f}": value for key, value in sorted(one.scan.items())},
                "accuracy": {task: float(hits.mean()) for task, hits in one.hits.items()},
            }
            for name, one in scores.items()
        }
        for method, scores in found.items()
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--suite", type=Path, default=ROOT.parent / "shared" / "quality")
    parser.add_argument("--sets", default="r16,r16b")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "merganser-quality")
    parser.add_argument("--limit", type=int, default=0, help="test texts per task; 0: all 500")
    parser.add_argument("--val", type=int, default=150, help="validation texts per task; 0: all 300")
    parser.add_argument("--no-scan", action="store_true", help="score the defaults only")
    parser.add_argument("--float32", action="store_true", help="score in float32 rather than bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", help="names of variants or methods, separated by semicolons")
    parser.add_argument("--reference", default="ties", help="the variant that others are compared with")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    suites = {
        name: Suite(
            options.suite.resolve(),
            name,
            options.scratch,
            limit=options.limit,
            val=options.val,
            bf16=not options.float32,
        )
        for name in options.sets.split(",")
    }
    found = run(_chosen(options), suites, options.scratch)
    text = "\n".join(f"Base model alone, {name}: {alone(suite)}" for name, suite in suites.items())
    text += f"\n\n{table(found, suites, options.reference)}"
    for name, suite in suites.items():
        text += f"\n\nAccuracy per task, {name}, defaults:\n\n{per_task(found, suite)}"
    print(text)
    (options.scratch / "quality.md").write_text(text + "\n")
    (options.scratch / "quality.json").write_text(json.dumps(data(found, suites), indent=1) + "\n")
    return 0


def _chosen(options: argparse.Namespace) -> list[Variant]:
    wanted = options.only.split(";") if options.only else None
    return [
        variant.without_scan() if options.no_scan else variant
        for variant in variants()
        if wanted is None or variant.name in wanted
    ]


if __name__ == "__main__":
    raise SystemExit(main())
