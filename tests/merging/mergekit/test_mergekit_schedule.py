"""The table of a configuration, computed by hand: tensors, inputs, parameters per tensor, dtypes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from merging.errors import InputError
from merging.mergekit import reader as configs
from merging.mergekit.schedule import Output, Schedule, schedule


@dataclass(frozen=True)
class Info:
    dtype: str = "BF16"
    shape: tuple[int, ...] = (4, 4)


def model(layers: int = 3, **more: Info | None) -> dict[str, Info]:
    found: dict[str, Info] = {
        "model.embed_tokens.weight": Info(shape=(8, 4)),
        "model.norm.weight": Info(shape=(4,)),
    }
    for i in range(layers):
        found[f"model.layers.{i}.mlp.weight"] = Info()
        found[f"model.layers.{i}.attn.weight"] = Info()
    found["lm_head.weight"] = Info(shape=(8, 4))
    for name, info in more.items():
        key = name.replace("__", ".")
        if info is None:
            del found[key]
        else:
            found[key] = info
    return found


def table(document: dict[str, Any], **models: dict[str, Info]) -> Schedule:
    config = configs.parse(document)
    return schedule(config, {name: models.get(name, model()) for name in config.models})


def by_name(found: Schedule) -> dict[str, Output]:
    return {output.name: output for output in found.outputs}


def refused(document: dict[str, Any], **models: dict[str, Info]) -> InputError:
    with pytest.raises(InputError) as error:
        table(document, **models)
    return error.value


def linear(**more: Any) -> dict[str, Any]:
    models = [{"model": "a", "parameters": {"weight": 0.5}}, {"model": "b", "parameters": {"weight": 0.5}}]
    return {"merge_method": "linear", "models": models} | more


TASK = {
    "merge_method": "task_arithmetic",
    "base_model": "base",
    "models": [{"model": "a", "parameters": {"weight": [0.0, 1.0]}}, {"model": "b"}],
    "parameters": {"weight": [{"filter": "attn", "value": 0.25}, {"value": 0.75}]},
}


def test_every_tensor_of_the_models_is_made_once_embeddings_first() -> None:
    found = table(linear())
    names = [output.name for output in found.outputs]
    assert sorted(names) == sorted(model())
    assert names[0] == "model.embed_tokens.weight"
    assert names[-2:] == ["lm_head.weight", "model.norm.weight"]


def test_a_gradient_runs_over_the_layers_and_starts_outside_them() -> None:
    found = by_name(table(TASK))
    weights = [found[f"model.layers.{i}.mlp.weight"].values.inputs[0]["weight"] for i in range(3)]
    assert weights == [0.0, 0.5, 1.0]
    assert found["lm_head.weight"].values.inputs[0]["weight"] == 0.0


def test_a_model_without_a_value_takes_the_global_one_for_its_tensor() -> None:
    found = by_name(table(TASK))
    assert found["model.layers.1.attn.weight"].values.inputs[1]["weight"] == 0.25
    assert found["model.layers.1.mlp.weight"].values.inputs[1]["weight"] == 0.75


def test_the_base_is_the_last_input_and_has_no_task_parameters() -> None:
    output = by_name(table(TASK))["model.norm.weight"]
    assert [item.model for item in output.inputs] == ["a", "b", "base"]
    assert output.base == 2
    assert dict(output.values.inputs[2]) == {}


def test_defaults_are_those_of_mergekit() -> None:
    document = {**TASK, "merge_method": "ties"}
    output = by_name(table(document))["model.norm.weight"]
    assert output.values.shared == {"int8_mask": False, "normalize": True, "rescale": False, "lambda": 1.0}
    assert output.values.inputs[0]["density"] == 1.0


FRANKEN = {
    "merge_method": "passthrough",
    "slices": [
        {"sources": [{"model": "a", "layer_range": [0, 2]}]},
        {
            "sources": [
                {"model": "b", "layer_range": [1, 3], "parameters": {"scale": {"filter": "mlp", "value": 2}}}
            ],
            "parameters": {"scale": [0.5, 1.5]},
        },
    ],
    "parameters": {"scale": 9},
}


def test_slices_are_stacked_and_renumbered() -> None:
    found = table(FRANKEN)
    outputs = by_name(found)
    sources = [outputs[f"model.layers.{i}.attn.weight"].inputs[0] for i in range(4)]
    assert [(item.model, item.tensor) for item in sources] == [
        ("a", "model.layers.0.attn.weight"),
        ("a", "model.layers.1.attn.weight"),
        ("b", "model.layers.1.attn.weight"),
        ("b", "model.layers.2.attn.weight"),
    ]
    assert found.layers == 4
    assert found.donor == "a"


def test_embeddings_come_from_the_first_slice_and_the_head_from_the_last() -> None:
    outputs = by_name(table(FRANKEN))
    assert outputs["model.embed_tokens.weight"].inputs[0].model == "a"
    assert outputs["model.norm.weight"].inputs[0].model == "b"
    assert outputs["lm_head.weight"].inputs[0].model == "b"


def test_the_source_of_a_slice_goes_before_the_slice_and_that_before_the_whole() -> None:
    outputs = by_name(table(FRANKEN))

    def scale(name: str) -> Any:
        return outputs[name].values.inputs[0]["scale"]

    assert scale("model.layers.0.mlp.weight") == 9
    assert scale("model.layers.2.mlp.weight") == scale("model.layers.3.mlp.weight") == 2
    assert (scale("model.layers.2.attn.weight"), scale("model.layers.3.attn.weight")) == (0.5, 1.5)


def test_a_slice_of_one_layer_takes_the_end_of_a_gradient() -> None:
    document = {"merge_method": "passthrough", "parameters": {"scale": [0.0, 1.0]},
                "slices": [{"sources": [{"model": "a", "layer_range": [1, 2]}]}]}  # fmt: skip
    assert by_name(table(document))["model.layers.0.mlp.weight"].values.inputs[0]["scale"] == 1.0


def test_filters_of_inputs_see_the_name_in_the_input_and_shared_ones_that_of_the_output() -> None:
    sources = [{"model": "base", "layer_range": [2, 3]}, {"model": "a", "layer_range": [1, 2]}]
    document = {
        "merge_method": "ties",
        "base_model": "base",
        "slices": [{"sources": sources}],
        "parameters": {
            "weight": [{"filter": "layers.1.", "value": 1}, {"value": 0.5}],
            "lambda": [{"filter": "layers.0.", "value": 7}, {"value": 8}],
        },
    }
    output = by_name(table(document))["model.layers.0.mlp.weight"]
    assert output.values.inputs[1]["weight"] == 1
    assert output.values.shared["lambda"] == 7


@pytest.mark.parametrize(
    ("more", "stored", "dtype", "out_dtype"),
    [
        ({}, ("BF16", "BF16"), "BF16", "BF16"),
        ({}, ("BF16", "F16"), "F32", "F32"),
        ({}, ("F16", "F64"), "F64", "F64"),
        ({"dtype": "float16"}, ("BF16", "F32"), "F16", "F16"),
        ({"dtype": "float32", "out_dtype": "bfloat16"}, ("BF16", "BF16"), "F32", "BF16"),
        ({"out_dtype": "bfloat16"}, ("F32", "F32"), "F32", "BF16"),
    ],
)
def test_the_dtypes_of_the_work_and_of_the_file(
    more: dict[str, Any], stored: tuple[str, str], dtype: str, out_dtype: str
) -> None:
    models = {name: {"x.weight": Info(kind)} for name, kind in zip("ab", stored, strict=True)}
    output = by_name(table(linear(**more), **models))["x.weight"]
    assert (output.dtype, output.out_dtype) == (dtype, out_dtype)


def test_whole_numbers_and_frequencies_are_copied() -> None:
    extra = {"model__ids": Info("I64", (3,)), "model__layers__0__rotary_emb__inv_freq": Info("F32", (2,))}
    whole = model()
    whole["model.ids"] = extra["model__ids"]
    whole["model.layers.0.self_attn.rotary_emb.inv_freq"] = Info("F32", (2,))
    found = by_name(table(linear(dtype="bfloat16"), a=whole, b=whole))
    assert found["model.ids"].copy
    assert found["model.ids"].out_dtype == "I64"
    frequencies = found["model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert frequencies.copy
    assert frequencies.out_dtype == "F32"


def test_a_tied_head_stands_in_for_a_missing_one() -> None:
    found = by_name(table(linear(), b=model(lm_head__weight=None)))
    assert [item.tensor for item in found["lm_head.weight"].inputs] == [
        "lm_head.weight",
        "model.embed_tokens.weight",
    ]


def test_a_head_that_no_model_has_is_not_made() -> None:
    tied = model(lm_head__weight=None)
    assert "lm_head.weight" not in by_name(table(linear(), a=tied, b=tied))


@pytest.mark.parametrize(
    ("document", "models", "code"),
    [
        (linear(), {"b": model(model__norm__weight=None)}, "mergekit_tensor_missing"),
        (linear(), {"b": model(model__bias=Info())}, "mergekit_tensor_extra"),
        (linear(), {"b": model(layers=2)}, "mergekit_layers"),
        (linear(), {"b": model(model__norm__weight=Info(shape=(5,)))}, "mergekit_shape_mismatch"),
        (linear(), {"a": model(model__norm__weight=Info("I8", (4,)))}, "mergekit_buffer"),
        (linear(), {n: model(model__norm__weight=Info("F8_E4M3", (4,))) for n in "ab"}, "mergekit_dtype"),
        (linear(base_model="base"), {}, "mergekit_parameter_missing"),
        ({**TASK, "base_model": None}, {}, "mergekit_base_required"),
        ({**TASK, "merge_method": "slerp", "parameters": {"t": 0.5}}, {}, "mergekit_input_count"),
        ({**FRANKEN, "slices": [{"sources": [{"model": "a", "layer_range": [0, 9]}]}]}, {},
         "mergekit_layers"),
        ({**TASK, "merge_method": "ties", "parameters": {"weight": 1, "density": -0.1}}, {},
         "mergekit_parameter_range"),
        ({**TASK, "merge_method": "della", "parameters": {"weight": 1, "density": 0.1}}, {},
         "mergekit_parameter_range"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_any_work(
    document: dict[str, Any], models: dict[str, dict[str, Info]], code: str
) -> None:
    assert refused(document, **models).code == code
