"""Merganser's library: merge LoRA adapters and task vectors of one base model.

``merge`` runs a recipe, ``plan`` validates it without reading a tensor, ``load_adapter`` opens an adapter.
Importing this package does not import torch; using it does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from merging import catalog
    from merging.engine import MergeResult, merge
    from merging.formats.adapter import open_adapter as load_adapter
    from merging.planning import plan
    from merging.recipe import Recipe

__version__ = "0.1.0"
__all__ = ["MergeResult", "Recipe", "__version__", "catalog", "load_adapter", "merge", "plan"]

_HOMES = {
    "merge": ("merging.engine", "merge"),
    "MergeResult": ("merging.engine", "MergeResult"),
    "load_adapter": ("merging.formats.adapter", "open_adapter"),
    "plan": ("merging.planning", "plan"),
    "Recipe": ("merging.recipe", "Recipe"),
}


def __getattr__(name: str) -> Any:
    if name == "catalog":
        return importlib.import_module("merging.catalog")
    if name in _HOMES:
        module_name, attribute = _HOMES[name]
        return getattr(importlib.import_module(module_name), attribute)
    raise AttributeError(f"module 'merging' has no attribute {name!r}")
