"""Real trained adapters: read, write back, read again."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from test_formats_peft import write_back

from merging.formats.adapter import open_adapter
from merging.formats.compatible import check_compatible


@pytest.fixture
def folders(quality_dir: Path) -> list[Path]:
    found = sorted(path for path in (quality_dir / "public/adapters/r16").iterdir() if path.is_dir())
    assert found
    return found


def test_they_read_without_warnings_and_belong_together(folders: list[Path]) -> None:
    adapters = [open_adapter(folder) for folder in folders]
    assert not [warning for adapter in adapters for warning in adapter.warnings]
    table = check_compatible(adapters)
    assert table.warnings == ()
    assert set(table.modules.values()) == {tuple(range(len(folders)))}
    assert len({adapter.digest for adapter in adapters}) == len(folders)


def test_factors_equal_those_of_the_library(folders: list[Path]) -> None:
    for folder in folders:
        tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
        with open_adapter(folder) as adapter:
            for name, module in adapter.modules.items():
                root = module.scale**0.5
                for ours, key in zip(adapter.factors(name), (module.key_B, module.key_A), strict=True):
                    torch.testing.assert_close(ours, tensors[key].float() * root, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_they_survive_a_round_trip(dtype: str, folders: list[Path], tmp_path: Path) -> None:
    for folder in folders:
        with open_adapter(folder) as adapter:
            write_back(adapter, tmp_path / folder.name, dtype=dtype)
            with open_adapter(tmp_path / folder.name) as copy:
                assert list(copy.modules) == list(adapter.modules)
                for name in adapter.modules:
                    for ours, theirs in zip(copy.factors(name), adapter.factors(name), strict=True):
                        torch.testing.assert_close(
                            ours, theirs, rtol=1e-3 if dtype == "F16" else 0, atol=1e-7
                        )
