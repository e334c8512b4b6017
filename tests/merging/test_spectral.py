"""Sizes, warnings, parameters and presets of the spectral methods."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import dense_reference
import pytest
import torch
from golden import assert_close, dense, run
from test_invariants_spectral import METHODS, as_stack, kernel_and_context, merge
from torch import Tensor

from merging import catalog
from merging.errors import InputError
from merging.lowrank import ThinSVD, core_svd
from merging.methods.iso import split_sizes
from merging.methods.tsv import kept_ranks
from merging.recipe import Recipe
from merging.spectral import isotropize

Factors = list[tuple[Tensor, Tensor]]


def factors(*ranks: int, m: int = 30, n: int = 24, seed: int = 0) -> Factors:
    random = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(m, rank, dtype=torch.float64, generator=random),
            torch.randn(rank, n, dtype=torch.float64, generator=random),
        )
        for rank in ranks
    ]


def deltas(given: Factors) -> list[Tensor]:
    return [B @ A for B, A in given]


def warnings_of(method: str, given: Factors, **parameters: Any) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    kernel, context = kernel_and_context(method, len(given), **parameters)
    kernel.merge(as_stack(given), replace(context, warn=lambda code, text: found.append((code, text))))
    return found


def resolve(method: str, models: int = 2, **recipe: Any) -> catalog.Resolved:
    entries = [{"model": f"t{i}"} for i in range(models)]
    return catalog.resolve(Recipe.load({"merge_method": method, "models": entries, **recipe}))


class TestTsvRanks:
    def test_everything_is_kept_where_it_fits(self) -> None:
        assert kept_ranks([4, 2, 6], [None] * 3, 12) == [4, 2, 6]

    def test_large_ranks_share_evenly_as_in_the_paper(self) -> None:
        assert kept_ranks([48] * 5, [None] * 5, 48) == [9] * 5

    def test_small_ranks_leave_their_room_to_the_others(self) -> None:
        assert kept_ranks([2, 10, 10], [None] * 3, 14) == [2, 6, 6]

    def test_at_least_one_triplet_each(self) -> None:
        assert kept_ranks([3] * 7, [None] * 7, 5) == [1] * 7

    def test_a_number_is_a_ceiling_and_may_differ_by_model(self) -> None:
        assert kept_ranks([8, 8, 2], [3, None, 5], 20) == [3, 8, 2]

    def test_k_keeps_the_leading_triplets(self) -> None:
        [only] = given = factors(5)
        U, S, Vh = torch.linalg.svd(only[0] @ only[1], full_matrices=False)
        assert_close(merge("tsv", as_stack(given), k=2), U[:, :2] * S[:2] @ Vh[:2], 1e-12)

    def test_k_of_one_model_overrides_the_common_one(self) -> None:
        given = factors(4, 4)
        recipe = {
            "merge_method": "tsv",
            "parameters": {"k": 4},
            "models": [{"model": "a", "parameters": {"k": 1}}, {"model": "b"}],
        }
        assert [p.k for p in catalog.resolve(Recipe.load(recipe)).per_model] == [1, 4]  # type: ignore[attr-defined]
        kernel, context = kernel_and_context("tsv", 2)
        context = replace(context, per_model=catalog.resolve(Recipe.load(recipe)).per_model)
        merged = kernel.merge(as_stack(given), context).update
        assert merged.S.shape[-1] == 5

    def test_a_cut_that_nobody_asked_for_is_reported(self) -> None:
        [(code, text)] = warnings_of("tsv", factors(10, 10, 10))
        assert code == "tsv_truncated"
        assert "[10, 10, 10]" in text
        assert "[8, 8, 8]" in text
        assert warnings_of("tsv", factors(8, 8, 8)) == []


class TestTsvOverlap:
    def test_exact_copies_raise_no_alarm_wherever_they_stand(self) -> None:
        a, b = factors(4, 4)
        assert_close(merge("tsv", as_stack([a, a, b])), merge("tsv", as_stack([a, b, a])), 1e-12)
        assert warnings_of("tsv", [a, a, b]) == []

    @pytest.mark.parametrize(("distance", "warned"), [(1e-3, True), (0.1, False)])
    def test_near_copies_are_whitened_plainly_and_reported(self, distance: float, warned: bool) -> None:
        a, b = factors(3, 3)
        near = (a[0] + distance * b[0], a[1] + distance * b[1])
        assert_close(merge("tsv", as_stack([a, near])), dense_reference.tsv(deltas([a, near]), [3, 3]), 1e-9)
        assert [code for code, _ in warnings_of("tsv", [a, near])] == ["near_duplicate_directions"] * warned

    def test_copies_up_to_rounding_give_that_model(self) -> None:
        a, b = factors(3, 3)
        near = (a[0] + 1e-8 * b[0], a[1] + 1e-8 * b[1])
        assert_close(merge("tsv", as_stack([a, near])), a[0] @ a[1], 1e-6)

    def test_an_update_in_other_factors_is_a_copy_in_float32_too(self) -> None:
        """Rounding turns weak singular vectors by much more than `eps`; whitening must not blow that up."""
        (B, A), other = factors(8, 4, m=300, n=200)
        steep = torch.logspace(0, -2, 8, dtype=torch.float64)
        B, A = B * steep, steep.unsqueeze(-1) * A
        turn = torch.linalg.qr(factors(8, m=8, n=8)[0][0]).Q
        given = [(B, A), other, (B @ turn.mT, turn @ A)]
        assert_close(merge("tsv", as_stack(given, torch.float32)), merge("tsv", as_stack(given)), 1e-5)


class TestIsotropy:
    @pytest.mark.parametrize(
        ("reach", "tasks", "expected"),
        [(768, 8, (616, 19)), (768, 20, (608, 8)), (96, 6, (78, 3)), (12, 3, (9, 1)), (0, 3, (0, 0))],
    )
    def test_common_and_task_directions(self, reach: int, tasks: int, expected: tuple[int, int]) -> None:
        k, s = split_sizes(torch.tensor([reach]), tasks, 0.8)
        assert (int(k), int(s)) == expected

    @pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.8, 0.99, 1.0])
    @pytest.mark.parametrize("tasks", [1, 2, 3, 7, 30])
    def test_sizes_never_exceed_the_directions(self, tasks: int, fraction: float) -> None:
        reach = torch.arange(40)
        k, s = split_sizes(reach, tasks, fraction)
        assert bool((k >= 0).all())
        assert torch.equal(k + tasks * s, reach)

    def test_the_denominators_differ_by_a_factor(self) -> None:
        stack = as_stack(factors(2, 3))
        by_rank = merge("iso_c", stack)
        assert_close(merge("iso_c", stack, iso_denominator="core"), by_rank, 1e-12)
        assert_close(merge("iso_c", stack, iso_denominator="full"), by_rank * 5 / 24, 1e-12)

    def test_the_core_denominator_does_not_count_what_models_repeat(self) -> None:
        a, b = factors(2, 3)
        opposite = (-0.5 * a[0], a[1])
        stack = as_stack([a, b, opposite])
        by_rank = merge("iso_c", stack)
        assert_close(merge("iso_c", stack, iso_denominator="core"), by_rank, 1e-12)

    def test_a_fraction_of_one_is_iso_c(self) -> None:
        stack = as_stack(factors(4, 4, 4))
        assert_close(merge("iso_cts", stack, common_space_fraction=1.0), merge("iso_c", stack), 1e-12)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
    def test_updates_that_cancel_leave_nothing(self, method: str, dtype: torch.dtype) -> None:
        """Rounding noise of the sum must not be made isotropic."""
        (B, A), _ = factors(3, 3, m=200, n=150)
        stack = as_stack([(B, A), (-2 * B, 0.5 * A)], dtype)
        merged = (
            merge(method, stack, common_space_fraction=1.0) if method == "iso_cts" else merge(method, stack)
        )
        assert torch.equal(merged, torch.zeros_like(merged))

    def test_directions_that_hang_on_the_last_digits_come_out_the_same_in_float32(self) -> None:
        """Models trained from one initial A: the whitened stack is nearly dependent by construction."""
        common = factors(8, m=96, n=80)[0]
        given = [(B, common[1] + 0.02 * A) for B, A in factors(*[8] * 6, m=96, n=80, seed=7)]
        given = [(B.float().double(), A.float().double()) for B, A in given]
        assert_close(
            merge("iso_cts", as_stack(given, torch.float32)), merge("iso_cts", as_stack(given)), 1e-6
        )

    def test_isotropize_is_idempotent(self) -> None:
        (delta,) = deltas(factors(5))
        once = isotropize(core_svd(delta.unsqueeze(0)))
        assert_close(dense(isotropize(core_svd(dense(once).unsqueeze(0)))), dense(once), 1e-12)

    def test_isotropize_by_module(self) -> None:
        svd = ThinSVD(
            torch.eye(3).repeat(2, 1, 1), torch.tensor([[4.0, 2.0, 1e-9], [3.0, 2.0, 1.0]]), torch.eye(3)
        )
        assert torch.equal(isotropize(svd).S, torch.tensor([[3.0, 3.0, 0.0], [2.0, 2.0, 2.0]]))
        by_three = isotropize(svd, torch.tensor([3, 6])).S
        assert torch.equal(by_three, torch.tensor([[2.0, 2.0, 0.0], [1.0, 1.0, 1.0]]))
        floor = torch.tensor([0.0, 1.5])
        assert torch.equal(isotropize(svd, floor=floor).S[1], torch.tensor([2.5, 2.5, 0.0]))

    def test_tsv_may_finish_isotropic(self) -> None:
        stack = as_stack(factors(3, 2))
        values = torch.linalg.svdvals(merge("tsv", stack, isotropize=True))[:5]
        assert_close(values, torch.linalg.svdvals(merge("tsv", stack))[:5].mean().expand(5), 1e-12)


class TestCart:
    def test_a_rank_from_one_on_is_that_rank(self) -> None:
        given = factors(4, 4, 4)
        share = merge("cart", as_stack(given), cart_rank=0.5)  # of 12 directions
        assert_close(merge("cart", as_stack(given), cart_rank=6), share, 1e-12)

    def test_a_rank_that_cuts_nothing_gives_the_average_and_says_so(self) -> None:
        given = factors(2, 2)
        average = torch.stack(deltas(given)).mean(0)
        assert_close(merge("cart", as_stack(given), cart_rank=4), average, 1e-12)
        assert [code for code, _ in warnings_of("cart", given, cart_rank=4)] == ["cart_is_average"]
        assert warnings_of("cart", given, cart_rank=3) == []


class TestCatalogue:
    @pytest.mark.parametrize("method", METHODS)
    def test_scale_is_calibrated_unless_the_paper_is_asked_for(self, method: str) -> None:
        assert resolve(method).params.lambda_ == "auto"
        assert resolve(method).method.auto_norm is not None
        assert resolve(method, compat="paper").params.lambda_ == 1.0

    def test_the_paper_divides_by_the_smaller_side(self) -> None:
        assert resolve("iso_c", compat="paper").params.iso_denominator == "full"  # type: ignore[attr-defined]

    @pytest.mark.parametrize(
        ("method", "parameter", "value"),
        [
            ("tsv", "k", 0),
            ("tsv", "k", 1.5),
            ("cart", "cart_rank", 1.5),
            ("cart", "cart_rank", 0.0),
            ("iso_c", "iso_denominator", "half"),
            ("iso_c", "common_space_fraction", 0.5),
            ("iso_cts", "common_space_fraction", 1.1),
        ],
    )
    def test_bad_parameters_are_named(self, method: str, parameter: str, value: Any) -> None:
        with pytest.raises(InputError) as caught:
            resolve(method, parameters={parameter: value})
        assert caught.value.where["field"] == f"parameters.{parameter}"

    @pytest.mark.parametrize(("preset", "space"), [("core_space", "core"), ("knots", "knots")])
    def test_presets_are_ties_in_their_space(self, preset: str, space: str) -> None:
        stack = as_stack(factors(4, 3, 5))
        [expected] = run("ties", [stack], {"density": 0.3}, space=space)
        [actual] = run(preset, [stack], {"density": 0.3})
        assert torch.equal(actual, expected)
        assert resolve(preset, space=space).space == space
        with pytest.raises(InputError) as caught:
            resolve(preset, space="full")
        assert caught.value.code == "space_not_supported"


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_a_device_gives_the_same_products(method: str) -> None:
    given = factors(8, 8, 8, 8, m=400, n=300)
    stack = as_stack(given, torch.float32)
    there = replace(stack, B=tuple(B.cuda() for B in stack.B), A=tuple(A.cuda() for A in stack.A))
    assert_close(merge(method, there).cpu(), merge(method, stack), 1e-4)
