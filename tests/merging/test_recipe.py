"""Recipes: strict in what they accept, exact in what they say, stable in what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merging.errors import InputError
from merging.recipe import Recipe

HEAD = "merge_method: ties\nmodels: [{model: a}]\n"
GOOD = {"merge_method": "ties", "models": [{"model": "a"}, {"model": "b"}]}


def test_yaml_and_mappings_mean_the_same(tmp_path: Path) -> None:
    text = """
merge_method: ties
space: core
models:
  - model: a
    parameters: {weight: 1e-3}
  - model: b
parameters: {density: 0.2, lambda: auto}
output: {format: lora, rank: 8}
seed: 3
"""
    (tmp_path / "recipe.yaml").write_text(text)
    from_file = Recipe.load(tmp_path / "recipe.yaml")
    assert from_file == Recipe.parse(text)
    assert from_file.models[0].parameters == {"weight": 0.001}
    assert Recipe.parse(from_file.to_yaml()) == from_file
    assert Recipe.load(from_file) is from_file


@pytest.mark.parametrize(
    ("text", "code", "field"),
    [
        ("a: 1", "recipe_missing_key", "merge_method"),
        ("[1, 2]", "recipe_not_a_mapping", None),
        ("merge_method: [", "recipe_not_yaml", None),
        ("merge_method: ties\nmodels: []", "recipe_invalid_value", "models"),
        (HEAD + "foo: 1", "recipe_unknown_key", "foo"),
        ("merge_method: ties\nmodels: [{model: a, wait: 1}]", "recipe_unknown_key", "models.0.wait"),
        (HEAD + "output: {rang: 1}", "recipe_unknown_key", "output.rang"),
        (HEAD + "seed: 1.5", "recipe_invalid_value", "seed"),
        (HEAD + "seed: -1", "recipe_invalid_value", "seed"),
        (HEAD + "seed: true", "recipe_invalid_value", "seed"),
        (HEAD + "space: cor", "recipe_invalid_value", "space"),
        (HEAD + "output: {rank: 0}", "recipe_invalid_value", "output.rank"),
        (HEAD + "output: {rank: '8'}", "recipe_invalid_value", "output.rank"),
        (
            HEAD + "output: {rank: 8, energy: 0.5}",
            "recipe_invalid_value",
            "output",
        ),
        (HEAD + "output: {format: delta, uniform_rank: true}", "recipe_invalid_value", "output"),
        (HEAD + "parameters: {x: .inf}", "recipe_type", None),
        (HEAD + "parameters: {x: 2020-01-01}", "recipe_type", None),
        ("models: &m [{model: a}]\nmerge_method: *m", "recipe_not_yaml", None),
        ("merge_method: a\nmerge_method: b", "recipe_not_yaml", None),
        ("? [a, b]\n: 1", "recipe_not_yaml", None),
        ("1: 2", "recipe_not_yaml", None),
        ("!!python/object/apply:os.system ['true']", "recipe_not_yaml", None),
        (HEAD + "compat: peft\nparameters: {compat: paper}",
         "recipe_invalid_value", "compat"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(text: str, code: str, field: str | None) -> None:
    with pytest.raises(InputError) as caught:
        Recipe.parse(text)
    assert caught.value.code == code
    if field is not None:
        assert caught.value.where["field"] == field


def test_deep_or_huge_documents_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        Recipe.parse("[" * 100_000)
    assert caught.value.code == "recipe_not_yaml"
    (tmp_path / "big.yaml").write_text("#" * (2 << 20))
    with pytest.raises(InputError) as caught:
        Recipe.load(tmp_path / "big.yaml")
    assert caught.value.code == "recipe_too_large"
    with pytest.raises(InputError) as caught:
        Recipe.load(tmp_path / "none.yaml")
    assert caught.value.code == "recipe_unreadable"


def test_compat_may_stand_at_the_top() -> None:
    assert Recipe.load({**GOOD, "compat": "peft"}).parameters == {"compat": "peft"}


def test_the_digest_ignores_the_order_and_the_names_of_models() -> None:
    one = Recipe.load(GOOD)
    two = Recipe.load({**GOOD, "models": [{"model": "other/b"}, {"model": "a"}]})
    assert one.digest({"a": "1" * 64, "b": "2" * 64}) == two.digest({"a": "1" * 64, "other/b": "2" * 64})


@given(
    st.sampled_from(
        [
            {"seed": 1},
            {"parameters": {"density": 0.3}},
            {"output": {"rank": 2}},
            {"space": "core"},
            {"models": [{"model": "a"}]},
            {"models": [{"model": "a", "parameters": {"weight": 2.0}}, {"model": "b"}]},
            {"modules_to_save": {"take": "a"}},
        ]
    )
)
def test_the_digest_sees_every_change(change: dict[str, Any]) -> None:
    digests = {"a": "1" * 64, "b": "2" * 64}
    assert Recipe.load(GOOD).digest(digests) != Recipe.load({**GOOD, **change}).digest(digests)
