"""Multi-output merges: one adapter per task in a folder of its own, and what they share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from merging.basis_file import METADATA_KEY, describe
from merging.card import model_card
from merging.diagnostics.telling import Measured, module_data
from merging.diagnostics.whole import whole_model
from merging.execute import Runner
from merging.formats.saved import some
from merging.formats.writer import TensorSpec, write_safetensors
from merging.naming import task_names
from merging.preparing import Prepared
from merging.report import Findings, build_report
from merging.result import header_metadata, json_text, write_result, write_text
from merging.spool import Spool

ARTEFACT_NAME = "basis.safetensors"


def write_parts(
    folder: Path,
    runner: Runner,
    findings: Findings,
    spool: Spool,
    digest: str,
    tick: Callable[[str], None],
) -> tuple[dict[str, Any], dict[str, str]]:
    """Run a multi-output merge and write it; the report of the whole and the files with their digests."""
    prepared = runner.prepared
    names = task_names(prepared.labels)
    parts = [Findings(prepared, (task,)) for task in range(len(names))]
    kept: dict[str, tuple[str, ...]] = {}
    facts: dict[str, dict[str, Any]] = {}
    measured: dict[str, Measured] = {}
    for split in runner.splits(tick):
        for outcome in split.outcomes:
            task = outcome.tasks[0]
            spool.put_factors(f"{names[task]}/{split.name}", outcome.B, outcome.A)
            parts[task].add(outcome)
        for key, tensor in split.artefact.items():
            spool.put(f"{split.name}.{key}", tensor)
        kept[split.name] = tuple(split.artefact)
        facts[split.name] = {
            key: list(value) if isinstance(value, tuple) else value for key, value in split.facts.items()
        }
        tasks = tuple(outcome.tasks[0] for outcome in split.outcomes)
        measured[split.name] = Measured(tasks, split.outcomes[0].m, split.outcomes[0].n, split.inputs)
    owners = [name for name, adapter in zip(names, prepared.adapters, strict=True) if adapter.full_tensors]
    if any(kept.values()) and owners:
        findings.warn(
            "basis_without_full_tensors",
            f"{ARTEFACT_NAME} holds no fully trained tensors; those of {some(owners)} are in the folders of "
            "the tasks, but not in what is recovered from the basis alone",
        )
    files: dict[str, str] = {}
    reports = {}
    for name, part in zip(names, parts, strict=True):
        part.warnings += [entry for entry in findings.warnings if entry not in part.warnings]
        part.settle_lambda()
        reports[name] = build_report(part, digest, runner.device.type)
        (folder / name).mkdir()
        written = write_result(folder / name, part, spool, reports[name], task=name)
        files.update({f"{name}/{file}": sha for file, sha in written.items()})
    report = _whole(findings, digest, runner.device.type, reports, facts, measured)
    if any(kept.values()):
        files[ARTEFACT_NAME] = _write_artefact(folder, kept, spool, report, prepared)
    recipe = prepared.recipe
    card = model_card(recipe, prepared.resolved.method, report, prepared.table.base_model)
    files["README.md"] = write_text(folder / "README.md", card)
    files["merge.yaml"] = write_text(folder / "merge.yaml", recipe.to_yaml())
    files["report.json"] = write_text(folder / "report.json", json_text(report))
    return report, dict(sorted(files.items()))


def _whole(
    findings: Findings,
    digest: str,
    device: str,
    reports: dict[str, dict[str, Any]],
    facts: dict[str, dict[str, Any]],
    measured: dict[str, Measured],
) -> dict[str, Any]:
    """The report of all parts: their summaries, the method's own figures per module, and the diagnostics of
    the inputs.
    """
    measured = dict(sorted(measured.items()))
    summaries = {name: report["summary"] for name, report in reports.items()}
    report = build_report(findings, digest, device)
    report["summary"] = {
        **next(iter(summaries.values())),
        "min_rank": min(summary["min_rank"] for summary in summaries.values()),
        "max_rank": max(summary["max_rank"] for summary in summaries.values()),
        "discarded_energy": max(summary["discarded_energy"] for summary in summaries.values()),
        "inputs": [summary["inputs"][0] for summary in summaries.values()],
        "diagnostics": whole_model(list(measured.values()), len(reports)).summary,
    }
    report["tasks"] = summaries
    report["modules"] = {
        name: {**facts[name], "diagnostics": module_data(module)} for name, module in measured.items()
    }
    return report


def _write_artefact(
    folder: Path, kept: dict[str, tuple[str, ...]], spool: Spool, report: dict[str, Any], prepared: Prepared
) -> str:
    keys = [f"{name}.{key}" for name in sorted(kept) for key in kept[name]]
    specs = [TensorSpec(key, prepared.dtype, spool.shape(key)) for key in keys]
    metadata = {
        **header_metadata(report),
        "merganser.tasks": json.dumps(list(report["tasks"])),
        "merganser.models": json.dumps([entry["model"] for entry in report["inputs"]]),
    }
    if prepared.resolved.method.name == "rmm":
        metadata[METADATA_KEY] = describe(prepared, list(report["tasks"]), spool.shape).model_dump_json()
    return write_safetensors(folder / ARTEFACT_NAME, specs, (spool.get(key) for key in keys), metadata)
