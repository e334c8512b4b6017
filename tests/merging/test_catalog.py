"""The catalogue: data that matches the code, and contracts checked before any tensor is read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from merging import catalog
from merging.errors import InputError
from merging.recipe import Recipe


def recipe(method: str = "ties", count: int = 2, **more: Any) -> Recipe:
    models = [{"model": f"m{i}"} for i in range(count)]
    return Recipe.load({"merge_method": method, "models": models, **more})


@pytest.mark.parametrize("name", catalog.names())
def test_every_entry_is_complete_and_runs_code(name: str) -> None:
    method = catalog.get(name)
    assert method.name == name
    assert catalog.load_kernel(method) is not None
    data = method.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["title"]
    assert data["summary"].endswith(".")
    assert set(data["defaults"]) == set(data["parameters"]["properties"])
    for parameter in data["parameters"]["properties"].values():
        assert parameter["description"]
    assert data["parameters"]["additionalProperties"] is False
    assert set(data["contract"]["spaces"]) <= {"full", "knots", "core"}
    if method.Params().lambda_ == "auto":
        assert method.auto_norm is not None


@pytest.mark.parametrize("name", catalog.names())
def test_defaults_are_accepted_as_parameters(name: str) -> None:
    method = catalog.get(name)
    count = max(2, method.contract.min_models)
    more = {"base_model": "base"} if method.contract.needs_base else {}
    resolved = catalog.resolve(recipe(name, count, parameters=method.defaults(), **more))
    assert resolved.params == method.Params()


def test_aliases_are_other_names_for_the_same_method() -> None:
    assert catalog.get("cat") is catalog.get("linear") is catalog.get("task_arithmetic")


@pytest.mark.parametrize(
    ("given", "code", "field"),
    [
        ({"merge_method": "tiess"}, "unknown_method", "merge_method"),
        ({"parameters": {"densty": 0.2}}, "unknown_parameter", "parameters.densty"),
        ({"parameters": {"density": "0.2"}}, "invalid_parameter", "parameters.density"),
        ({"parameters": {"density": True}}, "invalid_parameter", "parameters.density"),
        (
            {"parameters": {"compat": "peft", "majority_sign_method": "normmass"}},
            "invalid_parameter",
            "parameters",
        ),
        ({"parameters": {"compat": "peft", "agg": "sum"}}, "invalid_parameter", "parameters"),
        ({"parameters": {"compat": "peft", "normalize": True}}, "invalid_parameter", "parameters"),
        ({"parameters": {"normalize": True, "agg": "max"}}, "invalid_parameter", "parameters"),
        ({"parameters": {"isotropize": True}}, "isotropize_in_full_space", "parameters.isotropize"),
        ({"parameters": {"density": 0}}, "invalid_parameter", "parameters.density"),
        ({"parameters": {"density": 1.01}}, "invalid_parameter", "parameters.density"),
        ({"parameters": {"lambda": "large"}}, "invalid_parameter", "parameters.lambda"),
        ({"parameters": {"compat": "other"}}, "invalid_parameter", "parameters.compat"),
        (
            {"models": [{"model": "a", "parameters": {"agg": "sum"}}]},
            "parameter_not_per_model",
            "models[0].parameters.agg",
        ),
        (
            {"models": [{"model": "a", "parameters": {"wait": 1}}]},
            "unknown_parameter",
            "models[0].parameters.wait",
        ),
        ({"merge_method": "rmm", "output": {"format": "delta"}}, "output_not_supported", "output.format"),
    ],
)
def test_what_is_wrong_is_named(given: dict[str, Any], code: str, field: str) -> None:
    base: dict[str, Any] = {"merge_method": "ties", "models": [{"model": "a"}, {"model": "b"}]}
    with pytest.raises(InputError) as caught:
        catalog.resolve(Recipe.load({**base, **given}))
    assert caught.value.code == code
    assert caught.value.where["field"] == field


@pytest.mark.parametrize("space", ["core", "knots", "full"])
def test_spectral_methods_finish_isotropic_in_any_space(space: str) -> None:
    data = recipe("tsv", space=space, parameters={"isotropize": True})
    assert catalog.resolve(data).auto_norm == catalog.ISOTROPIC_NORM


def test_a_misspelt_method_is_answered_with_near_names() -> None:
    with pytest.raises(InputError, match="ties"):
        catalog.get("tiess")


def test_per_model_parameters_override_the_global_ones() -> None:
    data = {
        "merge_method": "ties",
        "models": [{"model": "a", "parameters": {"density": 0.9, "weight": 2.0}}, {"model": "b"}],
        "parameters": {"density": 0.3},
    }
    resolved = catalog.resolve(Recipe.load(data))
    assert [params.density for params in resolved.per_model] == [0.9, 0.3]  # type: ignore[attr-defined]
    assert [params.weight for params in resolved.per_model] == [2.0, 1.0]


def test_compat_modes_never_rescale_but_yield_to_the_recipe() -> None:
    assert catalog.resolve(recipe(parameters={"compat": "paper"})).params.lambda_ == 1.0
    explicit = catalog.resolve(recipe(parameters={"compat": "paper", "lambda": 0.4}))
    assert explicit.params.lambda_ == 0.4


def test_entrywise_methods_default_to_the_full_space() -> None:
    assert catalog.resolve(recipe()).space == "full"
    assert catalog.resolve(recipe(space="core")).space == "core"


def test_a_flat_spectrum_may_be_longer() -> None:
    plain, flat = (
        catalog.resolve(recipe("tsv", parameters={"isotropize": isotropize})) for isotropize in (False, True)
    )
    assert (plain.auto_norm, flat.auto_norm) == (catalog.get("tsv").auto_norm, 2.0)
