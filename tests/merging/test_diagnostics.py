"""Diagnostics: the golden values, a dense float64 reference, and what must not change them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from golden import Golden
from torch import Tensor

from merging.diagnostics import Facts, measure
from merging.diagnostics.against import output_gap
from merging.diagnostics.inputs import null_space_ratio
from merging.diagnostics.spectra import figures
from merging.diagnostics.telling import Measured, inputs_data, module_data
from merging.updates import LowRank, UpdateStack


def build_stack(
    ranks: tuple[int, ...], m: int, n: int, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> UpdateStack:
    generator = torch.Generator().manual_seed(seed)
    B = tuple(torch.randn(1, m, r, generator=generator, dtype=torch.float64).to(dtype) for r in ranks)
    A = tuple(torch.randn(1, r, n, generator=generator, dtype=torch.float64).to(dtype) for r in ranks)
    return UpdateStack(("layer",), tuple(range(len(ranks))), B, A)


def mean_update(stack: UpdateStack) -> LowRank:
    B, A = stack.joined()
    return LowRank(B / stack.T, A)


def measured(stack: UpdateStack, update: LowRank | None = None, **options: Any) -> Facts:
    (facts,) = measure(stack, update or mean_update(stack), **options)
    return facts


def told(stack: UpdateStack, update: LowRank | None = None, factor: float = 1.0) -> dict[str, Any]:
    """Everything the report says of one module."""
    module = Measured(stack.tasks, stack.m, stack.n, measured(stack, update))
    return {**module_data(module, factor), "inputs": inputs_data(module, factor)}


# The golden values


@pytest.fixture(scope="module")
def golden(golden_dir: Path) -> dict[str, Tensor]:
    return Golden(golden_dir / "diagnostics.safetensors").tensors


def golden_stack(tensors: dict[str, Tensor], name: str, dtype: torch.dtype = torch.float64) -> UpdateStack:
    scales = tensors[f"{name}.scales"]
    B = tuple((s * tensors[f"{name}.{t}.lora_B"]).to(dtype)[None] for t, s in enumerate(scales))
    A = tuple(tensors[f"{name}.{t}.lora_A"].to(dtype)[None] for t in range(len(scales)))
    return UpdateStack(("layer",), tuple(range(len(scales))), B, A)


DTYPES = [(torch.float64, 1e-9), (torch.float32, 1e-4)]


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_golden_inputs(golden: dict[str, Tensor], dtype: torch.dtype, tolerance: float) -> None:
    facts = measured(golden_stack(golden, "in", dtype)).inputs
    spectrum = figures(facts.singular)
    found = {
        "gram": facts.gram,
        "norms": facts.gram.diagonal().sqrt(),
        "effective_rank": spectrum["effective_rank"],
        "stable_rank": spectrum["stable_rank"],
        "participation_ratio": spectrum["participation_ratio"],
        "nuclear_norm": spectrum["nuclear_norm"],
        "spectral_norm": spectrum["spectral_norm"],
        "row_overlap": facts.row_overlap,
        "col_overlap": facts.column_overlap,
        "sti": facts.sti,
        "singular_values1": facts.singular[1],
    }
    for name, value in found.items():
        torch.testing.assert_close(
            value,
            golden[f"out.{name}"],
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_golden_merged(golden: dict[str, Tensor], dtype: torch.dtype, tolerance: float) -> None:
    merged = measured(golden_stack(golden, "in", dtype)).merged
    squares = golden["out.norms"] ** 2
    error = (merged.norm2 - 2 * merged.products + squares).sqrt() / squares.sqrt()
    found = {
        "sar_vs_mean": merged.alignment,
        "sar_k": merged.alignment_rank,
        "retention_vs_mean": merged.products / squares,
        "rel_error_vs_mean": error,
        "l1gap_gauss_vs_mean": output_gap(merged.row_merged, merged.row_cross, merged.row_inputs, 1.0),
    }
    for name, value in found.items():
        torch.testing.assert_close(
            value,
            golden[f"out.{name}"],
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_golden_alignment_by_the_rule_of_the_public_code(golden: dict[str, Tensor]) -> None:
    merged = measured(golden_stack(golden, "in"), rule="code").merged
    torch.testing.assert_close(merged.alignment, golden["out.sar_coderule_vs_mean"])
    assert float(merged.alignment_rank) == float(golden["out.sar_coderule_k"])


def test_golden_entries_of_a_small_module_are_exact(golden: dict[str, Tensor]) -> None:
    entries = measured(golden_stack(golden, "in")).entries
    torch.testing.assert_close(entries.conflict, golden["out.sign_conflict_any"])
    torch.testing.assert_close(entries.pairs, golden["out.sign_conflict_pair"])
    torch.testing.assert_close(1 - entries.of_sum / entries.of_parts, golden["out.cancellation"])


def test_golden_error_of_averaging_factors(golden: dict[str, Tensor]) -> None:
    facts = measured(golden_stack(golden, "in_equal_rank")).inputs
    expected = golden["out.factor_avg_inexactness_equal_rank"]
    torch.testing.assert_close((facts.average_error2 / facts.mean2).sqrt(), expected)


def test_golden_null_space_ratio(golden_dir: Path) -> None:
    tensors = Golden(golden_dir / "nsc_ratio.safetensors").tensors
    found = null_space_ratio(golden_stack(tensors, "in"), tensors["in.x"])
    torch.testing.assert_close(found[0], tensors["out.null_space_ratio"])
