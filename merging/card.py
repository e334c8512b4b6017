"""The model card of a result: what was merged, how, and what was lost. No torch here."""

from __future__ import annotations

from typing import Any

import yaml

from merging.catalog import Method
from merging.recipe import Recipe


def model_card(
    recipe: Recipe,
    method: Method,
    report: dict[str, Any],
    base_model: str | None,
    *,
    task: str | None = None,
    library: str = "peft",
) -> str:
    """Markdown with front matter, as model hubs read it. ``task`` names the part of a split result."""
    front: dict[str, Any] = {"library_name": library, "tags": ["merge", "lora", "merganser"]}
    if base_model:
        front = {"base_model": base_model, **front}
    summary = report["summary"]
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# {method.title}: {len(recipe.models)} adapters merged" + (f", task {code(task)}" if task else ""),
        "",
        f"{method.summary} Method `{method.name}`" + _space(report) + paper(method) + ".",
        "",
        "| input | weight | norm | cosine | retention |",
        "| --- | --- | --- | --- | --- |",
        *[
            f"| {code(entry['model'])} | {given['parameters']['weight']:g} | {entry['norm']:.4g} "
            f"| {number(entry['cosine'])} | {number(entry['retention'])} |"
            for entry, given in zip(summary["inputs"], report["inputs"], strict=True)
        ],
        "",
        f"- lambda: {summary['lambda']:.6g}",
        f"- modules: {summary['modules']}, rank {summary['min_rank']} to {summary['max_rank']}",
        f"- energy given up by truncation: {100 * summary['discarded_energy']:.3g} %",
        f"- recipe digest: `{report['recipe_digest']}`",
        "",
        "Cosine compares the merged update with the input; retention is the part of the input that the "
        "merged update keeps along it (1 = all, 0 = none). `merge.yaml` reproduces this result byte for "
        "byte from the same inputs; `report.json` has the figures per module.",
        "",
    ]
    if report["warnings"]:
        lines += ["## Warnings", "", *[f"- {plain(w['message'])}" for w in report["warnings"]], ""]
    return "\n".join(lines)


def _space(report: dict[str, Any]) -> str:
    return f" in the space `{report['space']}`" if report["space"] else ""


def paper(method: Method) -> str:
    """The paper of a method in brackets, linked where it is on arXiv."""
    if method.paper.arxiv is None:
        return f" ({method.paper.title})"
    return f" ([{method.paper.title}](https://arxiv.org/abs/{method.paper.arxiv}))"


def number(value: float | None) -> str:
    """Three digits, or n/a."""
    return "n/a" if value is None else f"{value:.3f}"


def code(text: str) -> str:
    """Text from outside as inline code."""
    return "`" + plain(text).replace("`", "'").replace("|", "/") + "`"


def plain(text: str) -> str:
    """One line without markup that a hostile name could bring."""
    return (
        "".join(c for c in text if c.isprintable()).replace("<", "&lt;").replace("[", "(").replace("]", ")")
    )
