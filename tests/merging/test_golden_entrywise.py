"""Entry-wise methods against the outputs of the reference implementations."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from golden import Golden, assert_close, both, dense, run
from torch import Tensor

from merging import spaces, sparsify
from merging.lowrank import core_svd
from merging.updates import UpdateStack

LAYERS = ("q", "v")
SETS = ("hom4", "het246")


def injected(monkeypatch: pytest.MonkeyPatch, masks: dict[str, Tensor]) -> None:
    """Replace the random streams by recorded keep-masks ``(T, rows, cols)`` per module."""

    class Recorded:
        def __init__(self, stack: UpdateStack, ctx: object, widths: object) -> None:
            self.mask = torch.stack([masks[name] for name in stack.names]).bool()
            self.at = 0

        def keep(self, x: Tensor, probability: object) -> Tensor:
            rows = x.shape[-2]
            self.at += rows
            return self.mask[:, :, self.at - rows : self.at].to(x)

    monkeypatch.setattr(sparsify, "MaskStream", Recorded)


def as_stack(name: str, matrices: Tensor) -> UpdateStack:
    """Dense matrices ``(T, m, n)`` as a stack with identity factors."""
    eye = torch.eye(matrices.shape[1], dtype=matrices.dtype)
    count = matrices.shape[0]
    return UpdateStack(
        (name,), tuple(range(count)), (eye.unsqueeze(0),) * count, tuple(m.unsqueeze(0) for m in matrices)
    )


ties_file = both("ties_reference")


@pytest.fixture(scope="module")
def peft_file(golden_dir: Path) -> Golden:
    return Golden(golden_dir / "peft_merge_utils.safetensors")


mergekit_file = both("mergekit")


@pytest.fixture(scope="module")
def knots_file(golden_dir: Path) -> Golden:
    return Golden(golden_dir / "knots.safetensors")


core_file = both("core_space")


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("agg", ["mean", "sum", "max"])
@pytest.mark.parametrize("percent", ["20", "50", "0.3", "none"])
@pytest.mark.parametrize("budget", [1 << 28, 40_000], ids=["one-block", "row-blocks"])
def test_ties_with_global_trimming_is_the_reference(
    ties_file: Golden, name: str, agg: str, percent: str, budget: int
) -> None:
    key = (
        f"out.{name}.topk{percent}_mass_dis-{agg}"
        if percent != "none"
        else f"out.{name}.notrim_mass_dis-mean"
    )
    if percent == "none" and agg != "mean":
        agg = "mean"
    if key not in ties_file.tensors:
        assert name == "het246", key
        return
    density = {"20": 0.2, "50": 0.5, "0.3": 0.3, "none": 1.0}[percent]
    stacks = [ties_file.stack(name, layer) for layer in LAYERS]
    merged = run("ties", stacks, {"compat": "paper", "density": density, "agg": agg}, budget=budget)
    flat = torch.cat([m.flatten() for m in merged])
    assert_close(flat, ties_file.tensors[key], 1e-10)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("votes", ["normfrac", "normmass"])
@pytest.mark.parametrize("percent", ["20", "50", "0.3"])
@pytest.mark.parametrize("budget", [1 << 28, 40_000], ids=["one-block", "row-blocks"])
def test_votes_by_share_of_the_norm_are_the_reference(
    ties_file: Golden, name: str, votes: str, percent: str, budget: int
) -> None:
    density = {"20": 0.2, "50": 0.5, "0.3": 0.3}[percent]
    parameters = {"compat": "paper", "density": density, "majority_sign_method": votes}
    stacks = [ties_file.stack(name, layer) for layer in LAYERS]
    merged = run("ties", stacks, parameters, budget=budget)
    flat = torch.cat([m.flatten() for m in merged])
    assert_close(flat, ties_file.tensors[f"out.{name}.topk{percent}_{votes}_dis-mean"], 1e-10)


@pytest.mark.parametrize("percent", ["50", "25", "none"])
@pytest.mark.parametrize("agg", ["mean", "sum", "max"])
def test_ties_edge_cases_with_equal_magnitudes_and_zero_sums(
    ties_file: Golden, percent: str, agg: str
) -> None:
    if percent == "none" and agg != "mean":
        agg = "mean"
    key = "out.edge.notrim_mass_dis-mean" if percent == "none" else f"out.edge.topk{percent}_mass_dis-{agg}"
    stack = as_stack("edge", ties_file.tensors["in.edge.flat_delta"].to(ties_file.dtype).unsqueeze(1))
    density = {"50": 0.5, "25": 0.25, "none": 1.0}[percent]
    [merged] = run("ties", [stack], {"compat": "paper", "density": density, "agg": agg})
    assert_close(merged.flatten(), ties_file.tensors[key], 1e-12)


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.7, 0.3, -0.2]], ids=["w111", "wmix"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_peft_rules_on_dense_deltas(
    peft_file: Golden, monkeypatch: pytest.MonkeyPatch, weights: list[float], dtype: torch.dtype
) -> None:
    tag = "w111" if weights[0] == 1.0 else "wmix"
    pattern = re.compile(
        rf"out\.(hom4|het246)\.(q|v)\.(magnitude_prune|ties|dare_linear|dare_ties|task_arithmetic)"
        rf"(?:\.d([0-9.]+?))?(?:\.(total|frequency))?\.{tag}(?:\.seed77)?$"
    )
    tolerance = 1e-10 if dtype == torch.float64 else 2e-6
    checked = 0
    for key in peft_file.keys("out."):
        match = pattern.match(key)
        if match is None:
            continue
        name, layer, method, density, votes = match.groups()
        parameters: dict[str, object] = {"compat": "peft"}
        if method == "task_arithmetic":
            method = "linear"
        else:
            parameters["density"] = float(density)
        if votes:
            parameters["majority_sign_method"] = votes
        if method.startswith("dare"):
            mask = peft_file.tensors.get(f"aux.{name}.{layer}.dare_mask.d{density}.seed77")
            if mask is None:
                continue
            injected(monkeypatch, {layer: mask})
        [merged] = run(method, [peft_file.stack(name, layer, dtype)], parameters, weights=weights)
        assert_close(merged, peft_file.tensors[key], tolerance)
        checked += 1
    assert checked >= 60


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.7, 0.3, -0.2]], ids=["w111", "wmix"])
def test_mergekit_rules_on_dense_deltas(
    mergekit_file: Golden, monkeypatch: pytest.MonkeyPatch, weights: list[float]
) -> None:
    tag = "w111" if weights[0] == 1.0 else "wmix"
    cases: dict[str, tuple[str, dict[str, object]]] = {
        "task_arithmetic.d1.0": ("linear", {}),
        "task_arithmetic_normalized": ("linear", {"normalize": True}),
        "ties.d0.2": ("ties", {"density": 0.2}),
        "ties.d0.5": ("ties", {"density": 0.5}),
        "ties.d1.0": ("ties", {"density": 1.0}),
        "ties_rescaleL1.d0.5": ("ties", {"density": 0.5, "rescale": True}),
        "ties_nonorm_lambda0.7.d0.5": ("ties", {"density": 0.5, "normalize": False, "agg": "sum"}),
        "dare_linear.d0.5": ("dare_linear", {"density": 0.5}),
        "dare_ties.d0.5": ("dare_ties", {"density": 0.5}),
    }
    for name in SETS:
        for layer in LAYERS:
            for case, (method, parameters) in cases.items():
                key = f"out.{name}.{layer}.{case}.{tag}"
                if method.startswith("dare"):
                    masks = [mergekit_file.tensors[f"aux{key[3:]}.mask.t{i}"] for i in range(3)]
                    injected(monkeypatch, {layer: torch.stack(masks)})
                stack = mergekit_file.stack(name, layer)
                [merged] = run(method, [stack], {"compat": "mergekit", **parameters}, weights=weights)
                if "lambda0.7" in case:
                    merged = 0.7 * merged
                # The reference masks and rescales in float32 when it drops at random.
                tolerance = 5e-7 if method.startswith("dare") else 1e-9
                assert_close(merged, mergekit_file.tensors[key], tolerance)


KNOTS_CASES = {
    "ties_K20_mean.scale1.0": ({"density": 0.2}, 1.0),
    "ties_K50_mean.scale1.0": ({"density": 0.5}, 1.0),
    "ties_K50_mean.scale0.6": ({"density": 0.5}, 0.6),
    "ties_K100_mean.scale1.0": ({"density": 1.0}, 1.0),
    "ties_K50_sum.scale1.0": ({"density": 0.5, "agg": "sum"}, 1.0),
}


@pytest.mark.parametrize("case", KNOTS_CASES)
@pytest.mark.parametrize("tag", ["f64", "f32"])
def test_knots_ties_is_the_reference(knots_file: Golden, case: str, tag: str) -> None:
    parameters, scale = KNOTS_CASES[case]
    dtype = torch.float64 if tag == "f64" else torch.float32
    checked = 0
    for name in ("hom4", "het246", "wide12"):
        keys = [f"out.{name}.{case}.{tag}.{layer}" for layer in LAYERS]
        if not all(key in knots_file.tensors for key in keys):
            continue
        stacks = [knots_file.stack(name, layer, dtype) for layer in LAYERS]
        merged = run("ties", stacks, {"compat": "paper", **parameters}, space="knots")
        for key, result in zip(keys, merged, strict=True):
            assert_close(scale * result, knots_file.tensors[key], 2e-5)
            checked += 1
    assert checked >= 2


@pytest.mark.parametrize("tag", ["f64", "f32"])
def test_knots_dare_ties_given_its_masks(
    knots_file: Golden, monkeypatch: pytest.MonkeyPatch, tag: str
) -> None:
    case = "dareties_p0.2_K100_mean"
    dtype = torch.float64 if tag == "f64" else torch.float32
    masks = {
        layer: torch.stack(
            [knots_file.tensors[f"aux.hom4.{case}.{tag}.dare_mask.t{i}.{layer}"] for i in range(3)]
        )
        for layer in LAYERS
    }
    injected(monkeypatch, masks)
    stacks = [knots_file.stack("hom4", layer, dtype) for layer in LAYERS]
    merged = run("dare_ties", stacks, {"density": 0.8, "lambda": 1.0}, space="knots")
    for layer, result in zip(LAYERS, merged, strict=True):
        assert_close(result, knots_file.tensors[f"out.hom4.{case}.scale1.0.{tag}.{layer}"], 2e-5)


@pytest.mark.parametrize("space", ["core", "full"])
@pytest.mark.parametrize("name", [*SETS, "wide12", "single4"])
def test_core_space_reference_rules(core_file: Golden, space: str, name: str) -> None:
    cases: dict[str, tuple[str, dict[str, object]]] = {
        "sum": ("linear", {}),
        "mean": ("linear", {"normalize": True}),
        "ties_K10": ("ties", {"density": 0.1}),
        "ties_K50": ("ties", {"density": 0.5}),
        "ties_K100": ("ties", {"density": 1.0}),
        "ties_K50+iso": ("ties", {"density": 0.5, "isotropize": True}),
    }
    checked = 0
    for layer in LAYERS:
        for case, (method, parameters) in cases.items():
            key = f"out.{name}.{space}.{case}.f64.{layer}"
            if key not in core_file.tensors or ("iso" in case and (space == "full" or name == "single4")):
                continue
            if method == "ties":
                parameters = {"compat": "paper", "trim_scope": "tensor", **parameters}
            [merged] = run(method, [core_file.stack(name, layer)], parameters, space=space)
            assert_close(merged, core_file.tensors[key], 1e-9)
            checked += 1
    assert checked >= 6


def test_knots_without_singular_values_is_the_core_space_authors_variant(core_file: Golden) -> None:
    for layer in LAYERS:
        stack = core_file.stack("hom4", layer)
        place = spaces.knots(stack, with_values=False)
        coordinates = place.coordinates.rows(0, place.coordinates.m)
        mean = coordinates.mean(1)
        assert_close(dense(place.lift(mean)), core_file.tensors[f"out.hom4.knots.mean.f64.{layer}"], 1e-5)


def test_core_svd_is_exact_for_small_matrices() -> None:
    matrix = torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    svd = core_svd(matrix)
    assert_close(svd.U * svd.S.unsqueeze(-2) @ svd.Vh, matrix, 1e-14)


@pytest.mark.parametrize("space", ["core", "full"])
@pytest.mark.parametrize("name", [*SETS, "wide12", "single4"])
def test_core_space_dare_given_its_masks(
    core_file: Golden, monkeypatch: pytest.MonkeyPatch, space: str, name: str
) -> None:
    # The reference adds the kept and rescaled entries.
    checked = 0
    for layer in LAYERS:
        key = f"{name}.{space}.dare_p0.3_lmcFalse.f64"
        stack = core_file.stack(name, layer)
        masks = [core_file.tensors.get(f"aux.{key}.mask.{layer}.t{t}") for t in range(stack.T)]
        expected = core_file.tensors.get(f"out.{key}.{layer}")
        if expected is None or any(mask is None for mask in masks):
            continue
        injected(monkeypatch, {layer: torch.stack([mask for mask in masks if mask is not None])})
        [merged] = run("dare_linear", [stack], {"density": 0.7, "core_gauge": "asis"}, space=space)
        assert_close(merged, expected, 1e-9)
        checked += 1
    assert checked == len(LAYERS)
