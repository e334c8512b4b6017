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
    return (data, name) if claims(data, lambda model: _is_whole(model, resolve)) else None


def claims(data: Mapping[str, Any], is_whole: Callable[[str], bool]) -> bool:
    """The same of a parsed document; ``is_whole`` tells whether a model is a whole checkpoint."""
    if is_mergekit(data):
        return True
    models = data.get("models")
    if not is_either(data) or not isinstance(models, list):
        return False
    named = [entry.get("model") for entry in models if isinstance(entry, Mapping)]
    return bool(named) and all(isinstance(model, str) and is_whole(model) for model in named)


def _is_whole(model: str, resolve: Callable[[str], Path]) -> bool:
    from merging.formats.checkpoint_in import holds_checkpoint

    try:
        path = resolve(model)
    except InputError:
        return False  # the reader of recipes reports it
    return not (path / "adapter_config.json").exists() and holds_checkpoint(path)
