"""``merganser stats``: statistics of activations from samples, for methods that look at data."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.cli_console import note, progress, say, size

if TYPE_CHECKING:
    from merging.engine import Progress


def add_commands(commands: Any) -> None:
    """Add ``stats`` to argparse's ``commands``."""
    stats = commands.add_parser(
        "stats",
        help="compute the statistics that a recipe needs",
        description="Run the base model on the samples of a recipe and write one statistics file per model, "
        "and the recipe that uses them in the place of the samples.",
    )
    stats.add_argument("recipe", type=Path, metavar="RECIPE", help="YAML or JSON file")
    stats.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write")
    stats.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    stats.add_argument("--overwrite", action="store_true", help="replace an existing DIR")
    stats.add_argument("--quiet", action="store_true", help="no progress")
    stats.set_defaults(run=_stats)


def _stats(args: argparse.Namespace) -> int:
    from merging.formats.result_dir import ResultDirectory
    from merging.planning import plan

    # Bad input is refused here, before the slow imports.
    plan(args.recipe)
    ResultDirectory(args.out, args.overwrite).check()

    from merging.calibration.write import RECIPE_NAME, write_statistics

    with progress(quiet=args.quiet) as show:

        def follow(step: Progress) -> None:
            show(step.phase, step.done / step.total if step.total else 0.0, step.message)

        files = write_statistics(
            args.recipe, args.out, device=args.device, progress=follow, overwrite=args.overwrite
        )
    for path in files:
        note(f"{path.name}: {size(path.stat().st_size)}")
    say(str(args.out / RECIPE_NAME))
    return 0
