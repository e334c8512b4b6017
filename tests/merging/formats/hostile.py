"""Hostile and broken adapters, each with the code that must refuse it.

``cases()`` is used by the tests of the library and of the service alike: ``build`` writes the files of one
adapter into an empty folder.
"""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from formats.build import CONFIG, PAIR, PREFIX, Shapes, entries, pack, write_adapter

A, B = PAIR


@dataclass(frozen=True)
class Case:
    """One bad adapter. ``upload`` is False when it cannot be sent as plain files (links, pipes)."""

    name: str
    build: Callable[[Path], object]
    code: str
    upload: bool = True


def cases() -> list[Case]:
    """All of them; names are unique."""
    return [*_headers(), *_contents(), *_configs(), *_patterns(), *_modules(), *_folders()]


def _weights(name: str, data: bytes | Callable[[], bytes], code: str) -> Case:
    def build(folder: Path) -> None:
        write_adapter(folder, weights=data if isinstance(data, bytes) else data())

    return Case(name, build, code)


def _edited(key: str = A, **fields: Any) -> bytes:
    header = entries(PAIR)
    size = header[B]["data_offsets"][1]
    header[key] = {**header[key], **fields}
    return pack({k: {f: v for f, v in e.items() if v is not None} for k, e in header.items()}, bytes(size))


def _named(name: str) -> bytes:
    return pack(entries({name: (2, 3), B: (4, 2)}))


def _headers() -> Iterator[Case]:
    good = pack(entries(PAIR))
    text = json.dumps(entries(PAIR))
    one = '"%s":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    yield _weights("empty_file", b"", "safetensors_too_small")
    yield _weights("seven_bytes", b"\x02\0\0\0\0\0\0", "safetensors_too_small")
    yield _weights("header_beyond_file", (500).to_bytes(8, "little") + b"{}", "safetensors_header_length")
    yield _weights("header_of_exabytes", b"\xff" * 8 + b"{}", "safetensors_header_too_large")
    yield _weights("header_of_one_byte", (1).to_bytes(8, "little") + b"{}", "safetensors_header_length")
    yield _weights(
        "header_spaces_first", pack(b" " + text.encode(), bytes(56)), "safetensors_header_not_json"
    )
    yield _weights("header_list", pack(b"[1]"), "safetensors_header_not_json")
    yield _weights("header_not_json", pack(b'{"a"}'), "safetensors_header_not_json")
    yield _weights("header_not_closed", pack(text[:-1].encode(), bytes(56)), "safetensors_header_not_json")
    yield _weights(
        "header_two_objects", pack(text.encode() + b"{}", bytes(56)), "safetensors_header_not_json"
    )
    yield _weights("header_not_utf8", pack(b'{"__metadata__":{"a":"\xff"}}'), "safetensors_header_not_json")
    yield _weights("no_tensors", pack({}), "safetensors_no_tensors")
    yield _weights("only_metadata", pack({"__metadata__": {"format": "pt"}}), "safetensors_no_tensors")
    yield _weights("metadata_numbers", pack({"__metadata__": {"a": 1}}), "safetensors_metadata")
    yield _weights("metadata_list", pack({"__metadata__": []}), "safetensors_metadata")
    yield _weights(
        "metadata_surrogate", pack(rb'{"__metadata__":{"a":"\ud800"}}'), "safetensors_header_not_json"
    )
    twice = f"{{{one % A},{one % A}}}".encode()
    yield _weights("duplicate_tensor", pack(twice, bytes(4)), "safetensors_duplicate_key")
    field = b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    yield _weights("duplicate_field", pack(field, bytes(4)), "safetensors_duplicate_key")
    meta = b'{"__metadata__":{"a":"1","a":"2"},"a":{}}'
    yield _weights("duplicate_metadata", pack(meta), "safetensors_duplicate_key")
    yield _weights("unknown_field", _edited(strides=[1]), "safetensors_unknown_field")
    yield _weights("missing_field", _edited(dtype=None), "safetensors_missing_field")
    yield _weights("dtype_unknown", _edited(dtype="F128"), "safetensors_dtype")
    yield _weights("dtype_complex", _edited(dtype="C64"), "safetensors_dtype")
    yield _weights("dtype_number", _edited(dtype=32), "safetensors_dtype")
    yield _weights("shape_negative", _edited(shape=[-2, -3]), "safetensors_shape")
    yield _weights("shape_float", _edited(shape=[2.0, 3.0]), "safetensors_shape")
    yield _weights("shape_bool", _edited(shape=[True, 6]), "safetensors_shape")
    yield _weights("shape_text", _edited(shape="23"), "safetensors_shape")
    yield _weights("shape_wrong_size", _edited(shape=[2, 4]), "safetensors_shape")
    yield _weights("shape_overflow", _edited(shape=[1 << 62, 1 << 62, 6]), "safetensors_shape")
    yield _weights("shape_many_dims", _edited(shape=[1] * 9 + [6]), "safetensors_shape")
    yield _weights("shape_nan", pack(text.replace("[2, 3]", "[NaN]").encode()), "safetensors_header_not_json")
    nines, nested = "[" + "9" * 400 + "]", "[" * 300 + "]" * 300
    yield _weights(
        "shape_long_number", pack(text.replace("[2, 3]", nines).encode()), "safetensors_header_not_json"
    )
    yield _weights("shape_nested", pack(text.replace("[2, 3]", nested).encode()), "safetensors_shape")
    yield _weights("entry_overlong", _edited(shape=[1] * 2000), "safetensors_header_entry")
    yield _weights("offsets_reversed", _edited(data_offsets=[24, 0]), "safetensors_offsets")
    yield _weights("offsets_three", _edited(data_offsets=[0, 24, 24]), "safetensors_offsets")
    yield _weights("overlap", _edited(B, data_offsets=[16, 48]), "safetensors_overlap")
    yield _weights("hole", _edited(B, data_offsets=[28, 60]), "safetensors_truncated")
    shifted = {A: {**entries(PAIR)[A], "data_offsets": [8, 32]}}
    yield _weights("hole_first", pack(shifted, bytes(32)), "safetensors_hole")
    yield _weights("trailing_bytes", good + b"\0", "safetensors_trailing")
    yield _weights("cut_short", good[:-4], "safetensors_truncated")
    yield _weights("name_empty", _named(""), "safetensors_name")
    yield _weights("name_path", _named("../../etc/passwd"), "safetensors_name")
    yield _weights("name_dots", _named("a..b.lora_A.weight"), "safetensors_name")
    yield _weights("name_zero_byte", _named("a\0.lora_A.weight"), "safetensors_name")
    yield _weights("name_unicode", _named("ä.lora_A.weight"), "safetensors_name")
    yield _weights("name_markup", _named("<script>.lora_A.weight"), "safetensors_name")
    yield _weights("name_megabyte", _named("a" * (1 << 20)), "safetensors_name")
    yield _weights("quarter_million_tensors", _many_tensors, "safetensors_too_many_tensors")
    yield _weights(
        "megabytes_of_quotes", lambda: pack(b'{"' + b'\\"' * (10 << 20)), "safetensors_header_not_json"
    )
    yield _weights(
        "megabytes_of_braces", lambda: pack(b'{"a":' + b"{" * (20 << 20)), "safetensors_header_not_json"
    )
    yield _weights(
        "megabytes_of_lists", lambda: pack(b'{"a":' + b"[" * (20 << 20)), "safetensors_header_not_json"
    )
    yield _weights(
        "megabytes_of_spaces", lambda: pack(b"{" + b" " * (20 << 20)), "safetensors_header_not_json"
    )
    yield _weights("megabytes_of_metadata", _many_metadata, "safetensors_metadata")
    digits = b'{"a":{"shape":[%s]}}'
    yield _weights(
        "megabytes_of_digits", lambda: pack(digits % (b"9" * (20 << 20))), "safetensors_header_entry"
    )


