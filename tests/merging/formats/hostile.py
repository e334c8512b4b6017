"""Hostile and broken adapters, each with the code that must refuse it.

``cases()`` is used by the tests of the library and of the service alike: ``build`` writes the files of one
adapter into an empty folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from formats.build import CONFIG, PAIR, PREFIX, Case, Shapes, write_adapter
from formats.hostile_files import contents, headers
from formats.hostile_images import image_cases

A, B = PAIR

__all__ = ["Case", "cases"]


def cases() -> list[Case]:
    """All of them; names are unique."""
    return [*headers(), *contents(), *_configs(), *_patterns(), *_modules(), *_folders(), *image_cases()]


def _config(name: str, code: str, **fields: Any) -> Case:
    return Case(f"config_{name}", partial(write_adapter, **fields), code)


def _configs() -> Iterator[Case]:
    def raw(name: str, data: bytes, code: str) -> Case:
        return Case(f"config_{name}", partial(write_adapter, config=data), code)

    text = json.dumps(CONFIG)
    yield raw("empty", b"", "config_not_json")
    yield raw("list", b"[]", "config_not_json")
    yield raw("not_utf8", b'{"peft_type": "\xff"}', "config_not_json")
    yield raw("nested", b'{"a":' + b"[" * 400_000, "config_not_json")
    yield raw("huge_number", b'{"r":' + b"9" * 500_000 + b"}", "config_not_json")
    yield raw("nan", text.replace("4", "NaN", 1).encode(), "config_not_json")
    yield raw("infinite", text.replace('"lora_alpha": 4', '"lora_alpha": 1e999').encode(), "config_field")
    yield raw("too_large", text.encode() + b" " * (1 << 20), "config_too_large")
    yield raw("duplicate", text.replace('"r": 2', '"r": 2, "r": 4').encode(), "config_duplicate_key")
    many = ",".join(f'"{i}":0' for i in range(80_000))
    yield raw("many_duplicates", f'{{{many},"79999":0}}'.encode(), "config_duplicate_key")
    yield _config("no_peft_type", "peft_type_unsupported", drop=("peft_type",))
    for kind in ("ADALORA", "LOHA", "LOKR", "VERA", "IA3", "OFT", "PROMPT_TUNING", "NEW", 7, ["LORA"]):
        yield _config(f"peft_type_{kind}", "peft_type_unsupported", peft_type=kind)
    yield raw("surrogate_key", b'{"\\ud800": 1, "peft_type": "LORA"}', "config_not_json")
    yield raw("surrogate_twice", b'{"\\ud800": 1, "\\ud800": 2}', "config_duplicate_key")
    yield _config("base_with_newline", "config_field", base_model_name_or_path="a\nlicense: mit")
    yield _config("rank_text", "config_field", r="2")
    yield _config("rank_bool", "config_field", r=True)
    yield _config("rank_zero", "config_field", r=0)
    yield _config("rank_negative", "config_field", rank_pattern={"q": -2})
    yield _config("alpha_null_pattern", "config_field", alpha_pattern={"q": None})
    yield _config("alpha_text", "config_field", lora_alpha="16")
    yield _config("rslora_text", "config_field", use_rslora="false")
    yield _config("bias_unknown", "config_field", bias="some")
    yield _config("targets_number", "config_field", target_modules=5)
    yield _config("unknown_field", "unknown_config_field", use_mora=True)
    yield _config("enable_lora", "unknown_config_field", enable_lora=[True, False, True])
    refused = {
        "use_dora": (True, "dora"),
        "lora_bias": (True, "lora_bias"),
        "use_qalora": (True, "qalora"),
        "use_bdlora": ({"nblocks": 2}, "bdlora"),
        "kasa_config": ({"beta": 1}, "kasa"),
        "arrow_config": ({"top_k": 1}, "arrow"),
        "monteclora_config": ({"a": 1}, "monteclora"),
        "alora_invocation_tokens": ([1, 2], "alora"),
        "target_parameters": (["experts.w1"], "target_parameters"),
        "layer_replication": ([[0, 2]], "layer_replication"),
        "trainable_token_indices": ([0], "trainable_tokens"),
        "ensure_weight_tying": (True, "weight_tying"),
    }
    for field, (value, code) in refused.items():
        yield _config(field, f"{code}_unsupported", **{field: value})
    for init in ("pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq"):
        code = f"init_{init.removesuffix('_niter_4')}_unsupported"
        yield _config(f"init_{init}", code, init_lora_weights=init)
    yield _config("init_new", "init_lora_weights_unknown", init_lora_weights="new")
    yield _config("init_list", "init_lora_weights_unknown", init_lora_weights=["pissa"])


def _patterns() -> Iterator[Case]:
    slow = "(a+)+b"
    shapes = {key.replace(".q.", f".{'a' * 60}."): shape for key, shape in PAIR.items()}
    yield Case(
        "pattern_slow", partial(write_adapter, shapes=shapes, r=3, rank_pattern={slow: 2}), "rank_mismatch"
    )
    for name, pattern in {
        "lookahead": "(?=q)q",
        "back_reference": "(q)\\1",
        "unbalanced": "q)|(k",
        "possessive": "q*+",
        "posix_class": "[[:alpha:]]",
        "open_repeat": "q{,3}",
        "huge_repeat": "((q{1,100}){1,100}){1,100}",
        "big_program": "(.{1,30}){30}",
        "folded_range": "(?i:[\\x00-\\U0010ffff]{2})",
        "not_ascii": "[ä-ü]",
        "cut": "q\\",
    }.items():
        yield _config(f"pattern_{name}", "pattern_unsupported", rank_pattern={pattern: 2})
    yield _config("pattern_long", "pattern_too_long", alpha_pattern={"q" * 600: 2})
    yield _config("pattern_long_regex", "pattern_too_long", alpha_pattern={"(q)" * 100: 2})
    yield _config("pattern_many", "too_many_patterns", rank_pattern={f"(q){i}": 2 for i in range(1000)})
    yield _config("pattern_very_many", "too_many_patterns", rank_pattern={f"q{i}": 2 for i in range(30_000)})
    yield Case("pattern_work", _pattern_work, "too_many_patterns")


def _pattern_work(folder: Path) -> None:
    """Many modules against many regular expressions that are slow for their engine."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(2_000):
        for key, shape in PAIR.items():
            shapes[key.replace("layers.0", f"layers.{i}.{'ab' * 150}")] = shape
    patterns = {f"(a.*b|b.*a|c){{1,40}}x{i}": 2 for i in range(200)}
    write_adapter(folder, shapes, rank_pattern=patterns)


