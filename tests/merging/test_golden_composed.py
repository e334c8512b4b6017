"""Reference outputs of operators that are not offered by name, put together from our parts.

The Core Space authors' KnOTS merges `V_t` without its singular values, and their DARE-TIES trims what it has
dropped from already. PEFT combines the factors one by one. None of them is a method of the catalogue; their
rules are, so that their outputs check the spaces and the rules once more.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import FLOAT32, Golden, assert_close, both, dense, run
from test_golden_entrywise import as_stack
from torch import Tensor

from merging import spaces
from merging.compress import RankRule, compress
from merging.kernels import Merged
from merging.lowrank import ThinSVD
from merging.spectral import isotropize
from merging.updates import LowRank, UpdateStack

LAYERS = ("q", "v")
SETS = ("hom4", "het246", "wide12", "single4")
core_file = both("core_space")
peft_file = both("peft_add_weighted_adapter")
ties_file = both("ties_reference")

Lift = Callable[[Tensor], LowRank | ThinSVD]


def ties(matrices: Tensor, percent: int) -> Tensor:
    """TIES of the reference on matrices ``(T, p, q)``, trimmed per matrix."""
    parameters = {"compat": "paper", "trim_scope": "tensor", "density": percent / 100}
    [merged] = run("ties", [as_stack("layer", matrices)], parameters)
    return merged


def placed(stack: UpdateStack, space: str) -> tuple[Tensor, Lift]:
    """The coordinates ``(T, p, q)`` of the reference in one of its spaces, and the way back."""
    if space == "knots":
        place = spaces.knots(stack, with_values=False)
    else:
        place = spaces.place(stack, space, gauge="asis")
    return place.coordinates.rows(0, place.coordinates.m)[0], place.lift


def lifted(lift: Lift, merged: Tensor) -> Tensor:
    return dense(lift(merged.unsqueeze(0)))


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("space", ["core", "knots", "full"])
def test_dare_before_trimming_in_every_space_of_the_reference(
    core_file: Golden, space: str, name: str
) -> None:
    case = f"{name}.{space}.dare-ties_p0.3_K50.f64"
    for layer in LAYERS:
        x, lift = placed(core_file.stack(name, layer), space)
        masks = [core_file.tensors[f"aux.{case}.mask.{layer}.t{t}"] for t in range(len(x))]
        merged = ties(x * torch.stack(masks).to(x) / 0.7, 50)
        assert_close(lifted(lift, merged), core_file.tensors[f"out.{case}.{layer}"], FLOAT32)


def spectral(method: str, share: float, scale: float) -> Callable[[Tensor], Tensor]:
    """CART or TSV on coordinates; their ranks are shares of the smaller side there."""

    def merge(x: Tensor) -> Tensor:
        size = min(x.shape[-2:])
        parameters: dict[str, Any] = {"k": size // len(x)}
        if method == "cart":
            parameters = {"cart_rank": -int(-share * size // 1), "cart_scale": scale}
        [merged] = run(method, [as_stack("layer", x)], parameters)
        return merged

    return merge


V_ONLY: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.mean(0),
    "sum": lambda x: x.sum(0),
    "ties_K10": lambda x: ties(x, 10),
    "ties_K50": lambda x: ties(x, 50),
    "ties_K100": lambda x: ties(x, 100),
    "tsv": spectral("tsv", 0.0, 0.0),
    "cart_r0.04": spectral("cart", 0.04, 0.1),
    "cart_r0.25_s0.5": spectral("cart", 0.25, 0.5),
}


UNDEFINED = ("wide12", "tsv", "q")
"""Ten of twelve equal singular values are kept there: any ten are as good."""


@pytest.mark.parametrize("name", SETS)
def test_knots_without_singular_values(core_file: Golden, name: str) -> None:
    checked = 0
    for layer in LAYERS:
        x, lift = placed(core_file.stack(name, layer), "knots")
        for case, rule in V_ONLY.items():
            expected = core_file.tensors.get(f"out.{name}.knots.{case}.f64.{layer}")
            if expected is not None and (name, case, layer) != UNDEFINED:
                assert_close(lifted(lift, rule(x)), expected, FLOAT32)
                checked += 1
    assert checked >= 2 * 7


@pytest.mark.parametrize(("space", "count"), [("full", 12), ("knots", 6)])
def test_isotropic_finish_of_dense_results(core_file: Golden, space: str, count: int) -> None:
    checked = 0
    for name in SETS:
        for layer in LAYERS:
            x, lift = placed(core_file.stack(name, layer), space)
            for case in ("mean", "sum", "ties_K50"):
                expected = core_file.tensors.get(f"out.{name}.{space}.{case}+iso.f64.{layer}")
                if expected is not None:
                    U, S, Vh = torch.linalg.svd(lifted(lift, V_ONLY[case](x)).unsqueeze(0))
                    size = min(expected.shape)
                    flat = isotropize(ThinSVD(U[..., :size], S, Vh[:, :size]), size)
                    assert_close(dense(flat), expected, FLOAT32)
                    checked += 1
    assert checked == count


@pytest.mark.parametrize("name", SETS)
def test_knots_without_singular_values_and_dare(core_file: Golden, name: str) -> None:
    case = f"{name}.knots.dare_p0.3_lmcFalse.f64"
    for layer in LAYERS:
        x, lift = placed(core_file.stack(name, layer), "knots")
        masks = [core_file.tensors[f"aux.{case}.mask.{layer}.t{t}"] for t in range(len(x))]
        merged = (x * torch.stack(masks).to(x) / 0.7).sum(0)
        assert_close(lifted(lift, merged), core_file.tensors[f"out.{case}.{layer}"], FLOAT32)


@pytest.mark.parametrize("name", ["hom4", "het246"])
@pytest.mark.parametrize(("case", "density", "agg"), [("K20_mean", 0.2, "mean"), ("K50_sum", 0.5, "sum")])
def test_ties_over_the_whole_model_of_the_core_space_authors(
    core_file: Golden, name: str, case: str, density: float, agg: str
) -> None:
    stacks = [core_file.stack(name, layer) for layer in LAYERS]
    merged = run("ties", stacks, {"compat": "paper", "density": density, "agg": agg})
    for layer, result in zip(LAYERS, merged, strict=True):
        assert_close(result, core_file.tensors[f"out.{name}.vector.ties_{case}.f64.{layer}"], 1e-9)


@pytest.mark.parametrize("name", ["hom4", "het246"])
def test_trimming_without_an_election(ties_file: Golden, name: str) -> None:
    stacks = [ties_file.stack(name, layer) for layer in LAYERS]
    parameters = {"compat": "paper", "density": 0.2, "trim_scope": "global", "agg": "mean"}
    trimmed = [
        run("ties", [UpdateStack(s.names, (0,), s.B[t : t + 1], s.A[t : t + 1]) for s in stacks], parameters)
        for t in range(3)
    ]
    rows = torch.stack([torch.cat([part.flatten() for part in parts]) for parts in trimmed])
    assert torch.equal(rows != 0, ties_file.tensors[f"out.{name}.trim_K20.mask"].bool())
    assert_close(rows.mean(0), ties_file.tensors[f"out.{name}.topk20_none_mean"], 1e-10)


ALPHAS = (8.0, 4.0, 12.0)
WEIGHTS = {"w111": [1.0, 1.0, 1.0], "wmix": [0.7, 0.3, -0.2]}


def scaled(file: Golden, name: str, layer: str) -> UpdateStack:
    """The adapters of a set with ``alpha / r`` in B."""
    stack = file.stack(name, layer)
    scales = [alpha / rank for alpha, rank in zip(ALPHAS, stack.ranks, strict=True)]
    return stack.scaled(torch.tensor(scales, dtype=torch.float64))


@pytest.mark.parametrize("tag", WEIGHTS)
@pytest.mark.parametrize("name", ["hom4", "het246"])
@pytest.mark.parametrize("kind", ["cat", "svd", "ties_svd", "magnitude_prune_svd"])
def test_combinations_of_products_are_those_of_peft(
    peft_file: Golden, kind: str, name: str, tag: str
) -> None:
    method = {"cat": "linear", "svd": "linear"}.get(kind, kind.removesuffix("_svd"))
    parameters: dict[str, Any] = {"compat": "peft", **({} if method == "linear" else {"density": 0.5})}
    for layer in LAYERS:
        stack = scaled(peft_file, name, layer)
        [merged] = run(method, [stack], parameters, weights=WEIGHTS[tag])
        if kind != "cat":
            cut = Merged(LowRank(None, merged.unsqueeze(0)))
            rule = RankRule(rank=max(stack.ranks))
            merged = dense(compress(cut, rule, seed=0, names=(layer,)).update)
        assert_close(merged, peft_file.tensors[f"out.{name}.{kind}.{tag}.{layer}.delta"], FLOAT32)


@pytest.mark.parametrize("tag", WEIGHTS)
@pytest.mark.parametrize("kind", ["linear", "ties", "magnitude_prune"])
def test_combinations_of_factors_are_those_of_peft(peft_file: Golden, kind: str, tag: str) -> None:
    parameters: dict[str, Any] = {"compat": "peft", **({} if kind == "linear" else {"density": 0.5})}
    for layer in LAYERS:
        stack = peft_file.stack("hom4", layer)
        factors = [w * alpha / 4 for w, alpha in zip(WEIGHTS[tag], ALPHAS, strict=True)]
        roots = [abs(factor) ** 0.5 for factor in factors]
        signed = [root if factor >= 0 else -root for root, factor in zip(roots, factors, strict=True)]
        A, B = (torch.cat(side) for side in (stack.A, stack.B))
        [A] = run(kind, [as_stack("A", A)], parameters, weights=signed)
        [B] = run(kind, [as_stack("B", B)], parameters, weights=roots)
        assert_close(B @ A, peft_file.tensors[f"out.hom4.{kind}.{tag}.{layer}.delta"], FLOAT32)


def test_peft_refuses_factors_of_unequal_ranks_and_we_do_not_need_to(golden_dir: Path) -> None:
    file = Golden(golden_dir / "peft_add_weighted_adapter.safetensors")
    assert not [key for key in file.keys("out.het246.") if ".linear." in key or ".ties." in key]
    [merged] = run("ties", [scaled(file, "het246", "q")], {"compat": "peft", "density": 0.5})
    assert bool(torch.isfinite(merged).all())
