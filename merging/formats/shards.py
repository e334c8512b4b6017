"""Sharded safetensors: the index that says which file holds which tensor, checked. No torch here.

``model.safetensors.index.json`` is ``{"metadata": {...}, "weight_map": {tensor: file}}`` and as untrusted as
any upload: its file names must be plain names, and it must say exactly what the shards hold.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merging.errors import InputError
from merging.formats.files import open_regular, read_at

MAX_INDEX_BYTES = 50 << 20
MAX_SHARDS = 2_000
MAX_ENTRIES = 300_000
"""Tensors of an index. As objects, short entries take some twenty times the memory of their text."""
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,200}\.safetensors")


def index_error(file: str, what: str, *, tensor: str | None = None, remedy: str | None = None) -> InputError:
    """The error ``checkpoint_index``."""
    where = {"file": file} if tensor is None else {"file": file, "tensor": tensor}
    return InputError(
        "checkpoint_index",
        f"{file} {what}",
        remedy=remedy or "Save the model again with save_pretrained(safe_serialization=True)",
        where=where,
    )


def read_index(path: Path) -> dict[str, str]:
    """The ``weight_map`` of an index file: tensor to file name. Raises ``checkpoint_index``."""
    data = read_json(path, MAX_INDEX_BYTES, entries=MAX_ENTRIES)
    found = data.get("weight_map")
    if not isinstance(found, dict) or not found:
        raise index_error(path.name, "has no weight_map")
    for tensor, name in found.items():
        if not isinstance(name, str) or not _PLAIN.fullmatch(name) or ".." in name:
            raise index_error(
                path.name,
                f"names {str(name)[:80]!r} as the file of {tensor[:80]}; only plain .safetensors names "
                "of the same folder are accepted",
                tensor=tensor[:80],
            )
    if len(set(found.values())) > MAX_SHARDS:
        raise index_error(path.name, f"names more than {MAX_SHARDS} files")
    return found


def read_json(path: Path, limit: int, *, entries: int | None = None) -> dict[str, Any]:
    """A JSON object without repeated keys, of at most ``limit`` bytes and about so many ``entries``.

    Raises ``checkpoint_index`` or ``not_a_regular_file``.
    """
    try:
        with open_regular(path) as (handle, status):
            if status.st_size > limit:
                raise index_error(path.name, f"has {status.st_size} bytes, the limit is {limit}")
            raw = read_at(handle, status.st_size, 0)
    except OSError as error:
        raise InputError(
            "not_a_regular_file",
            f"{path.name} cannot be read ({error.strerror})",
            where={"file": path.name},
        ) from None
    if entries is not None and raw.count(b",") > entries:
        raise index_error(path.name, f"has more than {entries} entries")
    try:
        data = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise index_error(path.name, f"is not valid JSON ({str(error)[:80]})") from None
    if not isinstance(data, dict):
        raise index_error(path.name, "is not a JSON object")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def check_against(index: str, weight_map: Mapping[str, str], held: Mapping[str, list[str]]) -> None:
    """Compare the index with what the shards hold: ``held`` maps tensors to the files that have them."""
    for tensor, files in held.items():
        if len(files) > 1:
            raise index_error(index, f"belongs to shards that both hold {tensor}: {', '.join(files[:4])}",
                              tensor=tensor)  # fmt: skip
        if tensor not in weight_map:
            raise index_error(index, f"does not list {tensor}, which {files[0]} holds", tensor=tensor)
    for tensor, file in weight_map.items():
        if held.get(tensor) != [file]:
            raise index_error(index, f"says that {file} holds {tensor[:80]}, but it does not",
                              tensor=tensor[:80])  # fmt: skip


def shard_names(stem: str, count: int) -> list[str]:
    """The names of ``count`` shards: ``model.safetensors``, or ``model-00001-of-00003.safetensors``."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def index_text(weight_map: Mapping[str, str], total_size: int, parameters: int) -> str:
    """The content of an index file."""
    data = {
        "metadata": {"total_parameters": parameters, "total_size": total_size},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return json.dumps(data, indent=2) + "\n"
