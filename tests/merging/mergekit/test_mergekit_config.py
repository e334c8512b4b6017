"""Reading a configuration: what counts as one, what is accepted, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from merging.errors import InputError
from merging.mergekit.config import is_mergekit
from merging.mergekit.methods import METHODS, NOT_HERE
from merging.mergekit.reader import parse


def ties(**more: Any) -> dict[str, Any]:
    models = [{"model": "a", "parameters": {"weight": 1.0, "density": 0.5}}, {"model": "b"}]
    return {
        "merge_method": "ties",
        "base_model": "base",
        "models": models,
        "parameters": {"weight": 1},
    } | more


def refused(document: dict[str, Any]) -> InputError:
    with pytest.raises(InputError) as error:
        parse(document, "config.yaml")
    assert error.value.where.get("file", "config.yaml") == "config.yaml"
    return error.value


@pytest.mark.parametrize(
    "more",
    [
        {"dtype": "bfloat16"},
        {"out_dtype": "float16"},
        {"tokenizer_source": "base"},
        {"tokenizer": {"source": "union"}},
        {"slices": []},
        {"modules": {}},
        {"chat_template": "auto"},
        {"parameters": {"int8_mask": True}},
        {"merge_method": "passthrough"},
        {"merge_method": "model_stock"},
        {"parameters": {"density": [0.1, 0.9]}},
        {"models": [{"model": "a", "parameters": {"weight": [{"filter": "mlp", "value": 1}]}}]},
    ],
)
def test_what_only_mergekit_says_makes_a_document_its_configuration(more: dict[str, Any]) -> None:
    assert is_mergekit(ties(**more))


def test_what_a_recipe_can_say_makes_no_configuration() -> None:
    assert not is_mergekit(ties())
    assert not is_mergekit({**ties(), "output": {"format": "lora"}, "space": "core"})


@pytest.mark.parametrize("document", [None, [], "ties", {"dtype": "bfloat16"}])
def test_other_documents_are_no_configuration(document: Any) -> None:
    assert not is_mergekit(document)


def test_the_base_is_an_input_even_if_it_is_not_listed() -> None:
    config = parse(ties())
    assert [source.model for source in config.slices[0].sources] == ["a", "b", "base"]
    assert config.models == ("base", "a", "b")


def test_a_listed_base_keeps_its_place() -> None:
    config = parse(ties(models=[{"model": "base"}, {"model": "a"}]))
    assert [source.model for source in config.slices[0].sources] == ["base", "a"]


@pytest.mark.parametrize("name", sorted(NOT_HERE))
def test_methods_that_are_not_here_are_refused_by_name_with_what_comes_closest(name: str) -> None:
    error = refused(ties(merge_method=name))
    assert error.code == "mergekit_method_unsupported"
    assert name in error.message
    assert any(f"`{method}`" in (error.remedy or "") for method in METHODS)


def test_all_methods_of_mergekit_are_either_here_or_refused() -> None:
    every = (
        "linear slerp nuslerp multislerp karcher task_arithmetic ties dare_linear dare_ties della "
        "della_linear breadcrumbs breadcrumbs_ties sce model_stock arcee_fusion nearswap ram ramplus_tl "
        "passthrough"
    )
    assert sorted(every.split()) == sorted([*METHODS, *NOT_HERE])


@pytest.mark.parametrize(
    ("more", "code", "field"),
    [
        ({"merge_method": "tie"}, "mergekit_unknown_method", "merge_method"),
        ({"merge_method": None}, "mergekit_invalid", "merge_method"),
        ({"modules": {"text": {}}}, "mergekit_unsupported", "modules"),
        ({"chat_template": "auto"}, "mergekit_unsupported", "chat_template"),
        ({"tokenizer": {"source": "base", "tokens": {}}}, "mergekit_unsupported", "tokenizer.tokens"),
        ({"tokenizer": {"pad_to_multiple_of": 8}}, "mergekit_unsupported", "tokenizer.pad_to_multiple_of"),
        ({"tokenizer": {}, "tokenizer_source": "base"}, "mergekit_invalid", "tokenizer"),
        ({"output": {}}, "mergekit_unknown_key", "output"),
        ({"slices": [{}]}, "mergekit_invalid", "models"),
        ({"models": []}, "mergekit_invalid", "models"),
        ({"models": ["a"]}, "mergekit_invalid", "models[0]"),
        ({"models": [{"model": "a", "weight": 1}]}, "mergekit_unknown_key", "models[0].weight"),
        ({"models": [{"model": ""}]}, "mergekit_invalid", "models[0].model"),
        ({"models": [{"model": "a+lora"}]}, "mergekit_lora_reference", "models[0].model"),
        ({"models": [{"model": {"model": {"path": "a"}}}]}, "mergekit_unsupported", "models[0].model"),
        ({"models": [{"model": "a"}, {"model": "a"}]}, "mergekit_duplicate_model", "models"),
        ({"dtype": "float8"}, "mergekit_dtype", "dtype"),
        ({"out_dtype": "int64"}, "mergekit_dtype", "out_dtype"),
        ({"parameters": {"wieght": 1}}, "mergekit_unknown_parameter", "parameters.wieght"),
        ({"parameters": {"weight": "much"}}, "mergekit_parameter_value", "parameters.weight"),
        ({"parameters": {"normalize": 2}}, "mergekit_parameter_value", "parameters.normalize"),
        ({"parameters": []}, "mergekit_invalid", "parameters"),
        ({"compat": "peft"}, "mergekit_invalid", "compat"),
        ({"seed": -1}, "mergekit_invalid", "seed"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(more: dict[str, Any], code: str, field: str) -> None:
    error = refused(ties(**more))
    assert (error.code, error.where["field"]) == (code, field)


@pytest.mark.parametrize("layers", [None, [0], [2, 2], [-1, 2], [0, 1.5], [False, True], "0-2"])
def test_bad_layer_ranges_are_refused(layers: Any) -> None:
    document = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": "a", "layer_range": layers}]}],
    }
    assert refused(document).where["field"] == "slices[0].sources[0].layer_range"


def test_sources_of_a_slice_give_equally_many_layers() -> None:
    sources = [{"model": "a", "layer_range": [0, 2]}, {"model": "b", "layer_range": [0, 3]}]
    error = refused({"merge_method": "slerp", "base_model": "a", "slices": [{"sources": sources}]})
    assert error.where["field"] == "slices[0]"


def test_a_parameter_of_another_method_is_ignored_with_a_warning_as_in_mergekit() -> None:
    config = parse({"merge_method": "slerp", "base_model": "a", "parameters": {"t": 0.5, "density": 0.5},
                    "models": [{"model": "a"}, {"model": "b"}]})  # fmt: skip
    assert list(config.parameters) == ["t"]
    assert config.warnings == ("slerp does not read the parameter density; it is ignored",)


def test_a_word_that_is_nearly_right_is_answered_with_the_right_one() -> None:
    assert refused(ties(parameters={"wieght": 1})).remedy == "Did you mean weight?"
    assert refused(ties(merge_metod="x")).remedy == "Did you mean merge_method?"
    assert refused(ties(parameters={"xyz": 1})).remedy == "Remove it."


def test_dtypes_may_be_spelled_as_torch_does() -> None:
    assert parse(ties(dtype="torch.bfloat16")).dtype == "BF16"


def test_the_name_that_several_documents_go_by_says_nothing() -> None:
    assert parse(ties(name="step-one")).method.name == "ties"
