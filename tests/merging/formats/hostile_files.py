"""Weight files that are broken, hostile, or not safetensors at all (a part of ``hostile.py``)."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from formats.build import PAIR, Case, entries, pack, write_adapter

A, B = PAIR


def weights(name: str, data: bytes | Callable[[], bytes], code: str) -> Case:
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


def headers() -> Iterator[Case]:
    good = pack(entries(PAIR))
    text = json.dumps(entries(PAIR))
    one = '"%s":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    yield weights("empty_file", b"", "safetensors_too_small")
    yield weights("seven_bytes", b"\x02\0\0\0\0\0\0", "safetensors_too_small")
    yield weights("header_beyond_file", (500).to_bytes(8, "little") + b"{}", "safetensors_header_length")
    yield weights("header_of_exabytes", b"\xff" * 8 + b"{}", "safetensors_header_too_large")
    yield weights("header_of_one_byte", (1).to_bytes(8, "little") + b"{}", "safetensors_header_length")
    yield weights("header_spaces_first", pack(b" " + text.encode(), bytes(56)), "safetensors_header_not_json")
    yield weights("header_list", pack(b"[1]"), "safetensors_header_not_json")
    yield weights("header_not_json", pack(b'{"a"}'), "safetensors_header_not_json")
    yield weights("header_not_closed", pack(text[:-1].encode(), bytes(56)), "safetensors_header_not_json")
    yield weights("header_two_objects", pack(text.encode() + b"{}", bytes(56)), "safetensors_header_not_json")
    yield weights("header_not_utf8", pack(b'{"__metadata__":{"a":"\xff"}}'), "safetensors_header_not_json")
    yield weights("no_tensors", pack({}), "safetensors_no_tensors")
    yield weights("only_metadata", pack({"__metadata__": {"format": "pt"}}), "safetensors_no_tensors")
    yield weights("metadata_numbers", pack({"__metadata__": {"a": 1}}), "safetensors_metadata")
    yield weights("metadata_list", pack({"__metadata__": []}), "safetensors_metadata")
    yield weights(
        "metadata_surrogate", pack(rb'{"__metadata__":{"a":"\ud800"}}'), "safetensors_header_not_json"
    )
    twice = f"{{{one % A},{one % A}}}".encode()
    yield weights("duplicate_tensor", pack(twice, bytes(4)), "safetensors_duplicate_key")
    field = b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    yield weights("duplicate_field", pack(field, bytes(4)), "safetensors_duplicate_key")
    meta = b'{"__metadata__":{"a":"1","a":"2"},"a":{}}'
    yield weights("duplicate_metadata", pack(meta), "safetensors_duplicate_key")
    yield weights("unknown_field", _edited(strides=[1]), "safetensors_unknown_field")
    yield weights("missing_field", _edited(dtype=None), "safetensors_missing_field")
    yield weights("dtype_unknown", _edited(dtype="F128"), "safetensors_dtype")
    yield weights("dtype_complex", _edited(dtype="C64"), "safetensors_dtype")
    yield weights("dtype_number", _edited(dtype=32), "safetensors_dtype")
    yield weights("shape_negative", _edited(shape=[-2, -3]), "safetensors_shape")
    yield weights("shape_float", _edited(shape=[2.0, 3.0]), "safetensors_shape")
    yield weights("shape_bool", _edited(shape=[True, 6]), "safetensors_shape")
    yield weights("shape_text", _edited(shape="23"), "safetensors_shape")
    yield weights("shape_wrong_size", _edited(shape=[2, 4]), "safetensors_shape")
    yield weights("shape_overflow", _edited(shape=[1 << 62, 1 << 62, 6]), "safetensors_shape")
    yield weights("shape_many_dims", _edited(shape=[1] * 9 + [6]), "safetensors_shape")
    yield weights("shape_nan", pack(text.replace("[2, 3]", "[NaN]").encode()), "safetensors_header_not_json")
    nines, nested = "[" + "9" * 400 + "]", "[" * 300 + "]" * 300
    yield weights(
        "shape_long_number", pack(text.replace("[2, 3]", nines).encode()), "safetensors_header_not_json"
    )
    yield weights("shape_nested", pack(text.replace("[2, 3]", nested).encode()), "safetensors_shape")
    yield weights("entry_overlong", _edited(shape=[1] * 2000), "safetensors_header_entry")
    yield weights("offsets_reversed", _edited(data_offsets=[24, 0]), "safetensors_offsets")
    yield weights("offsets_three", _edited(data_offsets=[0, 24, 24]), "safetensors_offsets")
    yield weights("overlap", _edited(B, data_offsets=[16, 48]), "safetensors_overlap")
    yield weights("hole", _edited(B, data_offsets=[28, 60]), "safetensors_truncated")
    shifted = {A: {**entries(PAIR)[A], "data_offsets": [8, 32]}}
    yield weights("hole_first", pack(shifted, bytes(32)), "safetensors_hole")
    yield weights("trailing_bytes", good + b"\0", "safetensors_trailing")
    yield weights("cut_short", good[:-4], "safetensors_truncated")
    yield weights("name_empty", _named(""), "safetensors_name")
    yield weights("name_path", _named("../../etc/passwd"), "safetensors_name")
    yield weights("name_dots", _named("a..b.lora_A.weight"), "safetensors_name")
    yield weights("name_zero_byte", _named("a\0.lora_A.weight"), "safetensors_name")
    yield weights("name_unicode", _named("ä.lora_A.weight"), "safetensors_name")
    yield weights("name_markup", _named("<script>.lora_A.weight"), "safetensors_name")
    yield weights("name_megabyte", _named("a" * (1 << 20)), "safetensors_name")
    yield weights("quarter_million_tensors", _many_tensors, "safetensors_too_many_tensors")
    yield weights(
        "megabytes_of_quotes", lambda: pack(b'{"' + b'\\"' * (10 << 20)), "safetensors_header_not_json"
    )
    yield weights(
        "megabytes_of_braces", lambda: pack(b'{"a":' + b"{" * (20 << 20)), "safetensors_header_not_json"
    )
    yield weights(
        "megabytes_of_lists", lambda: pack(b'{"a":' + b"[" * (20 << 20)), "safetensors_header_not_json"
    )
    yield weights(
        "megabytes_of_spaces", lambda: pack(b"{" + b" " * (20 << 20)), "safetensors_header_not_json"
    )
    yield weights("megabytes_of_metadata", _many_metadata, "safetensors_metadata")
    digits = b'{"a":{"shape":[%s]}}'
    yield weights(
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


def contents() -> Iterator[Case]:
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
        yield weights(f"pickle_renamed_{protocol}", data, "pickle_not_accepted")
    yield weights("gzip_renamed", b"\x1f\x8b\x08" + bytes(40), "archive_not_accepted")
    yield weights("tar_renamed", b"a".ljust(257, b"\0") + b"ustar\x0000" + bytes(300), "archive_not_accepted")
    yield weights("gguf_renamed", b"GGUF\x03\0\0\0" + bytes(40), "gguf_not_accepted")
    yield weights("hdf5_renamed", b"\x89HDF\r\n\x1a\n" + bytes(40), "hdf5_not_accepted")
    yield weights(
        "lfs_pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git_lfs_pointer"
    )
    yield weights("html_page", b"<!DOCTYPE html><html></html>", "safetensors_magic")
