"""What must hold for LoRA-LEGO, against a dense float64 reference, over random stacks."""

from __future__ import annotations

import pytest
import torch
from golden import assert_close
from hypothesis import given
from hypothesis import strategies as st
from named_tools import close, deltas, merged, quick
from stacks import copies, module, permuted, stacks
from torch import Tensor

from merging.catalog.named import LegoParams
from merging.errors import InputError
from merging.methods import lego
from merging.updates import UpdateStack


def dense_lego(
    stack: UpdateStack, labels: list[int], k: int, params: LegoParams, weights: list[float]
) -> Tensor:
    """The published steps, unit by unit, for a batch of one."""
    units, shares = [], []
    for B, A, weight in zip(stack.B, stack.A, weights, strict=True):
        for j in range(B.shape[2]):
            units.append(torch.cat([A[0, j], B[0, :, j]]))
            shares.append(weight)
    order = float("inf") if params.norm == "inf" else 2.0
    result = torch.zeros(stack.m, stack.n, dtype=torch.float64)
    for cluster in range(k):
        members = [(x, w) for x, w, label in zip(units, shares, labels, strict=True) if label == cluster]
        if not members:
            continue
        total = sum(w for _, w in members)
        centre = torch.stack([x * (w / total) for x, w in members]).sum(0)
        if params.param_reweight:
            mean = sum(float(x.norm(p=order)) * w / total for x, w in members)
            centre = centre * (mean / centre.norm(p=order))
        result += torch.outer(centre[stack.n :], centre[: stack.n])
    rank = sum(stack.ranks) / stack.T
    return result * (rank / k) ** 0.5 if params.output_reweight else result


@quick
@given(
    stack=stacks(kinds=("random", "shared")),
    norm=st.sampled_from(["inf", "l2"]),
    param=st.booleans(),
    output=st.booleans(),
    weights=st.sampled_from([[1.0] * 4, [2.0, 0.5, 1.0, 3.0]]),
    data=st.data(),
)
def test_lego_is_the_unit_by_unit_algorithm(
    stack: UpdateStack, norm: str, param: bool, output: bool, weights: list[float], data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, stack.R))
    labels = data.draw(st.lists(st.integers(0, k - 1), min_size=stack.R, max_size=stack.R))
    params = LegoParams.model_validate({"norm": norm, "param_reweight": param, "output_reweight": output})
    weights = weights[: stack.T]
    for g in range(stack.G):
        alone = module(stack, g)
        units = lego.pool(alone, torch.tensor(weights))
        update = lego.rebuild(units, torch.tensor([labels]), k, params, stack.R / stack.T)
        assert update.rank == k
        close(update.dense()[0], dense_lego(alone, labels, k, params, weights), 1e-9, deltas(alone))


@quick
@given(stack=stacks(), canonicalize=st.booleans())
def test_lego_with_a_cluster_per_unit_is_the_scaled_sum(stack: UpdateStack, canonicalize: bool) -> None:
    parameters = {"k": stack.R, "canonicalize": canonicalize}
    expected = ((stack.R / stack.T) / stack.R) ** 0.5 * stack.dense().sum(1)
    close(merged("lora_lego", stack, parameters), expected, 1e-10, stack.dense())


@quick
@given(stack=stacks(kinds=("random",)), canonicalize=st.booleans())
def test_lego_of_one_adapter_is_the_identity(stack: UpdateStack, canonicalize: bool) -> None:
    one = copies(stack, 1)
    close(merged("lora_lego", one, {"canonicalize": canonicalize}), one.dense()[:, 0], 1e-10, one.dense())


@quick
@given(stack=stacks(kinds=("random",)), data=st.data())
def test_lego_of_an_adapter_and_its_permuted_copy_is_the_identity(
    stack: UpdateStack, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(stack.ranks[0])))
    B, A = stack.B[0], stack.A[0]
    pair = UpdateStack(stack.names, (0, 1), (B, B[:, :, order]), (A, A[:, order]))
    close(merged("lora_lego", pair), (B @ A), 1e-9, B @ A)


@quick
@given(stack=stacks(min_tasks=2, kinds=("random", "zero")), seed=st.integers(0, 5), data=st.data())
def test_lego_does_not_depend_on_the_order_of_ranks_or_tasks(
    stack: UpdateStack, seed: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, stack.R))
    orders = [data.draw(st.permutations(range(rank))) for rank in stack.ranks]
    tasks = data.draw(st.permutations(range(stack.T)))
    shuffled = permuted(
        UpdateStack(
            stack.names,
            stack.tasks,
            tuple(B[:, :, order] for B, order in zip(stack.B, orders, strict=True)),
            tuple(A[:, order] for A, order in zip(stack.A, orders, strict=True)),
        ),
        tasks,
    )
    one, other = (merged("lora_lego", s, {"k": k}, seed=seed) for s in (stack, shuffled))
    close(one, other, 1e-9, stack.dense())


@quick
@given(stack=stacks(min_tasks=2, kinds=("random",)), data=st.data())
def test_lego_canonical_does_not_depend_on_how_units_are_split(
    stack: UpdateStack, data: st.DataObject
) -> None:
    """Balanced halves and signs: rescaled and flipped units of all but the reference change nothing."""
    k = data.draw(st.integers(1, stack.R))
    norms = stack.dense().flatten(2).norm(dim=-1)
    B, A = list(stack.B), list(stack.A)
    for t in range(stack.T):
        if (norms.argmax(1) == t).any():
            continue
        factor = torch.tensor(
            [data.draw(st.sampled_from([-3.0, -1.0, 0.5, 2.0])) for _ in range(stack.ranks[t])],
            dtype=torch.float64,
        )
        B[t], A[t] = B[t] * factor, A[t] / factor.unsqueeze(-1)
    other = UpdateStack(stack.names, stack.tasks, tuple(B), tuple(A))
    close(merged("lora_lego", stack, {"k": k}), merged("lora_lego", other, {"k": k}), 1e-9, stack.dense())


def test_lego_leaves_out_models_without_weight_and_without_an_update() -> None:
    generator = torch.Generator().manual_seed(3)
    B = [torch.randn(1, 7, 3, generator=generator, dtype=torch.float64) for _ in range(3)]
    A = [torch.randn(1, 3, 6, generator=generator, dtype=torch.float64) for _ in range(3)]
    both = UpdateStack(("m",), (0, 1), tuple(B[:2]), tuple(A[:2]))
    expected = merged("lora_lego", both)
    stack = UpdateStack(("m",), (0, 1, 2), tuple(B), tuple(A))
    assert_close(merged("lora_lego", stack, weights=[1.0, 1.0, 0.0]), expected, 1e-12)
    untrained = UpdateStack(("m",), (0, 1, 2), (*B[:2], torch.zeros_like(B[2])), tuple(A))
    assert_close(merged("lora_lego", untrained), expected, 1e-12)


def test_lego_refuses_more_clusters_than_units_and_no_weight_at_all() -> None:
    stack = UpdateStack(("m",), (0,), (torch.ones(1, 4, 2),), (torch.ones(1, 2, 3),))
    with pytest.raises(InputError) as caught:
        merged("lora_lego", stack, {"k": 3})
    assert caught.value.code == "k_too_large"
    assert caught.value.where == {"module": "m", "field": "parameters.k"}
    with pytest.raises(InputError) as caught:
        merged("lora_lego", stack, weights=[0.0])
    assert caught.value.code == "zero_weight_sum"