def _many_tensors() -> bytes:
    empty = '"%07d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return pack(("{" + ",".join(empty % i for i in range(250_000)) + "}").encode())


def _many_metadata() -> bytes:
    return pack(('{"__metadata__":{' + ",".join(f'"{i}":""' for i in range(500_000)) + "}}").encode())


class _Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("true",))


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(_Payload()))


def _contents() -> Iterator[Case]:
    def zipped(folder: Path) -> None:
        write_adapter(folder)
        _zip(folder / "adapter_model.safetensors")

    def only_bin(folder: Path) -> None:
        write_adapter(folder)
        (folder / "adapter_model.safetensors").unlink()
        _zip(folder / "adapter_model.bin")

    yield Case("zip_renamed", zipped, "pickle_not_accepted")
    yield Case("bin_only", only_bin, "pickle_not_accepted", upload=False)
    for protocol in (2, 4, 5):
        data = pickle.dumps(_Payload(), protocol=protocol)
        yield _weights(f"pickle_renamed_{protocol}", data, "pickle_not_accepted")
    yield _weights("gzip_renamed", b"\x1f\x8b\x08" + bytes(40), "archive_not_accepted")
    yield _weights(
        "tar_renamed", b"a".ljust(257, b"\0") + b"ustar\x0000" + bytes(300), "archive_not_accepted"
    )
    yield _weights("gguf_renamed", b"GGUF\x03\0\0\0" + bytes(40), "gguf_not_accepted")
    yield _weights("hdf5_renamed", b"\x89HDF\r\n\x1a\n" + bytes(40), "hdf5_not_accepted")
    yield _weights(
        "lfs_pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git_lfs_pointer"
    )
    yield _weights("html_page", b"<!DOCTYPE html><html></html>", "safetensors_magic")


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
    yield Case("config_pipe", pipe(config), "not_a_regular_file", upload=False)
    yield Case("weights_pipe", pipe(weights), "safetensors_not_a_file", upload=False)
