"""What a user reads when a recipe, a parameter or a configuration has a wrong value."""

from __future__ import annotations

import datetime
import json
import math
from typing import Any

import pytest

from merging import catalog
from merging.errors import InputError
from merging.formats.peft_config import parse_adapter_config
from merging.recipe import Recipe

RECIPE: dict[str, Any] = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}]}


@pytest.mark.parametrize(
    ("change", "code", "field", "said"),
    [
        ({"modules_to_save": "foo"}, "recipe_invalid_value", "modules_to_save",
         "modules_to_save must be 'error', 'drop' or 'average', or an object"),
        ({"modules_to_save": {"take": 3}}, "recipe_invalid_value", "modules_to_save.take",
         "modules_to_save.take must be a valid string"),
        ({"modules_to_save": {}}, "recipe_missing_key", "modules_to_save.take",
         "modules_to_save.take is missing"),
        ({"modules_to_save": {"take": "a", "Tke": 1}}, "recipe_unknown_key", "modules_to_save.Tke",
         "unknown key 'modules_to_save.Tke'"),
        ({"models": []}, "recipe_invalid_value", "models", "models must have at least 1 item"),
        ({"models": [{}]}, "recipe_missing_key", "models.0.model", "models.0.model is missing"),
        ({"output": {"rank": 2, "energy": 0.5}}, "recipe_invalid_value", "output",
         "output: give rank or energy, not both"),
        ({"parameters": {"lambda": math.nan}}, "recipe_type", "parameters.lambda",
         "parameters.lambda is nan;"),
        ({"models": [{"model": "a", "parameters": {"weight": math.inf}}]}, "recipe_type",
         "models.0.parameters.weight", "models.0.parameters.weight is inf;"),
        ({"seed": datetime.date(2020, 1, 1)}, "recipe_type", "seed", "seed is a date;"),
        ({"output": {"dt\u202eype": 1}}, "recipe_unknown_key", "output.dt?ype",
         "unknown key 'output.dt?ype'"),
    ],
)  # fmt: skip
def test_a_recipe(change: dict[str, Any], code: str, field: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        Recipe.load({**RECIPE, **change})
    assert (caught.value.code, caught.value.where["field"]) == (code, field)
    assert caught.value.message.startswith(f"recipe: {said}")


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"lambda": "aut"}, "parameters.lambda must be a valid number, or 'auto'"),
        ({"weight": "1"}, "parameters.weight must be a valid number"),
        ({"compat": "no"}, "parameters.compat must be 'paper', 'peft' or 'mergekit'"),
    ],
)
def test_a_parameter(parameters: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        catalog.resolve(Recipe.load({**RECIPE, "parameters": parameters}))
    assert (caught.value.code, caught.value.message) == ("invalid_parameter", said)


def test_a_hostile_configuration_cannot_put_controls_into_the_message() -> None:
    config = {"peft_type": "LORA", "rank_pattern": {"q\u202e\n": "x"}}
    with pytest.raises(InputError) as caught:
        parse_adapter_config(json.dumps(config).encode())
    assert caught.value.code == "config_field"
    assert caught.value.message == "adapter_config.json: rank_pattern.q?? must be a valid integer"