def _tensors(name: str, shapes: Shapes, code: str, *, dtype: str = "F32", **fields: Any) -> Case:
    return Case(name, partial(write_adapter, shapes=shapes, dtype=dtype, **fields), code)


def _modules() -> Iterator[Case]:
    module = f"{PREFIX}layers.0.q"
    pair = dict(PAIR)
    yield _tensors("pair_without_b", {A: (2, 3)}, "incomplete_pair")
    yield _tensors("pair_without_a", {B: (4, 2)}, "incomplete_pair")
    yield _tensors("pair_mixed", {A: (2, 3), f"{module}.lora_embedding_B": (4, 2)}, "incomplete_pair")
    yield _tensors("pair_does_not_multiply", {A: (2, 3), B: (4, 3)}, "factor_shape")
    yield _tensors("pair_linear_and_conv", {A: (2, 3), B: (4, 2, 1, 1)}, "factor_shape")
    yield _tensors("rank_of_config_wrong", pair, "rank_mismatch", r=4)
    yield _tensors("rank_of_pattern_wrong", pair, "rank_mismatch", rank_pattern={"q": 3})
    yield _tensors("shard_empty", {A: (0,), B: (0,)}, "empty_shard")
    yield _tensors("shard_empty_2d", {A: (2, 0), B: (4, 2)}, "empty_shard")
    yield _tensors("shard_flat", {A: (6,), B: (8,)}, "empty_shard")
    yield _tensors("factors_integer", pair, "factor_dtype", dtype="I64")
    yield _tensors("conv_grouped", {A: (4, 3, 3, 3), B: (4, 2, 1, 1)}, "grouped_conv_unsupported", r=4)
    yield _tensors("conv_3d", {A: (2, 3, 3, 3, 3), B: (4, 2, 1, 1, 1)}, "conv_unsupported")
    yield _tensors("conv_b_not_1x1", {A: (2, 3, 3, 3), B: (4, 2, 3, 3)}, "factor_shape")
    two = {key.replace(".weight", f".{n}.weight"): s for n in ("one", "two") for key, s in PAIR.items()}
    yield _tensors("two_adapter_names", two, "several_adapters")
    wrapped = {key.replace("layers.", "_orig_mod.layers."): shape for key, shape in PAIR.items()}
    yield _tensors("same_module_twice", {**pair, **wrapped}, "duplicate_module")
    yield _tensors("tensor_unexplained", {**pair, f"{PREFIX}norm.weight": (3,)}, "unknown_tensor")
    yield _tensors("bias_trained", {**pair, f"{PREFIX}layers.0.q.bias": (4,)}, "bias_unsupported", bias="all")
    many = {f"{module[:-2]}.x.lora_A.weight": (100_001, 1), f"{module[:-2]}.x.lora_B.weight": (1, 100_001)}
    yield _tensors("experts_very_many", many, "target_parameters_unsupported", r=1, target_parameters=["x.w"])
    nested = {key.replace(".q.", ".experts.base_layer."): shape for key, shape in PAIR.items()}
    yield _tensors("expert_parameters", nested, "target_parameters_unsupported")
    for tail, code in {
        "lora_magnitude_vector": "dora",
        "lora_magnitude_vector.default.weight": "dora",
        "dora_scale": "dora",
        "lora_B.bias": "lora_bias",
        "lora_diag": "kasa",
        "lora_E": "adalora",
        "hada_w1_a": "loha",
        "lokr_w1": "lokr",
        "vera_lambda_b": "vera",
        "ia3_l": "ia3",
        "oft_blocks": "oft",
        "token_adapter.trainable_tokens_delta": "trainable_tokens",
        "lora_mid.weight": "tucker",
    }.items():
        yield _tensors(f"tail_{tail}", {**pair, f"{module}.{tail}": (2,)}, f"{code}_unsupported")
    yield _tensors("prompt_tuning", {"prompt_embeddings": (4, 8)}, "prompt_learning_unsupported")
    tuner = {f"{module}.fourierft_spectrum": (10,)}
    yield _tensors("other_tuner", tuner, "peft_type_unsupported", peft_type="FOURIERFT")
    yield _tensors("checkpoint", {"model.layers.0.q.weight": (4, 4)}, "unknown_format")


