"""The references of a recipe to data: found and replaced, for whoever resolves references. No torch here."""

from __future__ import annotations

from collections.abc import Mapping

from merging.recipe import DATA_KEYS, Recipe


def data_references(recipe: Recipe) -> dict[str, str]:
    """Field of the recipe -> what it refers to: samples, statistics, heads, a tokenizer."""
    found = {}
    for index, entry in enumerate(recipe.models):
        for key in DATA_KEYS:
            value = getattr(entry, key)
            if value is not None:
                found[f"models[{index}].{key}"] = value
    if recipe.calibration is not None:
        for key in ("data", "tokenizer"):
            value = getattr(recipe.calibration, key)
            if value is not None:
                found[f"calibration.{key}"] = value
    return found


def renamed_data(recipe: Recipe, names: Mapping[str, str]) -> Recipe:
    """The recipe with other references to data."""

    def new(value: str | None) -> str | None:
        return None if value is None else names.get(value, value)

    models = tuple(
        entry.model_copy(update={key: new(getattr(entry, key)) for key in DATA_KEYS})
        for entry in recipe.models
    )
    calibration = recipe.calibration
    if calibration is not None:
        update = {"data": new(calibration.data), "tokenizer": new(calibration.tokenizer)}
        calibration = calibration.model_copy(update=update)
    return recipe.model_copy(update={"models": models, "calibration": calibration})
