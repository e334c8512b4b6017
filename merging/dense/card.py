"""The model card of a dense merge. No torch here."""

from __future__ import annotations

from typing import Any

import yaml

from merging import catalog
from merging.card import code, model_card, number, paper, plain
from merging.dense.plan import DensePlan

_WHAT = {"checkpoint": "a full checkpoint", "delta": "a task vector", "lora": "a LoRA adapter"}
_LIBRARY = {"checkpoint": "transformers", "delta": None, "lora": "peft"}


def dense_card(plan: DensePlan, report: dict[str, Any]) -> str:
    """Markdown with front matter, as model hubs read it."""
    if plan.origin is not None:
        method, base = catalog.get(report["method"]), plan.recipe.base_model
        return model_card(plan.origin.recipe, method, report, base, library="transformers")
    output, method, summary = plan.recipe.output, plan.resolved.method, report["summary"]
    front: dict[str, Any] = {"tags": ["merge", "merganser"]}
    if _LIBRARY[output.format]:
        front = {"library_name": _LIBRARY[output.format], **front}
    if plan.recipe.base_model:
        front = {"base_model": plan.recipe.base_model, **front}
    energy = 100 * summary["discarded_energy"]
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# {method.title}: {len(plan.models)} models merged",
        "",
        f"{method.summary} Method `{method.name}`{paper(method)}, written as {_WHAT[output.format]}.",
        "",
        "| input | kind | weight | norm | cosine | retention |",
        "| --- | --- | --- | --- | --- | --- |",
        *[
            f"| {code(entry['model'])} | {given['format']} | {given['parameters']['weight']:g} "
            f"| {entry['norm']:.4g} | {number(entry['cosine'])} | {number(entry['retention'])} |"
            for entry, given in zip(summary["inputs"], report["inputs"], strict=True)
        ],
        "",
        f"- lambda: {summary['lambda']:.6g}",
        f"- tensors merged: {summary['modules']}, copied from the base: {summary['copied']}",
        *([f"- energy given up by truncation: {energy:.3g} %"] if energy else []),
        f"- recipe digest: `{report['recipe_digest']}`",
        "",
        "Norm is that of the difference to the base over the whole model; cosine compares the merged "
        "difference with the input's, retention is the part of it that the result keeps. `merge.yaml` "
        "reproduces this result byte for byte from the same inputs.",
        "",
    ]
    if report["warnings"]:
        lines += ["## Warnings", "", *[f"- {plain(entry['message'])}" for entry in report["warnings"]], ""]
    return "\n".join(lines)
