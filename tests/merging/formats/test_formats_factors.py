"""The tensors behind an opened adapter: values, precision, identity of the file."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from formats.build import PAIR, Shapes, entries, pack, values, write_adapter

from merging.errors import InputError, MergeFailure
from merging.formats.adapter import open_adapter

A, B = PAIR


def renamed(old: str, new: str) -> Shapes:
    return {key.replace(old, new): shape for key, shape in PAIR.items()}


def test_factors_carry_the_scale_and_its_sign(tmp_path: Path) -> None:
    adapter = open_adapter(write_adapter(tmp_path / "a", lora_alpha=-18))
    left, right = adapter.factors("layers.0.q")
    data = np.frombuffer(values(14), dtype="<f4")
    stored_A, stored_B = data[:6].reshape(2, 3), data[6:].reshape(4, 2)
    np.testing.assert_allclose((left @ right).numpy(), -9 * stored_B @ stored_A, rtol=1e-6)
    np.testing.assert_allclose(right.numpy(), 3 * stored_A)
    assert left.is_contiguous()
    assert right.is_contiguous()


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        ("F16", None, torch.float32),
        ("BF16", None, torch.float32),
        ("F32", None, torch.float32),
        ("F64", None, torch.float64),
        ("F16", torch.float64, torch.float64),
    ],
)
def test_factors_are_at_least_single_precision(
    stored: str, asked: torch.dtype | None, expected: torch.dtype, tmp_path: Path
) -> None:
    header = entries(PAIR, stored)
    size = header[B]["data_offsets"][1]
    adapter = open_adapter(write_adapter(tmp_path / "a", weights=pack(header, bytes(size))))
    assert {part.dtype for part in adapter.factors("layers.0.q", dtype=asked)} == {expected}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 13])
def test_values_that_are_not_finite_are_refused(bad: float, place: int, tmp_path: Path) -> None:
    data = np.frombuffer(values(14), dtype="<f4").copy()
    data[place] = bad
    adapter = open_adapter(write_adapter(tmp_path / "a", weights=pack(entries(PAIR), data.tobytes())))
    with pytest.raises(InputError) as caught:
        adapter.factors("layers.0.q")
    assert caught.value.code == "non_finite_tensor"
    assert caught.value.where["module"] == "layers.0.q"


def test_the_digest_depends_on_content_only(tmp_path: Path) -> None:
    one = open_adapter(write_adapter(tmp_path / "a"))
    same = open_adapter(write_adapter(tmp_path / "b"))
    (tmp_path / "b" / "README.md").write_text("not part of the meaning")
    other = open_adapter(write_adapter(tmp_path / "c", lora_alpha=5))
    assert one.digest == same.digest != other.digest
    config, weights = (
        hashlib.sha256((tmp_path / "a" / name).read_bytes()).hexdigest()
        for name in ("adapter_config.json", "adapter_model.safetensors")
    )
    lines = f"{config}  adapter_config.json\n{weights}  adapter_model.safetensors\n"
    assert one.digest == hashlib.sha256(lines.encode()).hexdigest()


@pytest.mark.parametrize("change", ["replaced", "cut", "removed"])
def test_a_file_that_changes_after_the_check_is_not_read(change: str, tmp_path: Path) -> None:
    adapter = open_adapter(write_adapter(tmp_path / "a"))
    path = tmp_path / "a" / "adapter_model.safetensors"
    if change == "replaced":
        (tmp_path / "new").write_bytes(path.read_bytes())
        os.replace(tmp_path / "new", path)
    elif change == "cut":
        os.truncate(path, 200)
    else:
        path.unlink()
    with pytest.raises(MergeFailure) as caught:
        adapter.factors("layers.0.q")
    assert caught.value.code == "file_changed"


def test_a_file_cut_short_while_it_is_open_is_an_error_not_a_crash(tmp_path: Path) -> None:
    shapes = {**PAIR, **renamed("layers.0", "layers.1")}
    adapter = open_adapter(write_adapter(tmp_path / "a", shapes))
    adapter.factors("layers.0.q")
    path = tmp_path / "a" / "adapter_model.safetensors"
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(MergeFailure) as caught:
        adapter.factors("layers.1.q")
    assert caught.value.code == "file_changed"


def test_closing_twice_and_reading_again_is_fine(tmp_path: Path) -> None:
    with open_adapter(write_adapter(tmp_path / "a"), label="mine") as adapter:
        first = adapter.factors("layers.0.q")
    adapter.close()
    assert adapter.label == "mine"
    assert torch.equal(adapter.factors("layers.0.q")[0], first[0])
