"""What a recipe for whole models must fulfil, as far as headers can tell. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from merging import catalog
from merging.catalog import Resolved
from merging.dense.inputs import Model, is_entrywise
from merging.dense.table import Table, base_required
from merging.errors import InputError
from merging.formats.adapter import Adapter
from merging.formats.compatible import check_compatible
from merging.formats.conv1d import MODEL_TYPES
from merging.formats.task_vector import BASE_KEY
from merging.formats.tensor_set import TensorSet
from merging.recipe import Recipe


def resolve_dense(recipe: Recipe, *, whole: bool = True) -> Resolved:
    """The method with its parameters, or why it does not take dense inputs.

    For ``whole`` models ``lambda`` is 1 unless the recipe states it. Raises ``dense_inputs_unsupported``,
    ``space_not_supported`` and what :func:`merging.catalog.resolve` raises.
    """
    method = catalog.get(recipe.merge_method)
    contract = method.contract
    if not contract.dense_inputs:
        raise InputError(
            "dense_inputs_unsupported",
            f"{method.name} is defined on the factors of adapters; it merges no checkpoints or task vectors",
            remedy="Use one of: "
            + ", ".join(name for name in catalog.names() if catalog.get(name).contract.dense_inputs),
            where={"field": "merge_method"},
        )
    entrywise = is_entrywise(recipe.merge_method)
    if entrywise and recipe.space not in (None, "full"):
        raise InputError(
            "space_not_supported",
            f"the space {recipe.space!r} is made of the factors of adapters; checkpoints have none",
            remedy="Remove `space`, or set `space: full`.",
            where={"field": "space"},
        )
    update: dict[str, Any] = {"parameters": {**({"lambda": 1.0} if whole else {}), **recipe.parameters}}
    if entrywise:
        update["space"] = "full"
    resolved = catalog.resolve(recipe.model_copy(update=update))
    return resolved if entrywise else replace(resolved, space=None)


def stand_in(recipe: Recipe, resolved: Resolved, models: list[Model]) -> TensorSet | None:
    """A checkpoint that can play the base: a weighted mean of whole models is the same from any base."""
    whole = [model for model in models if isinstance(model, TensorSet) and model.format == "checkpoint"]
    if not whole:
        return None
    weights = [params.weight for params in resolved.per_model]
    mean = bool(getattr(resolved.params, "normalize", False)) or abs(sum(weights) - 1.0) < 1e-9
    if (
        resolved.method.name == "linear"
        and resolved.params.lambda_ == 1.0
        and mean
        and len(whole) == len(models)
    ):
        return whole[0]
    raise base_required(f"{resolved.method.name} of checkpoints")


def check_models(
    recipe: Recipe, base: TensorSet | None, models: list[Model], sums: Mapping[str, str], *, hashed: bool
) -> None:
    """Refuse models that do not go together, or not with the base; stated digests only where ``hashed``."""
    if recipe.prepare.balance:
        raise InputError(
            "prepare_unsupported",
            "prepare.balance rewrites the factors of adapters; checkpoints have none",
            where={"field": "prepare.balance"},
        )
    if recipe.output.format == "checkpoint" and base is None:
        raise base_required("a checkpoint")
    adapters = [model for model in models if isinstance(model, Adapter)]
    if len(adapters) > 1:
        check_compatible(
            adapters,
            missing_modules=recipe.missing_modules,
            allow_base_mismatch=recipe.allow_base_mismatch,
            modules_to_save="drop",
        )
    for model in models:
        stated = model.metadata.get(BASE_KEY) if isinstance(model, TensorSet) else None
        if hashed and stated is not None and base is not None and not recipe.allow_base_mismatch:
            _check_base(model, stated, base, sums)


def _check_base(model: Model, stated: str, base: TensorSet, sums: Mapping[str, str]) -> None:
    if stated != (sums.get(base.label) or base.digest):
        raise InputError(
            "base_mismatch",
            f"{model.label} states that it belongs to another base than {base.label}",
            remedy="Give its own base, or set allow_base_mismatch: true",
            where={"model": model.label, "field": "base_model"},
        )


def check_output(recipe: Recipe, resolved: Resolved, base: TensorSet | None, table: Table) -> None:
    """Refuse an output that the tensors or the base cannot give."""
    output = recipe.output
    if not any(job.inputs for job in table.jobs):
        raise InputError("nothing_to_merge", "no model holds a tensor of the base that could be merged")
    if output.format == "lora" and output.rank is None and output.energy is None:
        raise InputError(
            "rank_required",
            "the update of whole models has full rank; an adapter of it needs a rank",
            remedy="Set output.rank, or output.energy (for instance 0.9), or output.format: checkpoint",
            where={"field": "output.rank"},
        )
    config = (base.config if base is not None else None) or {}
    if output.format == "lora" and config.get("model_type") in MODEL_TYPES:
        raise InputError(
            "extraction_unsupported",
            f"{config['model_type']} stores its weights transposed; an adapter of it cannot be extracted",
            remedy="Set output.format: checkpoint or delta",
            where={"field": "output.format"},
        )
    if output.format != "lora":
        for field in ("energy", "max_rank") + (() if resolved.method.name == "svd" else ("rank",)):
            if getattr(output, field) is not None:
                raise InputError(
                    "rank_without_lora",
                    f"output.{field} is for adapters; the output is a {output.format}",
                    remedy="Set output.format: lora, or use merge_method svd with output.rank",
                    where={"field": f"output.{field}"},
                )
