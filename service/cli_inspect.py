"""``merganser inspect``: what an adapter on disk holds; with several, how they relate."""

from __future__ import annotations

import argparse
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.cli_console import columns, print_json, say
from service.cli_whole import whole_model, whole_text

if TYPE_CHECKING:
    from merging.formats.adapter import Adapter, Module

_AGAINST_MEAN = {
    "retention": "RETENTION",
    "relative_error": "REL. ERROR",
    "subspace_alignment": "ALIGNMENT",
    "l1_gap": "L1 GAP",
}


def add_command(commands: Any) -> None:
    """Add ``inspect`` to argparse's ``commands``."""
    inspect = commands.add_parser(
        "inspect",
        help="show what an adapter or a checkpoint holds",
        description="Show format, ranks, scales, modules and warnings of an adapter, or the tensors of a "
        "checkpoint or task vector; of several adapters also how their updates relate to each other, which "
        "reads the tensors.",
    )
    inspect.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="folder or .safetensors file")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect)


def _inspect(args: argparse.Namespace) -> int:
    from merging.formats.adapter import open_adapter

    if len(args.paths) == 1:
        whole = whole_model(args.paths[0])
        if whole is not None:
            print_json(whole) if args.json else say(whole_text(whole))
            return 0
    described = []
    for path in args.paths:
        adapter = open_adapter(path, label=str(path))
        try:
            described.append(describe(adapter))
        finally:
            adapter.close()
    if len(described) == 1:
        print_json(described[0]) if args.json else say(_text(described[0]))
        return 0

    from merging.comparing import compare

    compared = compare(args.paths)
    if args.json:
        print_json({"adapters": described, "comparison": compared})
    else:
        say("\n\n".join([*(_text(data) for data in described), _comparison_text(compared)]))
    return 0


def describe(adapter: Adapter) -> dict[str, Any]:
    """Plain data about an adapter, from its headers and configuration only."""
    modules = adapter.modules.values()
    return {
        "path": str(adapter.path),
        "format": adapter.format,
        "base_model": adapter.base_model,
        "base_revision": adapter.base_revision,
        "digest": adapter.digest,
        "parameters": sum(module.rank * (module.m + module.n) for module in modules),
        "ranks": sorted({module.rank for module in modules}),
        "scales": sorted({module.scale for module in modules}),
        "dtypes": sorted({module.dtype for module in modules}),
        "target_modules": sorted({_leaf(module) for module in modules}),
        "modules": [_module(module) for module in modules],
        "full_tensors": sorted(adapter.full_tensors),
        "warnings": list(adapter.warnings),
    }


def _module(module: Module) -> dict[str, Any]:
    return {
        "name": module.name,
        "kind": module.kind,
        "m": module.m,
        "n": module.n,
        "rank": module.rank,
        "scale": module.scale,
        "dtype": module.dtype,
    }


def _leaf(module: Module) -> str:
    name = module.name if module.expert is None else module.expert.layer  # not a line for each expert
    return name.rpartition(".")[2]


def _text(data: dict[str, Any]) -> str:
    base = data["base_model"] or "not named"
    if data["base_revision"]:
        base += f" @ {data['base_revision']}"
    groups = Counter(
        (
            module["name"].rpartition(".")[2],
            module["kind"],
            f"{module['m']} x {module['n']}",
            module["rank"],
            module["scale"],
            module["dtype"],
        )
        for module in data["modules"]
    )
    rows = [(*group, count) for group, count in sorted(groups.items())]
    lines = [
        f"{data['path']}: {data['format']} adapter",
        f"base model  {base}",
        f"parameters  {data['parameters']:,} in {len(data['modules'])} modules",
        f"digest      sha256 {data['digest']}",
        "",
        columns(rows, ("MODULE", "KIND", "SHAPE", "RANK", "SCALE", "DTYPE", "COUNT")),
    ]
    lines += [f"full tensor: {key}" for key in data["full_tensors"]]
    lines += [f"warning: {warning}" for warning in data["warnings"]]
    return "\n".join(lines)


def _comparison_text(compared: dict[str, Any]) -> str:
    summary = compared["summary"]
    names = [entry["model"] for entry in compared["models"]]
    keys = ("cosine", "row_overlap", "column_overlap", "sign_conflict_pairs")
    rows = [
        (names[i], names[j], *(_figure(summary[key][i][j]) for key in keys))
        for i, j in combinations(range(len(names)), 2)
    ]
    own = [
        (
            entry["model"],
            *(_figure(entry[key]) for key in ("norm", "effective_rank", "stable_rank")),
            *(_figure(entry["against_mean"][key]) for key in _AGAINST_MEAN),
        )
        for entry in compared["models"]
    ]
    lines = [
        columns(rows, ("MODEL", "MODEL", "COSINE", "ROW OVERLAP", "COLUMN OVERLAP", "SIGN CONFLICT")),
        "",
        columns(own, ("MODEL", "NORM", "EFF. RANK", "STABLE RANK", *_AGAINST_MEAN.values())),
        "(the last four against the mean of all)",
        "",
        f"norm imbalance   {_figure(summary['norm_imbalance'])} (largest norm over smallest)",
        f"cancellation     {_figure(summary['cancellation'])} (lost when the updates are added)",
        f"interference     {_figure(summary['sti_relative'])} (of singular directions; 0 is none)",
        f"factor average   {_figure(summary['factor_average_error'])} (relative error of averaging B and A)",
    ]
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
