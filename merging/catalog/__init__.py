"""The catalogue of merge methods. `GET /v1/methods`, `merganser methods` and the docs come from here.

Nothing here imports torch: an entry names its kernel, and :func:`load_kernel` imports it when it runs.
"""

from __future__ import annotations

import difflib
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import ValidationError

from merging.catalog import data, entrywise, linear, named, sparse, spectral
from merging.catalog.spec import Contract, Method, MethodParams, Paper
from merging.complaints import complaint
from merging.errors import InputError
from merging.recipe import Recipe

__all__ = [
    "Contract",
    "Method",
    "MethodParams",
    "Paper",
    "Resolved",
    "describe",
    "get",
    "load_kernel",
    "names",
    "resolve",
]

ALIASES = {"task_arithmetic": "linear", "cat": "linear"}
_FAMILIES = (linear, entrywise, sparse, named, spectral, data)


@cache
def _registry() -> Mapping[str, Method]:
    entries: dict[str, Method] = {}
    for family in _FAMILIES:
        for method in family.METHODS:
            if method.name in entries:
                raise ValueError(f"the method {method.name!r} is registered twice")
            entries[method.name] = method
    return dict(sorted(entries.items()))


def names() -> tuple[str, ...]:
    """The names of all methods, sorted."""
    return tuple(_registry())


def get(name: str) -> Method:
    """The method of that name. Raises ``unknown_method`` with the nearest names."""
    registry = _registry()
    method = registry.get(ALIASES.get(name, name))
    if method is None:
        near = difflib.get_close_matches(name[:64], registry, n=3)
        hint = f"Did you mean {', '.join(near)}?" if near else "See `merganser methods`."
        raise InputError(
            "unknown_method",
            f"there is no merge method {name[:64]!r}",
            remedy=hint,
            where={"field": "merge_method"},
        )
    return method


def describe(name: str | None = None) -> list[dict[str, Any]]:
    """Plain data of one method or of all."""
    return [get(name).to_dict()] if name else [method.to_dict() for method in _registry().values()]


def load_kernel(method: Method) -> Any:
    """Import the code of a method (this imports torch)."""
    module, _, attribute = method.kernel.partition(":")
    return getattr(importlib.import_module(module), attribute)


ISOTROPIC_NORM = 2.0
"""An update with a flat spectrum may be longer: see docs/benchmarks.md."""


@dataclass(frozen=True)
class Resolved:
    """A recipe's method with its parameters settled.

    ``params`` are the global ones; ``per_model[i]`` is the same object with the overrides of model ``i``
    (in the order of the recipe) applied.
    """

    method: Method
    space: str | None
    params: MethodParams
    per_model: tuple[MethodParams, ...]

    @property
    def auto_norm(self) -> float | None:
        """What ``lambda: auto`` aims at, in units of the mean norm of the inputs; None: ``auto`` is 1."""
        flat = getattr(self.params, "isotropize", False)
        return ISOTROPIC_NORM if flat else self.method.auto_norm


def resolve(recipe: Recipe) -> Resolved:
    """Check the recipe against its method's contract and settle the parameters.

    Raises :class:`InputError` naming the parameter: ``unknown_parameter``, ``invalid_parameter``,
    ``parameter_not_per_model``, ``space_not_supported``, ``too_few_models``, ``too_many_models``,
    ``output_not_supported``, ``isotropize_in_full_space``.
    """
    method = get(recipe.merge_method)
    _check_counts(method, len(recipe.models))
    space = _space(method, recipe.space)
    if recipe.output.format not in method.contract.outputs:
        raise InputError(
            "output_not_supported",
            f"{method.name} cannot write the output format {recipe.output.format!r}",
            remedy=f"It writes: {', '.join(method.contract.outputs)}.",
            where={"field": "output.format"},
        )
    given = dict(recipe.parameters)
    compat = given.get("compat")
    if compat is not None:
        preset = {"lambda": 1.0, **method.presets.get(str(compat), {})}
        given = {**preset, **given}
    params = _validate(method, given, "parameters")
    coordinates = hasattr(params, "core_gauge")  # the spectral methods find the same update in any space
    if space == "full" and coordinates and getattr(params, "isotropize", False):
        raise isotropize_in_full_space()
    per_model = []
    for index, entry in enumerate(recipe.models):
        where = f"models[{index}].parameters"
        for key in entry.parameters:
            if key not in method.per_model_names() and key in _names(method):
                raise InputError(
                    "parameter_not_per_model",
                    f"{where}: {key!r} cannot be given per model for {method.name}",
                    remedy="Move it to the recipe's parameters.",
                    where={"field": f"{where}.{key}", "model": entry.model},
                )
        per_model.append(_validate(method, {**given, **entry.parameters}, where))
    return Resolved(method, space, params, tuple(per_model))


def isotropize_in_full_space() -> InputError:
    """Why ``isotropize`` is refused there."""
    return InputError(
        "isotropize_in_full_space",
        "isotropize needs the small coordinates of `space: core` or `space: knots`",
        remedy="Set `space: core`, or use `iso_c` for the isotropic merge of the sum.",
        where={"field": "parameters.isotropize"},
    )


def _names(method: Method) -> tuple[str, ...]:
    return tuple(info.alias or name for name, info in method.Params.model_fields.items())


def _check_counts(method: Method, count: int) -> None:
    contract = method.contract
    if count < contract.min_models:
        raise InputError(
            "too_few_models",
            f"{method.name} needs at least {contract.min_models} models; the recipe has {count}",
            remedy="Add models, or choose another method.",
            where={"field": "models"},
        )
    if contract.max_models is not None and count > contract.max_models:
        raise InputError(
            "too_many_models",
            f"{method.name} takes at most {contract.max_models} models; the recipe has {count}",
            remedy="Leave some out, or choose another method.",
            where={"field": "models"},
        )


def _space(method: Method, space: str | None) -> str | None:
    if method.forced_space is not None and space in (None, method.forced_space):
        return method.forced_space
    if not method.contract.spaces:
        if space is None:
            return None
        raise InputError(
            "space_not_supported",
            f"{method.name} chooses its own coordinates and takes no space",
            remedy="Remove `space` from the recipe.",
            where={"field": "space"},
        )
    chosen = space or method.contract.spaces[0]
    if chosen not in method.contract.spaces:
        raise InputError(
            "space_not_supported",
            f"{method.name} is not meaningful in the space {chosen!r}",
            remedy=f"Use one of: {', '.join(method.contract.spaces)}.",
            where={"field": "space"},
        )
    return chosen


def _validate(method: Method, values: Mapping[str, Any], where: str) -> MethodParams:
    known = _names(method)
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key[:64], known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"It takes: {', '.join(known)}."
            raise InputError(
                "unknown_parameter",
                f"{where}: {method.name} has no parameter {key[:64]!r}",
                remedy=hint,
                where={"field": f"{where}.{key[:64]}"},
            )
    try:
        return method.Params.model_validate_json(json.dumps(dict(values)), strict=True)
    except ValidationError as error:
        found = complaint(error)
        field = f"{where}.{found.field}" if found.field else where
        said = (
            f"{where}.{found.sentence}" if found.field else f"{where}: {found.sentence.removeprefix('it: ')}"
        )
        raise InputError("invalid_parameter", said, where={"field": field}) from error
