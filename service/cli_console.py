"""What the commands share on a terminal: JSON, columns, sizes, and progress on stderr.

Results go to stdout; progress, warnings and errors go to stderr, so that a pipe sees results only.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

ShowProgress = Callable[[str, float, str], None]
"""Takes a phase, the fraction done in 0..1, and a message."""


def say(text: str) -> None:
    """Write one line, or several, to stdout."""
    sys.stdout.write(text + "\n")


def print_json(data: Any) -> None:
    """Write ``data`` to stdout as one JSON document."""
    say(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False))


def note(text: str) -> None:
    """Write one line to stderr."""
    sys.stderr.write(text + "\n")


def columns(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """Left-aligned columns under a header; never truncated, so that a pipe loses nothing.

    Columns whose every value is a number are aligned to the right.
    """
    table = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *table]) for i in range(len(header))]
    numeric = [
        bool(rows) and all(isinstance(row[i], int | float) for row in rows) for i in range(len(header))
    ]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), *(line(row) for row in table)])


def size(count: float) -> str:
    """Bytes in a readable unit: ``1.3 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


@contextmanager
def progress(*, quiet: bool = False) -> Iterator[ShowProgress]:
    """A bar on a terminal, plain lines elsewhere, nothing when ``quiet``."""
    if quiet:
        yield lambda _phase, _fraction, _message: None
    elif sys.stderr.isatty():
        with _bar() as show:
            yield show
    else:
        yield _plain_lines()


@contextmanager
def _bar() -> Iterator[ShowProgress]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    display = Progress(
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=32),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[message]}", markup=True),
        console=Console(stderr=True),
        transient=True,
    )
    with display:
        task = display.add_task("starting", total=1.0, message="")

        def show(phase: str, fraction: float, message: str) -> None:
            safe = "" if message == phase else message.replace("[", r"\[")
            display.update(task, description=phase, completed=fraction, message=safe)

        yield show


def _plain_lines(interval: float = 2.0) -> ShowProgress:
    """One line per phase, and one each ``interval`` seconds while a phase lasts."""
    last_phase = ""
    last_time = 0.0

    def show(phase: str, fraction: float, message: str) -> None:
        nonlocal last_phase, last_time
        now = time.monotonic()
        if phase != last_phase or now - last_time >= interval:
            last_phase, last_time = phase, now
            detail = f": {message}" if message not in ("", phase) else ""
            note(f"{phase} {100 * fraction:.0f} %{detail}")

    return show
