"""What a request for a merge describes: a recipe, or a mergekit configuration.

A record keeps either as JSON data. A configuration is told by ``compat: mergekit`` at the top, where a recipe
in a record has it among its parameters.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from merging.errors import InputError
from merging.mergekit.config import MergekitConfig
from merging.mergekit.reader import parse
from merging.recipe import Recipe

MAX_LAYERS = 2000
"""Of the result of a configuration; large models have a hundred or two, and a plan lists every tensor."""


@dataclass(frozen=True)
class Configuration:
    """A mergekit configuration that was read without complaint, with ``compat`` and ``seed`` written out."""

    document: dict[str, Any]

    @classmethod
    def read(cls, document: Mapping[str, Any], name: str = "configuration") -> Configuration:
        """Raises the ``mergekit_*`` errors, and ``recipe_type`` for what is not plain JSON data."""
        try:
            json.dumps(document, allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(
                "recipe_type",
                f"{name} holds a value that is not plain JSON data: {error}",
                where={"file": name},
            ) from error
        config = parse(document, name)
        _check_size(config, name)
        return cls({**document, "compat": "mergekit", "seed": config.seed})

    def references(self) -> dict[str, str]:
        """Where in the document -> the model that is named there."""
        found: dict[str, str] = {}

        def note(field: str, model: str) -> str:
            found[field] = model
            return model

        _visited(self.document, note)
        return found

    def renamed(self, names: Mapping[str, str]) -> Configuration:
        """The configuration with other references for its models."""
        return Configuration(_visited(self.document, lambda _, model: names.get(model, model)))


Work = Recipe | Configuration


def kept(document: Mapping[str, Any]) -> Work:
    """What a record describes."""
    return Configuration(dict(document)) if _is_configuration(document) else Recipe.load(document)


def document_of(work: Work) -> dict[str, Any]:
    """What a record keeps."""
    return work.document if isinstance(work, Configuration) else work.model_dump(mode="json")


def output_format(document: Mapping[str, Any]) -> str:
    """The format of the result of what a record keeps: ``lora``, ``delta`` or ``checkpoint``."""
    if _is_configuration(document):
        return "checkpoint"
    return str(document.get("output", {}).get("format", "lora"))


def _is_configuration(document: Mapping[str, Any]) -> bool:
    return document.get("compat") == "mergekit"


def _check_size(config: MergekitConfig, name: str) -> None:
    runs = [part.sources[0].layers for part in config.slices]
    layers = sum(run[1] - run[0] for run in runs if run is not None)
    if layers > MAX_LAYERS:
        raise InputError(
            "mergekit_too_many_layers",
            f"{name}: slices ask for {layers} layers; the limit is {MAX_LAYERS}",
            where={"file": name, "field": "slices"},
        )


def _visited(document: Mapping[str, Any], visit: Callable[[str, str], str]) -> dict[str, Any]:
    """A copy of a well-formed document with ``visit(field, model)`` in place of every reference."""

    def entry(data: Mapping[str, Any], field: str, *keys: str) -> dict[str, Any]:
        start = f"{field}." if field else ""
        new = {key: visit(f"{start}{key}", data[key]) for key in keys if data.get(key) is not None}
        return {**data, **new}

    copy = entry(document, "", "base_model")
    if document.get("models"):
        copy["models"] = [entry(model, f"models[{i}]", "model") for i, model in enumerate(document["models"])]
    if document.get("slices"):
        copy["slices"] = [
            {
                **entry(part, f"slices[{i}]", "base_model"),
                "sources": [
                    entry(source, f"slices[{i}].sources[{j}]", "model")
                    for j, source in enumerate(part["sources"])
                ],
            }
            for i, part in enumerate(document["slices"])
        ]
    block = document.get("tokenizer")
    if block is not None and block.get("source") not in (None, "base", "union"):
        copy["tokenizer"] = entry(block, "tokenizer", "source")
    if document.get("tokenizer_source") in (None, "base", "union"):
        return copy
    return entry(copy, "", "tokenizer_source")
