"""Read many documents of the storage at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from service.storage import Storage

_AT_ONCE = 16
_BATCH = 1000


def documents(storage: Storage, keys: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Key and content of each document that is still there, in the order of the keys."""
    wanted = [key for key in keys if key.endswith(".json")]
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="bulk") as pool:
        for start in range(0, len(wanted), _BATCH):
            batch = wanted[start : start + _BATCH]
            for key, content in zip(batch, pool.map(storage.get_json, batch), strict=True):
                if content is not None:
                    yield key, content
