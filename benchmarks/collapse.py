"""What decides whether AdaRank's entropy minimisation helps or collapses? One setting changed at a time.

Follows runs of the optimisation on the real base, adapters and unlabeled samples of the offline quality
suite, and scores the merged weights at some steps on the way, so that one run tells about all lengths.
Labels are read by the scorer only. Found figures are kept in the scratch folder: a run can be continued.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.calibrated_inputs import Inputs, build
from benchmarks.suite import Hits, Suite
from merging.calibration.adapting import Adaptation
from merging.calibration.classifier import EncoderClassifier
from merging.calibration.entropy import look
from merging.catalog.data import AdarankParams
from merging.methods.adarank import Components, decompose
from merging.preparing import Prepared, prepare
from merging.recipe import Recipe
from merging.updates import UpdateStack

ROOT = Path(__file__).resolve().parents[1]

PUBLISHED: dict[str, Any] = {"lr": 0.01}
STUDY: dict[str, dict[str, Any]] = {
    "published": {},
    "published, lr 0.001": {"lr": 0.001},
    "published, lr 0.1": {"lr": 0.1},
    "coefficients only": {"lr": 1e-9, "lambda_lr": 0.01},
    "masks only": {"learn_lambda": False},
    "masks only, lr 0.1": {"learn_lambda": False, "lr": 0.1},
    "diversity 0.5": {"diversity": 0.5},
    "diversity 1": {"diversity": 1.0},
    "diversity 2": {"diversity": 2.0},
    "diversity 1, lr 0.001": {"diversity": 1.0, "lr": 0.001},
    "diversity 1, masks only": {"diversity": 1.0, "learn_lambda": False},
    "cart": {"origin": "cart"},
    "cart, lr 0.001": {"origin": "cart", "lr": 0.001},
    "cart, diversity 1": {"origin": "cart", "diversity": 1.0},
    "cart, diversity 1, lr 0.001": {"origin": "cart", "diversity": 1.0, "lr": 0.001},
    "head scale 10": {"scale": 10.0},
    "head scale 40": {"scale": 40.0},
}
"""What differs from the published objective with ``lr: 0.01``; ``scale`` is that of the head."""


def components(prepared: Prepared, params: AdarankParams) -> list[Components]:
    """The singular components of every module, as the merge takes them."""
    found = []
    for name in sorted(prepared.table.modules):
        factors = [adapter.factors(name) for adapter in prepared.adapters]
        B, A = (tuple(pair[i].unsqueeze(0) for pair in factors) for i in range(2))
        stack = UpdateStack((name,), tuple(range(len(factors))), B, A)
        found += decompose(stack, params, [1.0] * stack.T)
    return found


class Study:
    """One adapter set; figures are kept in ``path``."""

    def __init__(self, suite: Suite, inputs: Inputs, path: Path, samples: int, batch: int) -> None:
        self.suite = suite
        self.inputs = inputs
        self.path = path
        self.samples = samples
        self.batch = batch
        self.found: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def follow(self, name: str, at: list[int]) -> None:
        """Run one setting up to the last of the steps ``at`` and score it at each of them."""
        if all(f"{name} @ {step}" in self.found for step in at):
            return
        settings = {**PUBLISHED, **STUDY[name]}
        scale = settings.pop("scale", None)
        settings |= {"steps": max(at), "batch_size": self.batch}
        recipe = self.inputs.recipe("adarank", settings, head=True)
        recipe["calibration"]["samples"] = self.samples
        if scale is not None:
            recipe["calibration"]["head"] = {**recipe["calibration"]["head"], "scale": scale}
        with prepare(Recipe.load(recipe)) as prepared:
            params = prepared.resolved.params
            assert isinstance(params, AdarankParams)
            assert prepared.inputs is not None
            cpu = torch.device("cpu")
            parts = [part.to(cpu, torch.float32) for part in components(prepared, params)]
            labels = prepared.labels
            classifier = EncoderClassifier(
                prepared.inputs, labels, parts, prepared.recipe.seed, self.batch, cpu
            )
            run = Adaptation(parts, params, classifier)
            start = self._tell(name, run, classifier, labels, None)
            for step in sorted(at):
                while run.state.step < step:
                    run.advance()
                self._tell(name, run, classifier, labels, start)

    def _tell(
        self,
        name: str,
        run: Adaptation,
        classifier: EncoderClassifier,
        labels: list[str] | tuple[str, ...],
        start: Hits | None,
    ) -> Hits:
        cores = run.cores()
        deltas = {part.name: part.U @ cores[part.name] @ part.V for part in run.components}
        hits = self.suite.hits(deltas, "test")
        looked = {Path(label).name: told for label, told in zip(labels, look(classifier, run), strict=True)}
        count = len(looked)
        entry = {
            "score": self.suite.score(hits, "test"),
            "interval": self.suite.interval(hits),
            "entropy": sum(told["entropy"] for told in looked.values()) / count,
            "classes": sum(told["classes_in_use"] for told in looked.values()) / count,
            "largest": {task: told["largest_class"] for task, told in looked.items()},
            "accuracy": {task: float(right.mean()) for task, right in hits.items()},
            "kept": sum(int((f != 0).sum()) for f in run.factors().values()),
            "lambda": float(run.state.lam.mean()),
        }
        if start is not None:
            entry["gap"] = entry["score"] - self.suite.score(start, "test")
            entry["gap_interval"] = self.suite.interval(hits, start)
        self.found[f"{name} @ {run.state.step}"] = entry
        self.path.write_text(json.dumps(self.found, indent=1) + "\n")
        print(line(f"{name} @ {run.state.step}", entry), file=sys.stderr, flush=True)
        return hits


HEAD = (
    "| setting @ step | score | to its start | entropy | classes in use | largest class | kept |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)


def line(name: str, entry: dict[str, Any]) -> str:
    """One row of the table."""
    gap = f"{entry['gap']:+.3f} ± {entry['gap_interval']:.3f}" if "gap" in entry else ""
    worst = max(entry["largest"], key=lambda task: entry["largest"][task])
    cells = [
        name,
        f"{entry['score']:.3f} ± {entry['interval']:.3f}",
        gap,
        f"{entry['entropy']:.2f}",
        f"{entry['classes']:.1f}",
        f"{entry['largest'][worst]:.0%} ({worst})",
        str(entry["kept"]),
    ]
    return "| " + " | ".join(cells) + " |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.collapse", description=__doc__)
    parser.add_argument("--suite", type=Path, default=ROOT.parent / "shared" / "quality")
    parser.add_argument("--set", dest="set_", default="r16")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "merganser-collapse")
    parser.add_argument("--limit", type=int, default=0, help="test texts per task; 0: all 500")
    parser.add_argument("--samples", type=int, default=256, help="unlabeled samples per task")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--at", default="40,100,200", help="steps at which the weights are scored")
    parser.add_argument("--only", default=";".join(STUDY), help="settings, separated by semicolons")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    options.scratch.mkdir(parents=True, exist_ok=True)
    suite = Suite(options.suite.resolve(), options.set_, options.scratch, limit=options.limit)
    inputs = build(options.suite.resolve(), suite.adapters, options.scratch)
    study = Study(
        suite, inputs, options.scratch / f"collapse-{options.set_}.json", options.samples, options.batch
    )
    for name in options.only.split(";"):
        study.follow(name, [int(step) for step in options.at.split(",")])
    print("\n".join([HEAD, *(line(name, entry) for name, entry in study.found.items())]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
