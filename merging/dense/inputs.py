"""Open what a dense merge takes: checkpoints, task vectors and adapters of one base. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from merging import catalog
from merging.errors import InputError
from merging.formats.adapter import READERS, Adapter, open_adapter
from merging.formats.checkpoint_in import CONFIG_NAME, holds_checkpoint, open_checkpoint
from merging.formats.guard import check_safetensors
from merging.formats.source import Source
from merging.formats.tails import refuse_unsupported
from merging.formats.task_vector import holds_task_vector, open_task_vector
from merging.formats.tensor_set import TensorSet
from merging.recipe import Recipe

Model = TensorSet | Adapter
Resolve = Callable[[str], Path]

ADAPTER_CONFIG = "adapter_config.json"


def is_dense(path: Path) -> bool:
    """Whether the model at ``path`` is a checkpoint or a task vector rather than an adapter."""
    if path.is_dir() and (path / ADAPTER_CONFIG).exists():
        return False
    return holds_checkpoint(path) or holds_task_vector(path) or _is_plain_file(path)


def _is_plain_file(path: Path) -> bool:
    """Whether a single file is of no family of adapters: then its tensors are weights, whatever its name."""
    if not path.is_file() or path.suffix != ".safetensors" or (path.parent / ADAPTER_CONFIG).exists():
        return False
    header = check_safetensors(path)
    source = Source(path.parent, path, None, single=True)
    try:
        refuse_unsupported(header.tensors, path.name)
    except InputError:
        return False  # an adapter, though none that is supported
    return not any(reader.recognises(source, header) for reader in READERS)


def open_model(path: Path, label: str) -> Model:
    """Open one input of a dense merge, whatever it is."""
    if path.is_dir() and (path / ADAPTER_CONFIG).exists():
        return open_adapter(path, label=label)
    if holds_checkpoint(path):
        return open_checkpoint(path, label=label)
    if holds_task_vector(path):
        return open_task_vector(path, label=label)
    if _is_plain_file(path) or (path.is_dir() and (path / CONFIG_NAME).exists()):
        return open_checkpoint(path, label=label)  # or why it is none
    return open_adapter(path, label=label)


def wants_dense(recipe: Recipe, resolve: Resolve) -> bool:
    """Whether a recipe needs the dense route: for dense inputs, or entries of adapters to a checkpoint."""
    if recipe.output.format == "checkpoint":
        return not wants_fusing(recipe, resolve)
    if catalog.get(recipe.merge_method).contract.initial:
        return False  # there are no models yet
    return any(is_dense(resolve(entry.model)) for entry in recipe.models)


def wants_fusing(recipe: Recipe, resolve: Resolve) -> bool:
    """Whether adapters are merged into one adapter first, which is then added to the base.

    That is how adapters become a checkpoint, but for methods whose result is no adapter: those that treat
    the entries of whole matrices.
    """
    if recipe.output.format != "checkpoint" or any(is_dense(resolve(entry.model)) for entry in recipe.models):
        return False
    entries = is_entrywise(recipe.merge_method) and recipe.space in (None, "full")
    return not entries or catalog.get(recipe.merge_method).name in ("linear", "slerp")


def is_entrywise(name: str) -> bool:
    """Whether a method acts on the entries in full space unless told otherwise."""
    return catalog.get(name).contract.spaces[:1] == ("full",) and catalog.get(name).name != "svd"


def open_base(recipe: Recipe, resolve: Resolve) -> TensorSet | None:
    """The base checkpoint of a recipe, if it names one."""
    if recipe.base_model is None:
        return None
    try:
        path = resolve(recipe.base_model)
    except InputError as error:
        if error.code != "model_not_found":
            raise
        raise InputError(
            "base_model_not_found",
            f"there is no base model at {recipe.base_model!r}",
            remedy="Give the folder of the base checkpoint as `base_model`.",
            where={"model": recipe.base_model, "field": "base_model"},
        ) from error
    return open_checkpoint(path, label=recipe.base_model)
