"""Short names for the models of a recipe. No torch here."""

from __future__ import annotations

import re
from collections.abc import Sequence


def task_names(labels: Sequence[str]) -> tuple[str, ...]:
    """A short folder name for each model: the last part of its reference, made unique."""
    names: list[str] = []
    for label in labels:
        last = label.rstrip("/").rpartition("/")[2].partition("@")[0]
        base = re.sub(r"[^A-Za-z0-9_-]+", "-", last).strip("-")[:64] or "task"
        name, count = base, 1
        while name in names:
            count += 1
            name = f"{base}-{count}"
        names.append(name)
    return tuple(names)
