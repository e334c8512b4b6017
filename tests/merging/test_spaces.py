"""Spaces are isometric coordinates: nothing is lost, norms and inner products stay."""

from __future__ import annotations

import pytest
import torch
from golden import dense
from hypothesis import given, settings
from test_lowrank import close, random_stack, stacks

from merging import spaces
from merging.errors import InputError
from merging.updates import LowRank, UpdateStack


@settings(max_examples=40, deadline=None)
@given(stacks)
def test_every_space_gives_each_task_back(stack: UpdateStack) -> None:
    for space in ("full", "knots", "core"):
        place = spaces.place(stack, space)
        for t in range(stack.T):
            lifted = place.lift(place.coordinates.task(t))
            update = lifted if isinstance(lifted, LowRank) else lifted.balanced()
            assert close(update.dense(), stack.task(t), 1e-8)


@settings(max_examples=40, deadline=None)
@given(stacks)
def test_every_space_keeps_inner_products(stack: UpdateStack) -> None:
    x = stack.dense().flatten(2)
    gram = x @ x.mT
    for space in ("knots", "core"):
        c = spaces.place(stack, space).coordinates
        y = c.rows(0, c.m).flatten(2)
        assert close(y @ y.mT, gram, 1e-9)


def test_frames_of_duplicates_have_the_numerical_rank() -> None:
    stack = random_stack(0, 20, 16, [3, 3], duplicate=True)
    assert spaces.core(stack).entries.tolist() == [9]
    assert spaces.knots(stack).entries.tolist() == [3 * 16]
    assert spaces.place(stack, "full").entries.tolist() == [20 * 16]


def test_core_coordinates_depend_on_the_gauge_only_as_is() -> None:
    stack = random_stack(1, 20, 16, [3, 4])
    mixers = [torch.randn(1, r, r, dtype=torch.float64) + 3 * torch.eye(r) for r in stack.ranks]
    other = UpdateStack(
        stack.names,
        stack.tasks,
        tuple(B @ torch.linalg.inv(Q) for B, Q in zip(stack.B, mixers, strict=True)),
        tuple(Q @ A for A, Q in zip(stack.A, mixers, strict=True)),
    )

    def magnitudes(s: UpdateStack, gauge: str) -> torch.Tensor:
        c = spaces.core(s, gauge=gauge).coordinates
        return c.rows(0, c.m).abs()

    assert close(magnitudes(stack, "balanced"), magnitudes(other, "balanced"), 1e-8)
    assert not close(magnitudes(stack, "asis"), magnitudes(other, "asis"), 1e-2)


def test_knots_without_values_puts_them_back_when_it_lifts() -> None:
    stack = random_stack(2, 10, 8, [2, 3])
    place = spaces.knots(stack, with_values=False)
    assert close(dense(place.lift(place.coordinates.task(1))), stack.task(1)[0], 1e-10)


def test_small_coordinates_are_refused_for_dense_inputs() -> None:
    class Dense:
        G, T, m, n = 1, 1, 2, 2
        like = torch.zeros(1)

        def rows(self, start: int, stop: int) -> torch.Tensor:
            return torch.zeros(1, 1, stop - start, 2)

        def task(self, t: int) -> torch.Tensor:
            return torch.zeros(1, 2, 2)

    with pytest.raises(InputError) as caught:
        spaces.place(Dense(), "core")
    assert caught.value.code == "space_not_supported"
