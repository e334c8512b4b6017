"""The files of a base model: found, checked and hashed without loading anything. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from merging.errors import InputError
from merging.formats.files import open_regular, read_at
from merging.formats.guard import TensorInfo, check_safetensors

MAX_CONFIG_BYTES = 4 << 20
_INDEX = "model.safetensors.index.json"
TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt")
"""Model types whose layers store the transpose of a weight."""


@dataclass(frozen=True)
class BaseFiles:
    """A model folder with ``config.json`` and weights in safetensors."""

    folder: Path
    weights: tuple[Path, ...]
    config: Mapping[str, Any]

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) over the names and contents of the configuration and the weights."""
        total = hashlib.sha256()
        for path in (self.folder / "config.json", *self.weights):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            total.update(f"{digest}  {path.name}\n".encode())
        return total.hexdigest()

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by name, from the headers of the files, which are checked."""
        found: dict[str, TensorInfo] = {}
        for path in self.weights:
            found.update(check_safetensors(path).tensors)
        return dict(sorted(found.items()))

    @property
    def complete(self) -> bool:
        """Whether the weights are there, not only their headers (files that are mostly holes)."""
        return all(path.stat().st_blocks * 512 * 2 > path.stat().st_size for path in self.weights)

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", ""))


def find_base(folder: Path) -> BaseFiles:
    """The base model in ``folder``.

    Raises :class:`InputError`: ``base_model_not_found``, ``base_model_pickled``, ``base_model_invalid``,
    ``base_model_remote_code``.
    """
    if not folder.is_dir():
        _fail("base_model_not_found", folder, "is not a folder", "Give the folder of the base model.")
    config = _json(folder, folder / "config.json")
    if not isinstance(config.get("model_type"), str):
        _fail("base_model_invalid", folder, "has a config.json without a model_type", None)
    if "auto_map" in config:
        _fail(
            "base_model_remote_code",
            folder,
            "is a model that brings its own code, which is never run",
            "Use a model that transformers knows.",
        )
    index = folder / _INDEX
    if index.exists():
        table = _json(folder, index).get("weight_map")
        if not isinstance(table, dict):
            _fail("base_model_invalid", folder, f"has a {_INDEX} without a weight_map", None)
        names = sorted({str(name) for name in table.values()})
        if any("/" in name or not name.endswith(".safetensors") for name in names):
            _fail("base_model_invalid", folder, f"has a {_INDEX} that names other files", None)
    else:
        names = ["model.safetensors"]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        code = "base_model_pickled" if pickled else "base_model_not_found"
        _fail(
            code, folder, f"has no {missing[0]}", "Save it with safetensors; pickled weights are not loaded."
        )
    return BaseFiles(folder, tuple(folder / name for name in names), config)


def _json(folder: Path, path: Path) -> dict[str, Any]:
    try:
        with open_regular(path) as (handle, _status):
            data = read_at(handle, MAX_CONFIG_BYTES + 1, 0)
    except OSError as error:
        _fail("base_model_not_found", folder, f"has no readable {path.name} ({error.strerror})", None)
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    if len(data) > MAX_CONFIG_BYTES or not isinstance(found, dict):
        _fail("base_model_invalid", folder, f"has a {path.name} that is not a JSON object", None)
    return found


def _fail(code: str, folder: Path, what: str, remedy: str | None) -> NoReturn:
    raise InputError(
        code,
        f"base model {folder.name} {what}",
        remedy=remedy,
        where={"file": folder.name, "field": "base_model"},
    )
