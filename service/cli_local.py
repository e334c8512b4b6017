"""Commands that need no service: ``merge``, ``plan`` and ``methods``; ``inspect`` is in its own file.

The engine, and torch with it, is imported only when a merge runs.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service import cli_inspect
from service.cli_console import columns, note, print_json, progress, say, size

if TYPE_CHECKING:
    from merging.engine import Progress


def add_commands(commands: Any) -> None:
    """Add the local commands to argparse's ``commands`` (the object of ``add_subparsers``)."""
    merge = commands.add_parser(
        "merge",
        help="run a recipe on this machine",
        description="Run a recipe on this machine and write the result directory atomically.",
    )
    merge.add_argument("recipe", type=Path, metavar="RECIPE", help="YAML or JSON file")
    merge.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write")
    merge.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    merge.add_argument(
        "--threads", type=_positive, metavar="N", help="CPU threads (default: the cores, at most 8)"
    )
    merge.add_argument("--overwrite", action="store_true", help="replace an existing DIR")
    merge.add_argument("--quiet", action="store_true", help="no progress")
    merge.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="where adarank keeps its state, to go on after a stop"
    )
    merge.add_argument(
        "--memory-budget",
        type=_bytes,
        metavar="SIZE",
        help="checkpoints: use only as many threads as fit into SIZE bytes (4G, 512M)",
    )
    merge.set_defaults(run=_merge)

    plan = commands.add_parser(
        "plan",
        help="check a recipe and estimate what it takes",
        description="Check a recipe against its inputs and estimate size, memory and time. "
        "Reads headers only, never a tensor.",
    )
    plan.add_argument("recipe", type=Path, metavar="RECIPE", help="YAML or JSON file")
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.set_defaults(run=_plan)

    methods = commands.add_parser(
        "methods",
        help="list the merge methods, or describe one",
        description="The catalogue of merge methods: parameters, defaults, contract and paper.",
    )
    methods.add_argument("name", nargs="?", metavar="NAME", help="describe this method only")
    methods.add_argument("--json", action="store_true", help="print JSON, with the JSON schemas")
    methods.set_defaults(run=_methods)

    cli_inspect.add_command(commands)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _bytes(text: str) -> int:
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    factor = units.get(text[-1:].upper(), 1)
    try:
        number = float(text[:-1] if factor > 1 else text)
    except ValueError:
        number = 0.0
    if not 0 < number < 1e15:
        raise argparse.ArgumentTypeError("must be a size such as 4G or 512M")
    return int(number * factor)


def _merge(args: argparse.Namespace) -> int:
    from merging.formats.result_dir import ResultDirectory
    from merging.mergekit.detect import claimed
    from merging.planning import plan
    from merging.preparing import local_path
    from merging.recipe import Recipe
    from service.remote.local import pinned_by_cache

    # Bad input is refused here, before the slow import of torch.
    recipe: Recipe | Path = args.recipe
    if claimed(args.recipe, local_path) is None:
        recipe = pinned_by_cache(Recipe.load(args.recipe))
    plan(recipe)
    ResultDirectory(args.out, args.overwrite).check()

    from merging.engine import merge

    with progress(quiet=args.quiet) as show:

        def follow(step: Progress) -> None:
            show(step.phase, step.done / step.total if step.total else 0.0, step.message)

        result = merge(
            recipe,
            args.out,
            device=args.device,
            threads=args.threads,
            progress=follow,
            overwrite=args.overwrite,
            checkpoint=args.checkpoint,
            memory_budget=args.memory_budget,
        )
    for warning in result.report.get("warnings", []):
        note(f"warning: {warning['message']}")
    note(f"merged in {result.seconds:.1f} s, recipe digest {result.recipe_digest[:12]}")
    say(str(result.path))
    return 0


def _plan(args: argparse.Namespace) -> int:
    from merging.planning import plan

    data = plan(args.recipe).to_dict()
    if args.json:
        print_json(data)
    else:
        say(_plan_text(data))
    return 0


def _plan_text(data: dict[str, Any]) -> str:
    output, estimate = data["output"], data["estimate"]
    models = [
        (m["model"], m["format"], m["modules"], _range(m["min_rank"], m["max_rank"])) for m in data["models"]
    ]
    groups = Counter(
        (
            module["name"].removesuffix(".weight").rpartition(".")[2],
            f"{module['m']} x {module['n']}",
            " + ".join(str(rank) for rank in module["ranks"]),
            module["output_rank"],
        )
        for module in data["modules"]
    )
    modules = [(*group, count) for group, count in sorted(groups.items())]
    space = f" in {data['space']} space" if data["space"] else ""
    lines = [
        f"{data['method']}{space}: {len(data['models'])} models, {len(data['modules'])} modules",
        f"output    {output['format']}, {output['dtype']}, rank up to {output['rank']}, "
        f"up to {size(estimate['output_bytes'])}",
        f"estimate  {estimate['seconds']:.1f} s, {size(estimate['memory_bytes'])} of memory",
        "",
        columns(models, ("MODEL", "FORMAT", "MODULES", "RANK")),
        "",
        columns(modules, ("MODULE", "SHAPE", "RANKS", "OUTPUT RANK", "COUNT")),
    ]
    lines += [f"warning: {warning['message']}" for warning in data["warnings"]]
    return "\n".join(lines)


def _range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"


def _methods(args: argparse.Namespace) -> int:
    from merging import catalog

    described = catalog.describe(args.name)
    if args.json:
        print_json(described)
    elif args.name:
        say(_method_text(described[0]))
    else:
        rows = [(entry["name"], _spaces(entry), entry["summary"]) for entry in described]
        say(columns(rows, ("METHOD", "SPACES", "WHAT IT DOES")))
    return 0


def _spaces(entry: dict[str, Any]) -> str:
    return ", ".join(entry["contract"]["spaces"]) or "-"


def _method_text(entry: dict[str, Any]) -> str:
    paper = entry["paper"]
    source = ", ".join(paper[key] for key in ("title", "venue", "url") if paper.get(key))
    rows = [
        (
            name,
            "-" if default is None else str(default).lower(),
            "yes" if name in entry["per_model"] else "",
            " ".join(entry["parameters"]["properties"][name].get("description", "").split()),
        )
        for name, default in entry["defaults"].items()
    ]
    parts = [
        f"{entry['name']}: {entry['title']}",
        entry["summary"],
        *([entry["notes"]] if entry["notes"] else []),
        "",
        f"spaces   {_spaces(entry)}",
        f"outputs  {', '.join(entry['contract']['outputs'])}",
        f"paper    {source}",
        "",
        columns(rows, ("PARAMETER", "DEFAULT", "PER MODEL", "MEANING")),
    ]
    return "\n".join(parts)
