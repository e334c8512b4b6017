"""The safetensors guard: what it accepts, what it reports, and that it is never laxer than the library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import torch
from formats.build import PAIR, entries, pack, values
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from merging.errors import InputError
from merging.formats.guard import Limits, TensorInfo, check_safetensors

DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int8", "uint8", "bool", "float8_e4m3fn")


def code_of(path: Path, limits: Limits | None = None) -> str:
    with pytest.raises(InputError) as caught:
        check_safetensors(path, limits=limits or Limits())
    return caught.value.code


def test_files_of_the_library_are_accepted_and_described(tmp_path: Path) -> None:
    tensors = {f"t.{name}": torch.ones(3, 2).to(getattr(torch, name)) for name in DTYPES}
    tensors |= {"scalar": torch.tensor(1.0), "empty": torch.zeros(0, 4)}
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "note": 'quotes " and {braces} \n ü'})
    header = check_safetensors(path)
    assert sorted(header.tensors) == sorted(tensors)
    assert header.metadata == {"format": "pt", "note": 'quotes " and {braces} \n ü'}
    assert header.tensors["t.float32"].shape == (3, 2)
    assert header.tensors["scalar"].shape == ()
    assert header.size == path.stat().st_size
    assert header.data_start + max(info.end for info in header.tensors.values()) == header.size


def test_offsets_point_at_the_data(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(pack({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, values(2)))
    header = check_safetensors(path)
    assert header.tensors == {"a": TensorInfo("F32", (2,), 0, 8)}
    assert path.read_bytes()[header.data_start :] == values(2)


@pytest.mark.parametrize(
    "text",
    [
        '{ "a" : {"data_offsets":[0,4], "shape":[1], "dtype":"F32"} , "__metadata__" : { } }   ',
        '{"__metadata__":{"k" : "v\\u0041\\n"},\n"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":[1,1,1,1,1,1,1,1],"data_offsets":[0,4]}}',
    ],
)
def test_spelling_within_the_format_does_not_matter(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(pack(text.encode(), bytes(4)))
    assert list(check_safetensors(path).tensors) == ["a"]


def test_a_header_length_that_looks_like_a_pickle_is_accepted(tmp_path: Path) -> None:
    """A header of 640 bytes starts with the bytes 80 02, as a pickle of protocol 2 does."""
    path = tmp_path / "a.safetensors"
    text = json.dumps(entries({"a": (1,)})).ljust(640).encode()
    path.write_bytes(pack(text, values(1)))
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert list(check_safetensors(path).tensors) == ["a"]


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        (Limits(header_bytes=64), "safetensors_header_too_large"),
        (Limits(tensors=1), "safetensors_too_many_tensors"),
        (Limits(dims=1), "safetensors_shape"),
        (Limits(name_bytes=10), "safetensors_name"),
        (Limits(file_bytes=100), "safetensors_file_too_large"),
    ],
)
def test_every_limit_is_enforced(limits: Limits, code: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(pack(entries(PAIR)))
    check_safetensors(path)
    assert code_of(path, limits) == code


@pytest.mark.parametrize("make", ["missing", "folder", "fifo"])
def test_only_regular_files_are_read(make: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    if make == "folder":
        path.mkdir()
    elif make == "fifo":
        os.mkfifo(path)
    assert code_of(path) == "safetensors_not_a_file"


def test_errors_name_file_and_tensor(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(pack({"a.b": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)))
    with pytest.raises(InputError) as caught:
        check_safetensors(path)
    assert caught.value.where == {"file": "weights.safetensors", "tensor": "a.b"}
    assert "F99" in caught.value.message


def test_needs_neither_torch_nor_the_library() -> None:
    program = (
        "import sys, merging.formats.adapter, merging.formats.compatible, merging.formats.peft_out\n"
        "print(sorted({'torch', 'numpy', 'safetensors'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


names = st.sampled_from(["a", "b", "a", "c.d", "", "a/b", "__metadata__", "é"])
numbers = st.sampled_from([0, 1, 2, 4, 8, -1, 1.5, 1 << 40, None, "1", True])
entry = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "U8", "F4", "C64", "x", 3, None]),
        "shape": st.lists(numbers, max_size=3),
        "data_offsets": st.lists(numbers, max_size=3),
        "extra": st.none(),
    },
)
good = st.builds(
    lambda begin, count: {"dtype": "F32", "shape": [count], "data_offsets": [begin, begin + 4 * count]},
    st.sampled_from([0, 4, 8]),
    st.integers(0, 2),
)


@settings(max_examples=400, deadline=None)
@given(
    pairs=st.lists(st.tuples(names, good | good | entry), max_size=3),
    data=st.integers(0, 16),
    cut=st.integers(-2, 2),
)
def test_whatever_is_accepted_the_library_reads_alike(
    pairs: list[tuple[str, object]], data: int, cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = "{" + ",".join(f"{json.dumps(name)}:{json.dumps(value)}" for name, value in pairs) + "}"
    raw = (len(text.encode()) + cut).to_bytes(8, "little", signed=True) + text.encode() + bytes(data)
    path = tmp_path_factory.mktemp("fuzz") / "a.safetensors"
    path.write_bytes(raw)
    try:
        header = check_safetensors(path)
    except InputError:
        return
    read = dict(safetensors.deserialize(raw))
    assert {name: tuple(info["shape"]) for name, info in read.items()} == {
        name: info.shape for name, info in header.tensors.items()
    }
    for name, info in header.tensors.items():
        start = header.data_start
        assert read[name]["data"] == raw[start + info.begin : start + info.end]


@settings(max_examples=300, deadline=None)
@given(place=st.integers(0, 200), byte=st.integers(0, 255))
def test_a_flipped_byte_is_refused_or_harmless(
    place: int, byte: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One changed byte never gets past the guard in a form that the library reads differently."""
    raw = bytearray(pack(entries({"a.b": (2, 2), "c": (3,)})))
    raw[place % len(raw)] = byte
    path = tmp_path_factory.mktemp("flip") / "a.safetensors"
    path.write_bytes(raw)
    try:
        header = check_safetensors(path)
    except InputError:
        return
    read = dict(safetensors.deserialize(bytes(raw)))
    assert {name: (info["dtype"], tuple(info["shape"])) for name, info in read.items()} == {
        name: (info.dtype, info.shape) for name, info in header.tensors.items()
    }
