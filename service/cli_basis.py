"""``merganser recover`` and ``merganser extend``: what a reversible merge gives back and takes in."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from service.cli_console import note, say

POOR_FIT = 0.5
"""A relative error above which a module that was added to a basis deserves a warning."""


def add_commands(commands: Any) -> None:
    """Add ``recover`` and ``extend`` to argparse's ``commands``."""
    recover = commands.add_parser(
        "recover",
        help="rebuild one task's adapter from a basis",
        description="Rebuild the adapter of one task from the basis.safetensors of an rmm merge.",
    )
    recover.add_argument("basis", type=Path, metavar="BASIS", help="basis.safetensors")
    recover.add_argument("task", metavar="TASK", help="name of the task, as in report.json")
    recover.add_argument("--dtype", choices=("F32", "F16", "BF16"), help="default: that of the basis")
    extend = commands.add_parser(
        "extend",
        help="add an adapter to a basis",
        description="Project one more adapter onto a basis without a new fit; the other tasks stay.",
    )
    extend.add_argument("basis", type=Path, metavar="BASIS", help="basis.safetensors")
    extend.add_argument("adapter", type=Path, metavar="ADAPTER", help="adapter directory")
    extend.add_argument("--label", help="name of the new task (default: the directory's name)")
    for command, run in ((recover, _recover), (extend, _extend)):
        command.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write")
        command.add_argument("--overwrite", action="store_true", help="replace an existing DIR")
        command.set_defaults(run=run)


def _recover(args: argparse.Namespace) -> int:
    from merging.basis import recover

    recover(args.basis, args.task, args.out, dtype=args.dtype, overwrite=args.overwrite)
    say(str(args.out))
    return 0


def _extend(args: argparse.Namespace) -> int:
    from merging.basis import add_task

    done = add_task(args.basis, args.adapter, args.out, label=args.label, overwrite=args.overwrite)
    worst = max(done["recon_error"].values(), default=0.0)
    note(f"added {done['task']!r}; largest relative error of a module {worst:.3f}")
    if worst > POOR_FIT:
        note("warning: the basis does not span this adapter; merge again with it among the inputs")
    say(str(args.out))
    return 0
