"""Is a document a mergekit configuration? No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from merging.errors import InputError
from merging.mergekit.config import is_either, is_mergekit
from merging.recipe import Recipe, read_document


def claimed(source: Any, resolve: Callable[[str], Path]) -> tuple[Mapping[str, Any], str] | None:
    """The document and its name if ``source`` (a mapping or a path) is for mergekit, else ``None``.

    It is if it says what a recipe cannot say (:func:`merging.mergekit.config.is_mergekit`), or if it says
    nothing that only a recipe can say and all its models are whole checkpoints: as a recipe it would lack
    an ``output``.
    """
    if isinstance(source, Recipe):
        return None
    data, name = read_document(source)
    if is_mergekit(data):
        return data, name
    if is_either(data) and _whole(data, resolve):
        return data, name
    return None


def _whole(data: Mapping[str, Any], resolve: Callable[[str], Path]) -> bool:
    from merging.formats.checkpoint_in import holds_checkpoint

    models = data.get("models")
    named = (
        [entry.get("model") for entry in models if isinstance(entry, Mapping)]
        if isinstance(models, list)
        else []
    )
    found = []
    for model in named:
        try:
            path = resolve(model) if isinstance(model, str) else None
        except InputError:
            path = None  # the reader of recipes reports it
        found.append(
            path is not None and not (path / "adapter_config.json").exists() and holds_checkpoint(path)
        )
    return bool(found) and all(found)
