"""adapter_config.json: nothing but a configuration or one clear refusal comes out."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from merging.errors import InputError
from merging.formats.peft_config import AdapterConfig, parse_adapter_config
from merging.formats.peft_out import ResultModule, adapter_config

FIELDS = [*AdapterConfig.model_fields, "use_dora", "megatron_core", "x"]
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
anything = st.recursive(
    scalars | st.sampled_from(["LORA", "none", "all", "pissa", "gaussian"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=500, deadline=None)
@given(fields=st.dictionaries(st.sampled_from(FIELDS), anything, max_size=5))
@example(fields={"r": True})
@example(fields={"file": "/etc/passwd"})
@example(fields={"notes": ["x"]})
def test_any_json_is_a_configuration_or_a_refusal(fields: dict[str, Any]) -> None:
    data = json.dumps({"peft_type": "LORA", **fields}).encode()
    try:
        config = parse_adapter_config(data, file="f.json")
    except InputError as error:
        json.dumps(error.to_dict(), ensure_ascii=False).encode()
        return
    assert config.file == "f.json"
    assert type(config.r) is int
    assert config.rank_of("a.b") >= 1


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=60) | st.text(alphabet='{}[]",:0aLORA\\ ', max_size=40).map(str.encode))
def test_any_bytes_are_a_configuration_or_a_refusal(data: bytes) -> None:
    with pytest.raises(InputError):
        parse_adapter_config(data)


def test_what_peft_writes_is_read(tmp_path: Any) -> None:
    LoraConfig(r=4, lora_alpha=3, target_modules=["q"], rank_pattern={"a": 2}).save_pretrained(tmp_path)
    config = parse_adapter_config((tmp_path / "adapter_config.json").read_bytes())
    assert (config.r, config.lora_alpha, config.target_modules) == (4, 3, ("q",))
    assert config.rank_pattern == {"a": 2}
    assert config.notes == ()


def test_patterns_keep_the_order_of_the_file() -> None:
    config = parse_adapter_config(b'{"peft_type": "LORA", "rank_pattern": {"b.*": 2, ".*": 3, "a": 4}}')
    assert [config.rank_of(path) for path in ("b.x", "a", "c")] == [2, 3, 3]


def test_a_byte_order_mark_is_accepted() -> None:
    assert parse_adapter_config(b'\xef\xbb\xbf{"peft_type": "LORA", "r": 3, "lora_alpha": 1}').r == 3


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_safe_initialisations_are_accepted(init: Any) -> None:
    config = {"peft_type": "LORA", "r": 3, "init_lora_weights": init}
    assert parse_adapter_config(json.dumps(config).encode()).r == 3


def module(name: str, rank: int) -> ResultModule:
    return ResultModule(name, "linear", 4, 3, rank, (4, 3))


def test_the_most_common_rank_is_the_default_and_the_larger_one_of_a_tie() -> None:
    config = adapter_config([module("a.x", 2), module("a.y", 2), module("b.x", 4), module("b.y-1", 4)])
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    assert config["rank_pattern"] == config["alpha_pattern"] == {r"^a\.x": 2, r"^a\.y": 2}
    assert config["target_modules"] == ["a.x", "a.y", "b.x", "b.y-1"]


def test_written_fields_are_all_known_to_peft_and_to_us() -> None:
    config = adapter_config([module("a.x", 2)], base_model="org/base", revision="abc", task_type="CAUSAL_LM")
    LoraConfig(**{key: value for key, value in config.items() if key != "peft_type"})
    read = parse_adapter_config(json.dumps(config).encode())
    assert (read.base_model_name_or_path, read.revision, read.task_type) == ("org/base", "abc", "CAUSAL_LM")


@pytest.mark.parametrize(
    ("task_type", "saved", "written"),
    [
        ("SEQ_CLS", (), None),
        ("SEQ_CLS", ("score",), "SEQ_CLS"),
        ("QUESTION_ANS", ("classifier",), None),
        ("CAUSAL_LM", (), "CAUSAL_LM"),
        ("SOMETHING_ELSE", (), None),
        (None, (), None),
    ],
)
def test_a_task_type_is_written_only_when_peft_could_load_it(
    task_type: str | None, saved: tuple[str, ...], written: str | None
) -> None:
    config = adapter_config([module("a.x", 2)], task_type=task_type, modules_to_save=saved)
    assert config["task_type"] == written


def test_a_result_needs_modules_with_ranks() -> None:
    with pytest.raises(InputError) as caught:
        adapter_config([])
    assert caught.value.code == "empty_result"
    with pytest.raises(ValueError, match="rank 0"):
        adapter_config([module("a", 0)])
    with pytest.raises(ValueError, match="rank 3"):
        adapter_config([module("mha", 2), module("mha.base_layer.out_proj", 3)])
