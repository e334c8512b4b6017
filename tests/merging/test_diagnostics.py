"""Diagnostics of a module: the golden values, a dense float64 reference, sampling, edges."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from golden import Golden
from measuring import (
    ALL,
    as_svd,
    assert_agrees,
    build_stack,
    found,
    inside,
    mean_update,
    measured,
    module_of,
    outside,
    reference,
    rows_outside,
    told,
)
from torch import Tensor

from merging.compress import RankRule, compress
from merging.diagnostics import measure
from merging.diagnostics.inputs import null_space_ratio
from merging.diagnostics.spectra import figures
from merging.diagnostics.telling import Measured, inputs_data, module_data
from merging.diagnostics.whole import whole_model
from merging.kernels import Merged
from merging.lowrank import core_svd, joint_frame, thin_svd
from merging.updates import LowRank, UpdateStack

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
        "l1gap_gauss_vs_mean": merged.gap(1.0),
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


# A dense reference


UPDATES = [mean_update, inside, as_svd, rows_outside, outside]
SHAPES = [((3, 5, 4), 24, 20), ((4, 4), 30, 40), ((2,), 9, 7), ((6, 6, 6), 14, 30), ((5, 9), 30, 7)]


@pytest.mark.parametrize("make", UPDATES, ids=lambda make: make.__name__)
@pytest.mark.parametrize(("ranks", "m", "n"), SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 2e-4)])
def test_a_dense_reference_agrees(
    make: Callable[[UpdateStack], LowRank],
    ranks: tuple[int, ...],
    m: int,
    n: int,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    stack = build_stack(ranks, m, n, dtype=dtype)
    update = make(stack)
    B, A = update.factors()
    expected = reference(stack, (B.double() @ A.double())[0])
    assert_agrees(measured(stack, update, sample=ALL), expected, tolerance)


@pytest.mark.parametrize("wide", [True, False])
def test_a_dense_update_is_measured_without_its_spectrum(wide: bool) -> None:
    stack = build_stack((3, 4), *((6, 18) if wide else (18, 6)))
    matrix = torch.relu(stack.dense()[:, 0])
    update = LowRank(None, matrix) if wide else LowRank(matrix, None)
    expected = reference(stack, matrix[0])
    facts = measured(stack, update, sample=ALL)
    for name in ("alignment", "alignment_rank", "singular"):
        del expected[name]
    assert_agrees(facts, expected, 1e-8)
    data = inputs_data(Measured(stack.tasks, stack.m, stack.n, facts))
    assert [entry["subspace_alignment"] for entry in data] == [None, None]


def test_weights_of_an_exact_sum_save_work_but_change_nothing() -> None:
    stack = build_stack((3, 4, 2), 25, 18)
    weights = torch.tensor([0.5, -2.0, 1.0], dtype=torch.float64)
    B, A = stack.scaled(weights).joined()
    plain, quick = (found(measured(stack, LowRank(B, A), weights=w)) for w in (None, weights))
    for name, value in plain.items():
        torch.testing.assert_close(
            quick[name], value, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("make", [mean_update, rows_outside, outside], ids=lambda make: make.__name__)
def test_a_known_svd_saves_work_but_changes_nothing(
    make: Callable[[UpdateStack], LowRank], dtype: torch.dtype
) -> None:
    stack = build_stack((3, 4, 2), 25, 18, dtype=dtype)
    if make is mean_update:  # in the frame, as rank-space methods are
        cores = joint_frame(stack).cores.joined()
        svd = joint_frame(stack).lift(core_svd(cores[0] @ cores[1] / 3))
    else:
        svd = thin_svd(make(stack))
    cut = compress(Merged(svd), RankRule(rank=5), seed=0, names=stack.names)
    assert cut.svd is not None
    plain, quick = (found(measured(stack, cut.update, svd=svd)) for svd in (None, cut.svd))
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    for name, value in plain.items():
        torch.testing.assert_close(
            quick[name],
            value,
            rtol=tolerance,
            atol=tolerance * 10,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_the_gap_is_that_of_gaussian_inputs() -> None:
    stack = build_stack((3, 4), 20, 16)
    merged = measured(stack, outside(stack)).merged
    assert merged is not None
    gap = merged.gap(0.5)
    x = torch.randn(16, 200_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for t in range(2):
        difference = 0.5 * outside(stack).dense()[0] - stack.task(t)[0]
        torch.testing.assert_close(gap[t], (difference @ x).abs().mean(), rtol=2e-3, atol=0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("make", [mean_update, as_svd, outside], ids=lambda make: make.__name__)
def test_a_device_finds_the_same(make: Callable[[UpdateStack], LowRank]) -> None:
    stack = build_stack((3, 5, 4), 200, 150)
    there = UpdateStack(
        stack.names, stack.tasks, tuple(B.cuda() for B in stack.B), tuple(A.cuda() for A in stack.A)
    )
    B, A = make(stack).factors()
    expected = found(measured(stack, make(stack)))
    for name, value in found(measured(there, LowRank(B.cuda(), A.cuda()))).items():
        torch.testing.assert_close(
            value, expected[name], equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_merge_that_is_one_of_its_inputs_has_no_gap_to_it(dtype: torch.dtype) -> None:
    stack = build_stack((3, 4), 20, 16, dtype=dtype)
    svd = thin_svd(LowRank(stack.B[1], stack.A[1])).balanced()
    gap = found(measured(stack, svd))["gap"]
    assert gap[1] == 0.0
    assert gap[0] > 0.0


# Sampling


def test_samples_estimate_the_whole() -> None:
    stack = build_stack((8, 8, 8, 8), 500, 700, dtype=torch.float32)
    whole, sampled = found(measured(stack, sample=ALL)), found(measured(stack))
    for name, tolerance in (("conflict", 0.02), ("pairs", 0.04), ("cancellation", 0.02)):
        torch.testing.assert_close(sampled[name], whole[name], rtol=0.0, atol=tolerance)
    torch.testing.assert_close(sampled["gap"], whole["gap"], rtol=0.1, atol=0.0)
    assert not torch.equal(sampled["conflict"], whole["conflict"])


def test_samples_depend_on_seed_and_module_alone() -> None:
    one = build_stack((3, 3), 300, 200)
    two = UpdateStack(
        ("other", "layer"),
        one.tasks,
        tuple(torch.cat([B, B]) for B in one.B),
        tuple(torch.cat([A, A]) for A in one.A),
    )
    other, same = measure(two, mean_update(two))
    alone = measured(one)
    assert torch.equal(same.entries.pairs, alone.entries.pairs)
    assert not torch.equal(other.entries.pairs, alone.entries.pairs)
    assert not torch.equal(measured(one, seed=1).entries.pairs, alone.entries.pairs)


def test_modules_of_a_batch_are_measured_each_on_its_own() -> None:
    stacks = [build_stack((3, 5), 24, 20, seed=seed) for seed in range(3)]
    batch = UpdateStack(
        ("layer",) * 3,
        (0, 1),
        tuple(torch.cat([stack.B[t] for stack in stacks]) for t in range(2)),
        tuple(torch.cat([stack.A[t] for stack in stacks]) for t in range(2)),
    )
    for together, stack in zip(measure(batch, as_svd(batch)), stacks, strict=True):
        alone = found(measured(stack, as_svd(stack)))
        for name, value in found(together).items():
            torch.testing.assert_close(
                value, alone[name], equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
            )


# Edges


def test_two_copies_of_one_model() -> None:
    one = build_stack((4,), 30, 20, dtype=torch.float32)
    data = told(UpdateStack(one.names, (0, 1), one.B * 2, one.A * 2))
    assert data["cosine"] == [[1.0, 1.0], [1.0, 1.0]]
    assert data["row_overlap"][0][1] == pytest.approx(1.0, abs=1e-5)
    assert data["whitening_min_rows"] == data["whitening_min_columns"] == 0.0
    assert data["sign_conflict"] == data["cancellation"] == 0.0
    assert data["factor_average_error"] == pytest.approx(0.0, abs=1e-5)


def test_a_model_and_its_negative_cancel() -> None:
    one = build_stack((4,), 30, 20)
    data = told(UpdateStack(one.names, (0, 1), (one.B[0], -one.B[0]), one.A * 2))
    assert data["cosine"][0][1] == -1.0
    assert data["sign_conflict"] == data["cancellation"] == 1.0
    assert data["factor_average_error"] is None
    assert [entry["subspace_alignment"] for entry in data["inputs"]] == [None, None]


def test_models_on_orthogonal_directions_do_not_interfere() -> None:
    Q = torch.linalg.qr(torch.randn(20, 6, generator=torch.Generator().manual_seed(0)).double()).Q[None]
    stack = UpdateStack(("layer",), (0, 1), (Q[..., :3], Q[..., 3:]), (Q[..., :3].mT, Q[..., 3:].mT))
    data = told(stack)
    assert data["sti"] == pytest.approx(0.0, abs=1e-9)
    assert data["row_overlap"][0][1] == pytest.approx(0.0, abs=1e-9)
    assert data["whitening_min_rows"] == data["whitening_min_columns"] == 1.0
    assert [entry["subspace_alignment"] for entry in data["inputs"]] == [1.0, 1.0]


@pytest.mark.parametrize("zeros", [(0,), (0, 1)])
def test_zero_updates_give_null_and_never_nan(zeros: tuple[int, ...]) -> None:
    stack = build_stack((2, 3), 8, 9, dtype=torch.float32)
    B = tuple(torch.zeros_like(B) if t in zeros else B for t, B in enumerate(stack.B))
    stack = UpdateStack(stack.names, stack.tasks, B, stack.A)
    data = told(stack)
    json.dumps(data, allow_nan=False)
    assert data["cosine"][0] == [None, None]
    assert data["row_overlap"][0] == [None, None]
    assert data["norm_imbalance"] is None
    assert data["inputs"][0]["effective_rank"] is None
    assert data["inputs"][0]["spectral_norm"] == 0.0
    assert (data["cancellation"] is None) == (len(zeros) == 2)
    json.dumps(whole_model([module_of(stack)], 2).summary, allow_nan=False)


def test_unequal_ranks_have_no_average_of_factors() -> None:
    assert told(build_stack((2, 3), 8, 9))["factor_average_error"] is None


def test_many_models_keep_their_matrices_for_the_summary() -> None:
    module = module_of(build_stack((1,) * 17, 30, 20))
    assert module_data(module)["cosine"] is None
    assert len(whole_model([module], 17).summary["cosine"]) == 17
