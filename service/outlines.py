"""Safetensors files of which only the header is there: enough to plan a merge without moving the weights.

An outline has the size of its file and takes the room of its header; what follows reads as zeros.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from merging.formats.header import DEFAULT_LIMITS
from service.names import WEIGHTS
from service.storage import Storage

DENSE = ("checkpoint", "task_vector")
"""Formats of whole models. Their headers say all that a plan needs; adapters may need their data."""

_HEAD = 512


def outline(storage: Storage, key: str, size: int, target: Path) -> None:
    """Bring the header of the safetensors object ``key`` of ``size`` bytes to ``target``.

    Raises ``FileNotFoundError``.
    """
    length = int.from_bytes(storage.first_bytes(key, 8), "little")
    # of a file whose header nobody will read, as much as it takes to refuse it
    data = storage.first_bytes(key, 8 + length if length <= DEFAULT_LIMITS.header_bytes else _HEAD)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as file:
        file.write(data)
        os.truncate(file.fileno(), max(size, len(data)))


def can_be_outlined(storage: Storage, paths: Iterable[str], path: str) -> bool:
    """Whether the header of a file will do: it is bulky to fetch, and belongs to a whole model."""
    whole = not any(other.endswith("adapter_config.json") for other in paths)
    return storage.root is None and whole and path.endswith(WEIGHTS) and _stem(path) in ("model", "delta")


def _stem(path: str) -> str:
    """``model`` of ``model.safetensors`` and of ``model-00001-of-00002.safetensors``."""
    return path.rpartition("/")[2].partition(".")[0].partition("-")[0]
