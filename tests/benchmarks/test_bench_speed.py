"""The yardsticks of the speed table compute what they say, and the table is put together rightly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import cases, floor, inputs, speed
from benchmarks.cases import Case
from merging import engine

TINY = inputs.Shape(hidden=48, inner=64, kv=24, layers=1)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A set of eight small adapters."""
    monkeypatch.setitem(inputs.SETS, "tiny", TINY)
    return inputs.adapter_set(tmp_path, "tiny")


def products(file: Path) -> dict[str, Tensor]:
    """Module names to ``B @ A``, whatever the prefix."""
    tensors = {key.removeprefix("base_model.model."): value for key, value in load_file(file).items()}
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    return {name: tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"] for name in names}


def dense(paths: list[Path], name: str) -> list[Tensor]:
    scale = inputs.ALPHA / inputs.RANK
    return [products(path / "adapter_model.safetensors")[name] * scale for path in paths]


def merge(paths: list[Path], out: Path, **recipe: Any) -> dict[str, Tensor]:
    engine.merge({"models": [{"model": str(path)} for path in paths], **recipe}, out, device="cpu", threads=1)
    return products(out / "adapter_model.safetensors")


def test_inputs_are_the_same_every_time(tiny: list[Path], tmp_path: Path) -> None:
    inputs.write_adapter(tmp_path / "again", TINY, 3)
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    first = load_file(tiny[3] / "adapter_model.safetensors")
    assert again.keys() == first.keys()
    assert all(torch.equal(again[key], first[key]) for key in first)
    assert not torch.equal(again[min(again)], load_file(tiny[4] / "adapter_model.safetensors")[min(again)])


def test_the_rank_space_floor_computes_what_svd_does(tiny: list[Path], tmp_path: Path) -> None:
    floor.rank_space(tiny, tmp_path / "floor.safetensors")
    expected = merge(tiny, tmp_path / "out", merge_method="svd")
    found = products(tmp_path / "floor.safetensors")
    assert found.keys() == expected.keys()
    for name, product in found.items():
        error = (product - expected[name]).norm() / expected[name].norm()
        assert float(error) < 1e-4, (
            name
        )  # where it is cut, the floor's float32 core tells values apart less well


def test_the_full_space_floor_computes_what_ties_does(tiny: list[Path]) -> None:
    name = "model.layers.0.mlp.up_proj"
    deltas = torch.stack(dense(tiny, name))
    cuts = deltas.abs().flatten(1).kthvalue(deltas[0].numel() - int(0.2 * deltas[0].numel())).values
    kept = deltas * (deltas.abs() > cuts.view(-1, 1, 1))
    agreeing = kept * (kept * kept.sum(0).sign() > 0)
    expected = agreeing.sum(0) / (agreeing != 0).sum(0).clamp_min(1)
    tensors = [load_file(path / "adapter_model.safetensors") for path in tiny]
    Bs = [t[f"base_model.model.{name}.lora_B.weight"] * floor.SCALE for t in tensors]
    As = [t[f"base_model.model.{name}.lora_A.weight"] * floor.SCALE for t in tensors]
    differing = (floor.ties(Bs, As) - expected).abs() > 1e-6
    assert int(differing.sum()) <= len(tiny)  # the entry at each threshold may fall on either side


def test_a_threshold_is_the_exact_order_statistic() -> None:
    delta = torch.randn(100, 70, generator=torch.Generator().manual_seed(0))
    wanted = -(-delta.numel() // 5)
    assert floor.threshold(delta) == float(delta.abs().flatten().sort(descending=True).values[wanted - 1])


def test_the_range_finder_finds_a_matrix_of_its_rank() -> None:
    B, A = inputs.factors(0, 90, 70)
    found_B, found_A = floor.range_finder(B @ A)
    assert torch.allclose(found_B @ found_A, B @ A, atol=1e-6)


def test_a_case_runs_in_a_process_of_its_own(tiny: list[Path], tmp_path: Path) -> None:
    case = cases.ours("svd", "svd", set="tiny")
    [row] = speed.run([case], tmp_path, rounds=1)
    assert row.error is None
    assert row.median("cpu") > 0
    assert row.median("peak") > 1 << 20


def test_a_case_that_fails_says_why(tiny: list[Path], tmp_path: Path) -> None:
    [row] = speed.run([cases.ours("bad", "svd", set="tiny", nonsense=1)], tmp_path, rounds=2)
    assert "nonsense" in str(row.error)
    assert "failed" in speed.markdown(speed.ratios([row]))


def test_ratios_are_to_the_floor_of_the_same_set() -> None:
    def row(case: Case, *cpu: float) -> speed.Row:
        return speed.Row(case, [{"cpu": value, "wall": value, "peak": 1e6} for value in cpu])

    rows = [
        row(Case("floor: rank space", "floor", floor=None), 2.0, 9.0, 1.0),
        row(Case("floor: rank space", "floor", "small", floor=None), 0.5),
        row(cases.ours("svd", "svd", limit=1.5), 3.0),
        row(cases.ours("svd", "svd", set="small"), 3.0),
    ]
    assert [entry["x"] for entry in speed.ratios(rows)] == [None, None, 1.5, 6.0]
    assert "| 1.50 | <= 1.5 |" in speed.markdown(speed.ratios(rows))


def test_the_table_compares_every_case_with_a_case_of_its_own() -> None:
    everything = [*cases.table({"tsv", "lore"}, quick=False), *cases.full_space(), *cases.whole_model()]
    names = {(case.set, case.name) for case in everything}
    assert len(names) == len(everything)
    assert all(case.floor is None or (case.set, case.floor) in names for case in everything)
