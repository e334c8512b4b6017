"""Write ``docs/methods/*.md`` from the catalogue: ``python docs/generate.py [--check]``.

With ``--check`` nothing is written; the exit status is 1 when a page differs from the catalogue.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merging import catalog

FOLDER = Path(__file__).resolve().parent / "methods"
NOTICE = "<!-- Written by docs/generate.py from the catalogue. Edit merging/catalog instead. -->"


def pages() -> dict[str, str]:
    """File name -> content of every generated page."""
    entries = catalog.describe()
    content = {f"{entry['name']}.md": method_page(entry) for entry in entries}
    return {"index.md": index_page(entries), **content}


def index_page(entries: list[dict[str, Any]]) -> str:
    """The table of all methods."""
    rows = [
        (
            f"[`{entry['name']}`]({entry['name']}.md)",
            entry["summary"],
            " ".join(f"`{space}`" for space in entry["contract"]["spaces"]) or "its own",
            paper_link(entry["paper"]),
        )
        for entry in entries
    ]
    return document("Methods", table(("method", "what it does", "spaces", "paper"), rows))


def method_page(entry: dict[str, Any]) -> str:
    """One method: summary, an example, parameters, contract."""
    parts = [entry["summary"]]
    if entry["notes"]:
        parts.append(entry["notes"])
    parts += [
        f"Paper: {paper_link(entry['paper'])}.",
        f"```yaml\n{example(entry)}\n```",
        "## Parameters",
        parameter_table(entry),
    ]
    if entry["compat"]:
        parts += ["## Compatibility", compat_text(entry["compat"])]
    parts += ["## Contract", contract_text(entry["contract"])]
    return document(f"{entry['title']} (`{entry['name']}`)", *parts)


def document(title: str, *parts: str) -> str:
    return "\n\n".join([NOTICE, f"# {title}", *parts]) + "\n"


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def paper_link(paper: dict[str, Any]) -> str:
    title = f"[{paper['title']}]({paper['url']})" if paper["url"] else paper["title"]
    return f"{title}, {paper['venue']}" if paper["venue"] else title


def example(entry: dict[str, Any]) -> str:
    """A recipe that names the method and the numbers that are its own."""
    models = max(2, entry["contract"]["min_models"])
    own = {
        name: value
        for name, value in entry["defaults"].items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in ("weight", "lambda")
    }
    lines = [f"merge_method: {entry['name']}"]
    if entry["contract"]["spaces"]:
        lines.append(f"space: {entry['contract']['spaces'][0]}")
    lines.append("models:")
    lines += [f"  - model: adapters/task-{chr(ord('a') + index)}" for index in range(models)]
    if own:
        values = ", ".join(f"{name}: {json.dumps(value)}" for name, value in own.items())
        lines.append(f"parameters: {{{values}}}")
    return "\n".join(lines)


def parameter_table(entry: dict[str, Any]) -> str:
    properties = entry["parameters"]["properties"]
    rows = [
        (
            f"`{name}`",
            value_type(properties[name]),
            f"`{json.dumps(default)}`",
            "yes" if name in entry["per_model"] else "",
            " ".join(properties[name].get("description", "").split()).replace("|", "\\|"),
        )
        for name, default in entry["defaults"].items()
    ]
    return table(("name", "values", "default", "per model", "meaning"), rows)


def value_type(schema: dict[str, Any]) -> str:
    """The values a parameter takes, from its JSON schema."""
    if "anyOf" in schema:
        return " or ".join(value_type(option) for option in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    bounds = [
        f"{sign} {schema[key]:g}"
        for key, sign in (
            ("exclusiveMinimum", ">"),
            ("minimum", ">="),
            ("exclusiveMaximum", "<"),
            ("maximum", "<="),
        )
        if key in schema
    ]
    return " ".join([schema.get("type", "any"), ", ".join(bounds)]).strip()


def compat_text(presets: dict[str, dict[str, Any]]) -> str:
    lines = ["`compat` reproduces a peer; it changes these defaults:", ""]
    for name, values in presets.items():
        changed = ", ".join(f"`{key}: {json.dumps(value)}`" for key, value in values.items())
        lines.append(f"- `{name}`: {changed or 'none'}")
    return "\n".join(lines)


def contract_text(contract: dict[str, Any]) -> str:
    most = contract["max_models"]
    lines = [
        f"- models: at least {contract['min_models']}" + (f", at most {most}" if most else ""),
        f"- spaces: {', '.join(contract['spaces']) or 'chooses its own coordinates'}",
        f"- outputs: {', '.join(contract['outputs'])}",
    ]
    remarks = {
        "equal_ranks": "all models must have equal ranks",
        "ordered": "the order of the models has a meaning",
        "multi_output": "writes one adapter per model",
        "needs_base": "needs the base model",
        "data": "needs samples or statistics",
        "dense_inputs": "also takes dense task vectors",
        "initial": "takes no trained models: `model` names a task",
    }
    lines += [f"- {text}" for key, text in remarks.items() if contract[key]]
    return "\n".join(lines)


def stale(folder: Path, wanted: dict[str, str]) -> list[str]:
    """Names of the pages that are missing, different, or no longer in the catalogue."""
    present = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.md")}
    return sorted(name for name in present.keys() | wanted.keys() if present.get(name) != wanted.get(name))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, only compare")
    options = parser.parse_args()
    wanted = pages()
    different = stale(FOLDER, wanted)
    if options.check:
        for name in different:
            sys.stderr.write(f"docs/methods/{name} differs from the catalogue: run `make docs`\n")
        return 1 if different else 0
    FOLDER.mkdir(exist_ok=True)
    for name in different:
        if name in wanted:
            (FOLDER / name).write_text(wanted[name], encoding="utf-8")
        else:
            (FOLDER / name).unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
