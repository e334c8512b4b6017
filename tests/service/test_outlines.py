"""Of a weight file only its header is brought, and nothing of one that no reader would take."""

from __future__ import annotations

from pathlib import Path

import pytest
from adapters import write_adapter

from merging.errors import InputError
from merging.formats.guard import check_safetensors
from service.outlines import outline
from service.storage import Storage


class Counting(Storage):
    """Storage that counts what is read."""

    read = 0

    def first_bytes(self, key: str, count: int) -> bytes:
        found = super().first_bytes(key, count)
        self.read += len(found)
        return found


@pytest.fixture
def storage(tmp_path: Path) -> Counting:
    return Counting.open((tmp_path / "storage").as_uri())  # type: ignore[return-value]


def test_an_outline_has_header_and_size_of_its_file(storage: Counting, tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "a", seed=1) / "adapter_model.safetensors"
    storage.put_file("f", source)
    size = source.stat().st_size
    outline(storage, "f", size, tmp_path / "outline")
    assert check_safetensors(tmp_path / "outline").tensors == check_safetensors(source).tensors
    assert storage.read < size


@pytest.mark.parametrize("length", [26 << 20, 90_000_000, 1 << 62, (1 << 64) - 1])
def test_a_header_that_is_too_large_is_not_brought(storage: Counting, tmp_path: Path, length: int) -> None:
    size = 100 << 20
    with (tmp_path / "hostile").open("wb") as file:
        file.write(length.to_bytes(8, "little") + b"{")
        file.truncate(size)
    storage.put_file("f", tmp_path / "hostile")
    outline(storage, "f", size, tmp_path / "outline")
    assert storage.read < 4096
    with pytest.raises(InputError) as caught:
        check_safetensors(tmp_path / "outline")
    assert caught.value.code == "safetensors_header_too_large"


@pytest.mark.parametrize("content", [b"", b"abc", (10).to_bytes(8, "little")])
def test_a_file_that_is_too_short_is_refused_as_it_would_be(
    storage: Counting, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "short").write_bytes(content)
    storage.put_file("f", tmp_path / "short")
    outline(storage, "f", len(content), tmp_path / "outline")
    with pytest.raises(InputError):
        check_safetensors(tmp_path / "outline")
