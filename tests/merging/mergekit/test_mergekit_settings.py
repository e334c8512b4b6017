"""Values of parameters: scalars, gradients over layers, filters by name."""

from __future__ import annotations

from typing import Any

import pytest

from merging.errors import InputError
from merging.mergekit.settings import MAX_STEPS, number, parse, truth


def at(value: Any, tensor: str = "model.layers.0.mlp.up_proj.weight", t: float = 0.0) -> Any:
    return parse(value, "weight").at(tensor, t, number)


def test_a_scalar_holds_everywhere() -> None:
    assert at(0.5) == at(0.5, "lm_head.weight", 1.0) == 0.5


def test_text_in_scientific_notation_is_a_number() -> None:
    assert at("1e-3") == 0.001


@pytest.mark.parametrize(("t", "expected"), [(0.0, 0.0), (0.25, 0.25), (0.5, 0.5), (0.75, 0.4), (1.0, 0.3)])
def test_a_gradient_is_interpolated_between_its_points(t: float, expected: float) -> None:
    assert at([0.0, 0.5, 0.3], t=t) == pytest.approx(expected)


def test_a_gradient_of_one_point_is_that_point() -> None:
    assert at([0.7], t=1.0) == 0.7


def test_the_first_filter_that_applies_counts() -> None:
    value = [{"filter": "mlp", "value": [0.0, 1.0]}, {"filter": "up_proj", "value": 5}, {"value": 0.25}]
    assert at(value, t=0.5) == 0.5
    assert at(value, "model.norm.weight") == 0.25


def test_a_filter_is_a_substring_and_no_pattern() -> None:
    assert at([{"filter": "m.p", "value": 1}, {"value": 2}]) == 2


def test_a_star_and_a_single_condition_apply() -> None:
    assert at({"filter": "*", "value": 3}) == 3
    assert at({"filter": "norm", "value": 3}) is None


def test_truth_values_are_not_interpolated() -> None:
    setting = parse([False, True, False], "normalize")
    assert [setting.at("x", t, truth) for t in (0.0, 0.49, 0.5, 0.99, 1.0)] == [
        False,
        False,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize(
    "value",
    [
        [],
        None,
        {"filter": "x"},
        {"value": 1, "regex": ".*"},
        {"filter": 3, "value": 1},
        [[1.0]],
        [{"value": 1}, 2],
        {"value": {"value": 1}},
        [1.0] * (MAX_STEPS + 1),
    ],
)
def test_other_shapes_are_refused(value: Any) -> None:
    with pytest.raises(InputError) as error:
        parse(value, "parameters.weight")
    assert error.value.code == "mergekit_parameter_value"
    assert error.value.where["field"].startswith("parameters.weight")


@pytest.mark.parametrize("value", [True, "abc", float("nan"), float("inf")])
def test_what_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"number|float|finite"):
        number(value)


@pytest.mark.parametrize("value", ["true", 2, 0.5])
def test_what_is_neither_true_nor_false_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="not true or false"):
        truth(value)
