"""Diagnostics: the golden values, a dense float64 reference, and what must not change them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import Golden
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from merging.diagnostics import Facts, measure
from merging.diagnostics.against import output_gap
from merging.diagnostics.inputs import null_space_ratio
from merging.diagnostics.spectra import figures
from merging.diagnostics.telling import Measured, inputs_data, module_data
from merging.diagnostics.whole import whole_model
from merging.lowrank import thin_svd
from merging.updates import LowRank, UpdateStack

ALL = 10**9
"""A sample that takes in every entry."""


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


def module_of(stack: UpdateStack, update: LowRank | None = None, **options: Any) -> Measured:
    return Measured(stack.tasks, stack.m, stack.n, measured(stack, update, **options))


def told(stack: UpdateStack, update: LowRank | None = None, factor: float = 1.0) -> dict[str, Any]:
    """Everything the report says of one module."""
    module = module_of(stack, update)
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


# A dense reference: the definitions, written with m x n matrices


def reference(stack: UpdateStack, merged: Tensor) -> dict[str, Tensor]:
    """What :func:`measure` finds, for small modules, from the definitions."""
    deltas = stack.to(torch.float64).dense()[0]
    T = len(deltas)
    spectra = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    ranks = [int((S > 1e-5 * S[0]).sum()) for _, S, _ in spectra]
    U = [spectrum.U[:, :r] for spectrum, r in zip(spectra, ranks, strict=True)]
    V = [spectrum.Vh[:r].T for spectrum, r in zip(spectra, ranks, strict=True)]
    S = torch.cat([spectrum.S[:r] for spectrum, r in zip(spectra, ranks, strict=True)])
    left, right = torch.cat(U, 1), torch.cat(V, 1)
    eye = torch.eye(len(S), dtype=torch.float64)

    def pairs(function: Callable[[int, int], Tensor]) -> Tensor:
        return torch.stack([torch.stack([function(i, j) for j in range(T)]) for i in range(T)])

    def overlap(bases: list[Tensor]) -> Tensor:
        return pairs(lambda i, j: ((bases[i].T @ bases[j]) ** 2).sum() / min(ranks[i], ranks[j]))

    def smallest(vectors: Tensor) -> Tensor:
        size, count = vectors.shape
        return torch.linalg.svdvals(vectors)[-1] if count <= size else torch.tensor(0.0).double()

    W, values, _ = torch.linalg.svd(merged)
    kept = int(((values**2).flip(0).cumsum(0) > 0.05**2 * (values**2).sum()).sum())
    signs = deltas.sign()
    return {
        "gram": pairs(lambda i, j: (deltas[i] * deltas[j]).sum()),
        "row_overlap": overlap(V),
        "column_overlap": overlap(U),
        "sti": ((left.T @ left - eye) @ S.diag() @ (right.T @ right - eye)).abs().sum(),
        "whitening_columns": smallest(left),
        "whitening_rows": smallest(right),
        "mean2": (deltas.mean(0) ** 2).sum(),
        "conflict": ((deltas > 0).any(0) & (deltas < 0).any(0)).double().mean(),
        "pairs": pairs(lambda i, j: (signs[i] * signs[j] < 0).double().mean()),
        "cancellation": 1 - deltas.sum(0).abs().sum() / deltas.abs().sum(),
        "norm2": (merged**2).sum(),
        "products": torch.stack([(merged * delta).sum() for delta in deltas]),
        "singular": values,
        "alignment": torch.stack([(W[:, :kept].T @ delta).norm() / delta.norm() for delta in deltas]),
        "alignment_rank": torch.tensor(float(kept)).double(),
        "gap": torch.stack(
            [math.sqrt(2 / math.pi) * (merged - delta).norm(dim=1).mean() for delta in deltas]
        ),
    }


def found(facts: Facts) -> dict[str, Tensor]:
    assert facts.merged is not None
    values = {**vars(facts.inputs), **vars(facts.entries), **vars(facts.merged)}
    gap = output_gap(facts.merged.row_merged, facts.merged.row_cross, facts.merged.row_inputs, 1.0)
    return {**values, "gap": gap, "cancellation": 1 - facts.entries.of_sum / facts.entries.of_parts}


def assert_agrees(facts: Facts, expected: dict[str, Tensor], tolerance: float) -> None:
    actual = found(facts)
    for name, value in expected.items():
        got = actual[name]
        if name == "singular":  # as many as the factors have columns; the others are zero
            width = min(len(got), len(value))
            assert not len(got) or float(value[width:].sum()) < 1e-9 * float(value[0])
            got, value = got[:width], value[:width]
        scale = max(1.0, float(value.abs().max())) if value.numel() else 1.0
        if name == "gap":  # a difference of squares: exact to the root of rounding of the inputs' size
            scale = float(facts.inputs.gram.diagonal().max().sqrt()) * tolerance**-0.5 * 0.1
        torch.testing.assert_close(
            got, value, rtol=tolerance, atol=tolerance * scale, msg=lambda text, name=name: f"{name}: {text}"
        )


def inside(stack: UpdateStack) -> LowRank:
    """A merge in the span of the inputs, in factors that are not those of an SVD."""
    B, A = stack.joined()
    mix = torch.randn(A.shape[1], A.shape[1], generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return LowRank(B, mix.to(A) @ A)


def as_svd(stack: UpdateStack) -> LowRank:
    """The same as an SVD, as most methods emit it, with a padding column."""
    B, A = thin_svd(inside(stack)).balanced().factors()  # float64 whatever the inputs, as some kernels do
    return LowRank(torch.nn.functional.pad(B, (0, 1)), torch.nn.functional.pad(A, (0, 0, 0, 1)))


def rows_outside(stack: UpdateStack) -> LowRank:
    """Columns in the span, rows not (as entry-wise rules in KnOTS coordinates produce)."""
    B, A = stack.joined()
    return LowRank(B, torch.relu(A))


def outside(stack: UpdateStack) -> LowRank:
    """An update that has little to do with the inputs (as rules in full space produce)."""
    generator = torch.Generator().manual_seed(8)
    B = torch.randn(1, stack.m, 3, generator=generator, dtype=torch.float64)
    A = torch.randn(1, 3, stack.n, generator=generator, dtype=torch.float64)
    return LowRank(B.to(stack.like), A.to(stack.like))


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


def test_the_gap_is_that_of_gaussian_inputs() -> None:
    stack = build_stack((3, 4), 20, 16)
    merged = measured(stack, outside(stack)).merged
    assert merged is not None
    gap = output_gap(merged.row_merged, merged.row_cross, merged.row_inputs, 0.5)
    x = torch.randn(16, 200_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for t in range(2):
        difference = 0.5 * outside(stack).dense()[0] - stack.task(t)[0]
        torch.testing.assert_close(gap[t], (difference @ x).abs().mean(), rtol=2e-3, atol=0.0)


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


# Invariants

shapes = st.tuples(st.integers(1, 12), st.integers(1, 12))
rank_lists = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)
GAUGE_DEPENDENT = "average_error2"


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], skip: tuple[str, ...] = ()) -> None:
    for name, value in expected.items():
        if name not in skip:
            # The smallest singular value of nearly dependent vectors is only known to the root of rounding.
            atol = 2e-6 if name.startswith("whitening") else 1e-7
            torch.testing.assert_close(
                actual[name],
                value,
                rtol=1e-6,
                atol=atol,
                equal_nan=True,
                msg=lambda text, name=name: f"{name}: {text}",
            )


@given(rank_lists, shapes, st.integers(0, 99))
def test_the_split_into_factors_does_not_matter(
    ranks: tuple[int, ...], shape: tuple[int, int], seed: int
) -> None:
    stack = build_stack(ranks, *shape, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    B, A = [], []
    for one, other in zip(stack.B, stack.A, strict=True):
        r = one.shape[2]
        turn = torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64)).Q
        gauge = turn * torch.linspace(0.2, 3.0, r, dtype=torch.float64)
        B.append(one @ gauge)
        A.append(torch.linalg.inv(gauge) @ other)
    turned = UpdateStack(stack.names, stack.tasks, tuple(B), tuple(A))
    update = mean_update(stack)
    assert_same(found(measured(turned, update)), found(measured(stack, update)), skip=(GAUGE_DEPENDENT,))


@given(rank_lists, shapes, st.integers(0, 99), st.randoms(use_true_random=False))
def test_the_order_of_the_models_only_orders_the_answer(
    ranks: tuple[int, ...], shape: tuple[int, int], seed: int, random: Any
) -> None:
    stack = build_stack(ranks, *shape, seed=seed)
    order = random.sample(range(stack.T), stack.T)
    moved = UpdateStack(
        stack.names, stack.tasks, tuple(stack.B[t] for t in order), tuple(stack.A[t] for t in order)
    )
    update = mean_update(stack)
    expected = found(measured(stack, update))
    for name in ("gram", "row_overlap", "column_overlap", "pairs"):
        expected[name] = expected[name][order][:, order]
    for name in ("singular", "products", "alignment", "gap"):
        expected[name] = expected[name][order] if name != "singular" else expected[name]
    for name in ("row_cross", "row_inputs"):
        expected[name] = expected[name][:, order]
    assert_same(found(measured(moved, update)), expected)


@given(rank_lists, shapes, st.integers(0, 99), st.sampled_from([1e-3, 0.5, 40.0]))
def test_a_common_scale_changes_norms_and_no_shape(
    ranks: tuple[int, ...], shape: tuple[int, int], seed: int, scale: float
) -> None:
    stack = build_stack(ranks, *shape, seed=seed)
    grown = UpdateStack(stack.names, stack.tasks, tuple(B * scale for B in stack.B), stack.A)
    before, after = told(stack), told(grown)
    lengths = {"sti", "l1_gap", "spectral_norm", "nuclear_norm"}

    def compare(name: str, one: Any, other: Any) -> None:
        if isinstance(one, dict):
            assert one.keys() == other.keys()
            for key in one:
                compare(key, one[key], other[key])
        elif isinstance(one, list):
            for left, right in zip(one, other, strict=True):
                compare(name, left, right)
        elif one is None or other is None:
            assert one is other
        else:
            expected = one * scale if name in lengths else one
            assert other == pytest.approx(expected, rel=2e-5, abs=1e-6 * (scale if name in lengths else 1.0))

    compare("", before, after)


@given(rank_lists, shapes, st.integers(0, 99))
def test_the_transpose_swaps_rows_and_columns(
    ranks: tuple[int, ...], shape: tuple[int, int], seed: int
) -> None:
    stack = build_stack(ranks, *shape, seed=seed)
    swapped = UpdateStack(
        stack.names, stack.tasks, tuple(A.mT for A in stack.A), tuple(B.mT for B in stack.B)
    )
    one, other = found(measured(stack)), found(measured(swapped))
    expected = {name: one[name] for name in ("gram", "sti", "conflict", "pairs", "average_error2", "norm2")}
    for name, twin in (("row_overlap", "column_overlap"), ("whitening_rows", "whitening_columns")):
        expected |= {name: one[twin], twin: one[name]}
    assert_same(other, expected)


@given(rank_lists, shapes, st.integers(0, 99))
def test_shares_and_cosines_stay_in_their_ranges(
    ranks: tuple[int, ...], shape: tuple[int, int], seed: int
) -> None:
    stack = build_stack(ranks, *shape, seed=seed)
    facts = found(measured(stack))
    for name in ("row_overlap", "column_overlap", "conflict", "pairs", "alignment", "cancellation"):
        assert bool(((facts[name] >= -1e-12) & (facts[name] <= 1.0)).all()), name
    limit = min(shape)
    for entry, rank in zip(inputs_data(module_of(stack)), ranks, strict=True):
        ceiling = min(rank, limit) * (1 + 1e-6)
        assert 1.0 <= entry["stable_rank"] <= ceiling
        assert entry["stable_rank"] <= entry["participation_ratio"] * (1 + 1e-6) <= ceiling * (1 + 1e-5)
        assert 1.0 - 1e-6 <= entry["effective_rank"] <= ceiling
        assert entry["energy_rank_90"] <= entry["energy_rank_95"] <= entry["energy_rank_99"] <= ceiling


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


# The whole model


def test_the_whole_model_is_the_block_diagonal_matrix_of_its_modules() -> None:
    shapes = [(12, 9), (7, 14)]
    stacks = [build_stack((3, 3), m, n, seed=i) for i, (m, n) in enumerate(shapes)]
    modules = [module_of(stack) for stack in stacks]
    deltas = [torch.block_diag(*(stack.task(t)[0] for stack in stacks)) for t in range(2)]
    whole = whole_model(modules, 2)
    cosine = float((deltas[0] * deltas[1]).sum() / deltas[0].norm() / deltas[1].norm())
    assert whole.summary["cosine"][0][1] == pytest.approx(cosine, rel=1e-5)
    for t, entry in enumerate(whole.inputs):
        values = torch.linalg.svdvals(deltas[t])
        assert entry["spectral_norm"] == pytest.approx(float(values[0]), rel=1e-5)
        assert entry["nuclear_norm"] == pytest.approx(float(values.sum()), rel=1e-5)
    total = sum(delta for delta in deltas)
    parts = sum(delta.abs() for delta in deltas)
    assert whole.summary["cancellation"] == pytest.approx(
        1 - float(total.abs().sum() / parts.sum()), rel=1e-5
    )
    assert whole.summary["sti"] == pytest.approx(sum(module_data(m)["sti"] for m in modules), rel=1e-5)
    merged = torch.linalg.svdvals(total / 2)
    assert whole.summary["merged"]["nuclear_norm"] == pytest.approx(float(merged.sum()), rel=1e-5)
    assert whole.summary["merged"]["spectral_norm"] == pytest.approx(float(merged[0]), rel=1e-5)


def test_models_without_a_module_take_no_part_in_it() -> None:
    first, second = build_stack((3, 2), 12, 9), build_stack((2,), 7, 14, seed=1)
    modules = [module_of(first), Measured((1,), 7, 14, measured(second))]
    whole = whole_model(modules, 2)
    assert whole.inputs[0] == inputs_data(modules[0])[0]
    assert whole.summary["row_overlap"][0][1] == module_data(modules[0])["row_overlap"][0][1]
    squares = float((first.task(1) ** 2).sum()), float((second.task(0) ** 2).sum())
    ranks = inputs_data(modules[0])[1]["stable_rank"], inputs_data(modules[1])[0]["stable_rank"]
    expected = sum(s * r for s, r in zip(squares, ranks, strict=True)) / sum(squares)
    assert whole.inputs[1]["stable_rank"] == pytest.approx(expected, rel=1e-5)


def test_lambda_scales_the_merged_norms_and_moves_the_gap() -> None:
    stack = build_stack((3, 4), 20, 16)
    plain, doubled = told(stack), told(stack, factor=-2.0)
    for name in ("spectral_norm", "nuclear_norm"):
        assert doubled["merged"][name] == pytest.approx(2 * plain["merged"][name], rel=1e-5)
    assert doubled["merged"]["stable_rank"] == plain["merged"]["stable_rank"]
    assert doubled["inputs"][0]["subspace_alignment"] == plain["inputs"][0]["subspace_alignment"]
    B, A = mean_update(stack).factors()
    assert doubled["inputs"][0]["l1_gap"] == told(stack, LowRank(-2.0 * B, A))["inputs"][0]["l1_gap"]
