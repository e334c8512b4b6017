"""What a mergekit configuration says, as data, and how to tell one from a recipe.

The document may have ``models`` or ``slices``, ``merge_method``, ``base_model``, ``dtype``, ``out_dtype``,
``tokenizer_source`` (or ``tokenizer: {source}``) and ``parameters`` on every level. ``compat: mergekit`` and
``seed`` may stand beside them, and a ``name``, which says nothing here. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from merging.mergekit.methods import METHODS, NOT_HERE, MergekitMethod, param_names
from merging.mergekit.settings import Setting

DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
TOP_LEVEL = (
    "merge_method",
    "models",
    "slices",
    "base_model",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "parameters",
    "compat",
    "seed",
)

IGNORED = ("name",)
"""Top-level keys that say nothing about the merge."""

ONLY_MERGEKIT = ("slices", "modules", "dtype", "out_dtype", "tokenizer_source", "tokenizer", "chat_template")
"""Top-level keys that a recipe does not have."""

Settings = Mapping[str, Setting]


@dataclass(frozen=True)
class Source:
    """One input of a slice. ``layers`` is ``None`` for all of the model's."""

    model: str
    layers: tuple[int, int] | None
    parameters: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """A run of output layers."""

    sources: tuple[Source, ...]
    base_model: str | None
    parameters: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class MergekitConfig:
    """A whole configuration. ``models`` has become one slice that takes every layer."""

    method: MergekitMethod
    slices: tuple[Slice, ...]
    whole: bool
    base_model: str | None
    dtype: str | None
    out_dtype: str | None
    tokenizer_source: str | None
    parameters: Settings
    seed: int
    warnings: tuple[str, ...]
    document: Mapping[str, Any]

    @property
    def models(self) -> tuple[str, ...]:
        """Every model that is referred to, in the order of the document, the base model first."""
        found = [self.base_model] if self.base_model else []
        for part in self.slices:
            found += [part.base_model] if part.base_model else []
            found += [source.model for source in part.sources]
        return tuple(dict.fromkeys(found))


LISTS = ("target_modules",)
"""Parameters of our own methods that are lists."""


def is_mergekit(data: Any) -> bool:
    """Does a parsed document say what a recipe cannot say?

    That is a key or method that only mergekit has, ``int8_mask``, or a parameter with a gradient or filters.
    """
    if not isinstance(data, Mapping) or "merge_method" not in data:
        return False
    if any(key in data for key in ONLY_MERGEKIT) or data["merge_method"] in ("passthrough", *NOT_HERE):
        return True
    return any(
        "int8_mask" in place
        or any(isinstance(value, list | dict) for name, value in place.items() if name not in LISTS)
        for place in _parameters(data)
    )


def is_either(data: Mapping[str, Any]) -> bool:
    """Could mergekit take the document too? Then nothing in it is a recipe's own."""
    names = param_names()
    return (
        all(key in TOP_LEVEL or key in IGNORED for key in data)
        and isinstance(data.get("merge_method"), str)
        and data["merge_method"] in METHODS
        and all(name in names for place in _parameters(data) for name in place)
    )


def _parameters(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The parameters of the document and of its models."""
    models = data.get("models")
    each = [model for model in models if isinstance(model, Mapping)] if isinstance(models, list) else []
    places = [data.get("parameters"), *(model.get("parameters") for model in each)]
    return [place for place in places if isinstance(place, Mapping)]