def _folders() -> Iterator[Case]:
    def without(name: str) -> Callable[[Path], None]:
        def build(folder: Path) -> None:
            write_adapter(folder)
            (folder / name).unlink()

        return build

    def two_below(folder: Path) -> None:
        write_adapter(folder / "one")
        write_adapter(folder / "two")

    def linked(name: str) -> Callable[[Path], None]:
        def build(folder: Path) -> None:
            outside = write_adapter(folder.parent / f"{folder.name}-outside")
            write_adapter(folder)
            (folder / name).unlink()
            (folder / name).symlink_to(outside / name)

        return build

    def circle(name: str) -> Callable[[Path], None]:
        def build(folder: Path) -> None:
            write_adapter(folder)
            (folder / name).unlink()
            (folder / name).symlink_to(name)

        return build

    def pipe(name: str) -> Callable[[Path], None]:
        def build(folder: Path) -> None:
            write_adapter(folder)
            (folder / name).unlink()
            os.mkfifo(folder / name)

        return build

    config, weights = "adapter_config.json", "adapter_model.safetensors"
    yield Case("no_config", without(config), "adapter_config_missing")
    yield Case("no_weights", without(weights), "adapter_weights_missing")
    yield Case("two_adapters_below", two_below, "several_adapters", upload=False)
    yield Case("config_link_outside", linked(config), "link_outside_folder", upload=False)
    yield Case("weights_link_outside", linked(weights), "link_outside_folder", upload=False)
    yield Case("config_link_circle", circle(config), "link_outside_folder", upload=False)
    yield Case("weights_link_circle", circle(weights), "link_outside_folder", upload=False)
    yield Case("config_pipe", pipe(config), "not_a_regular_file", upload=False)
    yield Case("weights_pipe", pipe(weights), "safetensors_not_a_file", upload=False)
