"""An index of many short entries is refused before it becomes objects."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from merging.errors import InputError
from merging.formats.shards import MAX_ENTRIES, read_index

ENTRIES = {
    "keys": b'{"weight_map":{' + b",".join(b'"%06x":"b"' % i for i in range(MAX_ENTRIES + 2)) + b"}}",
    "lists": b'{"weight_map":{},"metadata":[' + b"[]," * (MAX_ENTRIES + 1) + b"[]]}",
}


@pytest.mark.parametrize("name", sorted(ENTRIES))
def test_an_index_of_too_many_entries_takes_no_memory(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(ENTRIES[name])
    tracemalloc.start()
    try:
        with pytest.raises(InputError) as caught:
            read_index(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.code == "checkpoint_index"
    assert peak < len(ENTRIES[name]) + (1 << 20)


def test_an_index_of_a_large_model_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    entries = (f'"model.layers.{i}.weight":"model-00001-of-00002.safetensors"' for i in range(100_000))
    path.write_text('{"metadata":{},"weight_map":{' + ",".join(entries) + "}}")
    assert len(read_index(path)) == 100_000
