"""Diagnostics of adapters among themselves, against dense arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapters import MODULES, products, write_adapter

from merging.comparing import compare
from merging.errors import InputError


def dense_cosine(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    names = left.keys() & right.keys()
    inner = sum(float((left[name] * right[name]).sum()) for name in sorted(names))
    norms = [sum(float(delta.square().sum()) for delta in side.values()) ** 0.5 for side in (left, right)]
    return inner / (norms[0] * norms[1])


def test_cosines_are_those_of_the_dense_updates_of_the_whole_model(tmp_path: Path) -> None:
    folders = [
        write_adapter(tmp_path / str(seed), seed=seed, rank=rank) for seed, rank in ((1, 4), (2, 2), (3, 5))
    ]
    found = compare(folders)["summary"]["cosine"]
    dense = [products(folder) for folder in folders]
    for i, left in enumerate(dense):
        for j, right in enumerate(dense):
            assert found[i][j] == pytest.approx(dense_cosine(left, right), abs=1e-5)


def test_a_module_that_one_lacks_counts_as_zero(tmp_path: Path) -> None:
    whole = write_adapter(tmp_path / "whole", seed=1)
    part = write_adapter(tmp_path / "part", seed=2, modules=dict(list(MODULES.items())[:2]))
    found = compare([whole, part])
    assert sorted(found["modules"]) == sorted(MODULES)
    assert found["summary"]["cosine"][0][1] == pytest.approx(
        dense_cosine(products(whole), products(part)), abs=1e-5
    )


def test_an_adapter_and_its_negative_cancel(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "plus", seed=1)
    negative = write_adapter(tmp_path / "minus", seed=1, alpha=-8)
    summary = compare([folder, negative])["summary"]
    assert summary["cosine"][0][1] == pytest.approx(-1.0, abs=1e-6)
    assert summary["cancellation"] == pytest.approx(1.0, abs=1e-5)
    assert summary["sign_conflict_pairs"][0][1] == pytest.approx(1.0)


def test_adapters_of_another_base_compare_but_other_shapes_do_not(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", seed=1)
    other_base = write_adapter(tmp_path / "b", seed=2, base_model_name_or_path="org/other")
    assert len(compare([folder, other_base])["models"]) == 2
    wider = write_adapter(tmp_path / "c", modules={name: (m, n + 1) for name, (m, n) in MODULES.items()})
    with pytest.raises(InputError):
        compare([folder, wider])


def test_each_adapter_stands_against_the_mean_of_all(tmp_path: Path) -> None:
    whole = write_adapter(tmp_path / "whole", seed=1)
    part = write_adapter(tmp_path / "part", seed=2, modules=dict(list(MODULES.items())[:2]))
    found = compare([whole, part])
    deltas = [products(whole), products(part)]
    zero = {name: torch.zeros_like(delta) for name, delta in deltas[0].items()}
    deltas = [{**zero, **delta} for delta in deltas]
    mean = {name: (deltas[0][name] + deltas[1][name]) / 2 for name in zero}

    def norm(delta: dict[str, torch.Tensor]) -> float:
        return sum(float(part.square().sum()) for part in delta.values()) ** 0.5

    assert found["summary"]["mean"]["nuclear_norm"] == pytest.approx(
        sum(float(torch.linalg.svdvals(delta).sum()) for delta in mean.values()), rel=1e-5
    )
    for entry, delta in zip(found["models"], deltas, strict=True):
        against = entry["against_mean"]
        product = sum(float((delta[name] * mean[name]).sum()) for name in mean)
        error = norm({name: mean[name] - delta[name] for name in mean})
        assert entry["norm"] == pytest.approx(norm(delta), rel=1e-5)
        assert against["retention"] == pytest.approx(product / norm(delta) ** 2, rel=1e-5)
        assert against["relative_error"] == pytest.approx(error / norm(delta), rel=1e-5)
        assert 0.0 < against["subspace_alignment"] <= 1.0
    lonely = found["modules"][list(MODULES)[2]]["models"]
    assert [entry["model"] for entry in lonely] == [str(whole)]
    assert lonely[0]["against_mean"]["retention"] == pytest.approx(0.5, rel=1e-5)
