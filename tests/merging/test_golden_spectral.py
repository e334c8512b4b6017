"""Spectral methods against the outputs of the reference implementations.

The dense reference state dicts hold tensors of every kind. Ours are the matrices: one-dimensional tensors,
convolutions and `text_projection`, which the references average, never reach a spectral kernel.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden import Golden, assert_close, run
from torch import Tensor

from merging.updates import UpdateStack

LAYERS = ("q", "v")
DTYPES = {"f64": torch.float64, "f32": torch.float32}
TOLERANCE = {"f64": 1e-9, "f32": 2e-5}
MATRICES = (
    "visual.block.attn.weight",
    "visual.block.mlp_fc.weight",
    "visual.block.mlp_proj.weight",
    "visual.positional_embedding",
    "model.token_embedding.weight",
)


@pytest.fixture(scope="module")
def iso_file(golden_dir: Path) -> Golden:
    return Golden(golden_dir / "iso.safetensors")


@pytest.fixture(scope="module")
def tsv_file(golden_dir: Path) -> Golden:
    return Golden(golden_dir / "tsv.safetensors")


@pytest.fixture(scope="module")
def core_file(golden_dir: Path) -> Golden:
    return Golden(golden_dir / "core_space.safetensors")


@pytest.fixture(scope="module")
def knots_file(golden_dir: Path) -> Golden:
    return Golden(golden_dir / "knots.safetensors")


def dense_stack(file: Golden, name: str, key: str, tag: str) -> UpdateStack:
    """The dense task vectors of one matrix as a stack, with identity factors on the smaller side."""
    tasks = sorted({k.split(".")[2] for k in file.tensors if k.startswith(f"in.{name}.t")})
    matrices = [file.tensors[f"in.{name}.{t}.{key}"].to(DTYPES[tag]).unsqueeze(0) for t in tasks]
    m, n = matrices[0].shape[1:]
    eye = torch.eye(min(m, n), dtype=DTYPES[tag]).unsqueeze(0)
    B = tuple(eye if m <= n else x for x in matrices)
    A = tuple(x if m <= n else eye for x in matrices)
    return UpdateStack((key,), tuple(range(len(tasks))), B, A)


def merged(method: str, stack: UpdateStack, parameters: dict[str, object]) -> Tensor:
    [result] = run(method, [stack], parameters)
    return result


@pytest.mark.parametrize("tag", ["f64", "f32"])
@pytest.mark.parametrize("key", MATRICES)
@pytest.mark.parametrize("name", ["dense3", "dense5"])
class TestDenseStateDicts:
    def test_iso_c(self, iso_file: Golden, name: str, key: str, tag: str) -> None:
        result = merged("iso_c", dense_stack(iso_file, name, key, tag), {"iso_denominator": "full"})
        assert_close(result, iso_file.tensors[f"out.{name}.iso_c.{tag}.{key}"], TOLERANCE[tag])

    @pytest.mark.parametrize("fraction", [0.5, 0.8, 1.0])
    def test_iso_cts(self, iso_file: Golden, name: str, key: str, tag: str, fraction: float) -> None:
        stack = dense_stack(iso_file, name, key, tag)
        result = merged("iso_cts", stack, {"compat": "paper", "common_space_fraction": fraction})
        expected = iso_file.tensors[f"out.{name}.iso_cts_f{fraction}.{tag}.{key}"]
        assert_close(result, expected, TOLERANCE[tag])

    @pytest.mark.parametrize("variant", ["tsvm", "tsvm_dict", "tsvm_eigen"])
    def test_tsv(self, tsv_file: Golden, name: str, key: str, tag: str, variant: str) -> None:
        result = merged("tsv", dense_stack(tsv_file, name, key, tag), {"compat": "paper"})
        # Eigenvalues of U^T U in float32 hold half the digits: there only float64 is a reference.
        expected = "f64" if variant == "tsvm_eigen" else tag
        assert_close(result, tsv_file.tensors[f"out.{name}.{variant}.{expected}.{key}"], TOLERANCE[tag])

    def test_tsv_of_all_triplets_is_the_lossless_variant(
        self, tsv_file: Golden, name: str, key: str, tag: str
    ) -> None:
        stack = dense_stack(tsv_file, name, key, tag)
        result = merged("tsv", stack, {"k": min(stack.m, stack.n)})
        assert_close(result, tsv_file.tensors[f"out.{name}.tsvm_lossless.{tag}.{key}"], TOLERANCE[tag])


@pytest.mark.parametrize("tag", DTYPES)
@pytest.mark.parametrize("layer", LAYERS)
class TestFactorsWhoseSumHasFullRank:
    """Rank 12 each in 48x32 and 24x40: nothing is left to chance in the dense references."""

    def test_iso_c(self, iso_file: Golden, layer: str, tag: str) -> None:
        result = merged("iso_c", iso_file.stack("wide12", layer, DTYPES[tag]), {"iso_denominator": "full"})
        assert_close(result, iso_file.tensors[f"out.wide12.iso_c.f64.{layer}"], 1e-9)

    @pytest.mark.parametrize("fraction", [0.5, 0.8])
    def test_iso_cts(self, iso_file: Golden, layer: str, tag: str, fraction: float) -> None:
        stack = iso_file.stack("wide12", layer, DTYPES[tag])
        result = merged("iso_cts", stack, {"compat": "paper", "common_space_fraction": fraction})
        assert_close(result, iso_file.tensors[f"out.wide12.iso_cts_f{fraction}.f64.{layer}"], 1e-9)

    def test_tsv(self, tsv_file: Golden, layer: str, tag: str) -> None:
        result = merged("tsv", tsv_file.stack("wide12", layer, DTYPES[tag]), {})
        assert_close(result, tsv_file.tensors[f"out.wide12.tsvm.f64.{layer}"], 1e-9)


CORE_CASES: dict[str, tuple[str, dict[str, object]]] = {
    "sum": ("linear", {}),
    "mean": ("linear", {"normalize": True}),
    "sum+iso": ("iso_c", {"iso_denominator": "core"}),
    "mean+iso": ("iso_c", {"iso_denominator": "core"}),
    "tsv": ("tsv", {}),
    "tsv+iso": ("tsv", {"isotropize": True}),
    "cart_r0.04": ("cart", {"cart_rank": 0.04, "cart_scale": 0.1}),
    "cart_r0.25_s0.5": ("cart", {"cart_rank": 0.25, "cart_scale": 0.5}),
}


def assert_cases(
    file: Golden, cases: dict[str, tuple[str, dict[str, object]]], name: str, space: str, tag: str
) -> int:
    """Every case that the file holds a reproducible output for; how many there were."""
    checked = 0
    for layer in LAYERS:
        stack = file.stack(name, layer, DTYPES[tag])
        for case, (method, parameters) in cases.items():
            expected = file.tensors.get(f"out.{name}.{space}.{case}.{tag}.{layer}")
            if expected is None:
                continue
            weights = [1.0 / stack.T] * stack.T if case == "mean+iso" else None
            [result] = run(method, [stack], parameters, weights=weights)
            assert_close(result, expected, TOLERANCE[tag])
            checked += 1
    return checked


@pytest.mark.parametrize(
    ("name", "tag", "count"),
    [
        ("hom4", "f64", 16),
        ("hom4", "f32", 8),
        ("het246", "f64", 12),
        ("het246", "f32", 4),
        ("wide12", "f64", 14),
        ("wide12", "f32", 6),
        ("single4", "f64", 16),
        ("single4", "f32", 8),
    ],
)
def test_core_space_reference(core_file: Golden, name: str, tag: str, count: int) -> None:
    assert assert_cases(core_file, CORE_CASES, name, "core", tag) == count


@pytest.mark.parametrize("tag", DTYPES)
@pytest.mark.parametrize(("name", "count"), [("hom4", 4), ("het246", 4), ("wide12", 10), ("single4", 6)])
def test_core_space_reference_on_dense_deltas(core_file: Golden, name: str, count: int, tag: str) -> None:
    """Its `full` space; CART there takes its rank from min(m, n), which is stated as a number here."""
    checked = 0
    for layer in LAYERS:
        stack = core_file.stack(name, layer, DTYPES[tag])
        cart = {"cart_r0.04": (0.04, 0.1), "cart_r0.25_s0.5": (0.25, 0.5)}
        cases: dict[str, tuple[str, dict[str, object]]] = {
            "tsv": ("tsv", {}),
            "sum+iso": ("iso_c", {"iso_denominator": "full"}),
            "mean+iso": ("iso_c", {"iso_denominator": "full"}),
        }
        for case, (share, scale) in cart.items():
            rank = -int(-share * min(stack.m, stack.n) // 1)
            cases[case] = ("cart", {"cart_rank": rank, "cart_scale": scale})
        for case, (method, parameters) in cases.items():
            expected = core_file.tensors.get(f"out.{name}.full.{case}.f64.{layer}")
            if expected is None:
                continue
            weights = [1.0 / stack.T] * stack.T if case == "mean+iso" else None
            [result] = run(method, [stack], parameters, weights=weights)
            assert_close(result, expected, 1e-9)
            checked += 1
    assert checked == count


@pytest.mark.parametrize("tag", ["f64", "f32"])
@pytest.mark.parametrize("name", ["hom4", "het246", "wide12", "single4"])
def test_the_core_space_preset_is_the_reference(core_file: Golden, name: str, tag: str) -> None:
    checked = 0
    for layer in LAYERS:
        for percent in (10, 50, 100):
            key = f"out.{name}.core.ties_K{percent}.{tag}.{layer}"
            if key not in core_file.tensors:
                continue
            stack = core_file.stack(name, layer, DTYPES[tag])
            [result] = run("core_space", [stack], {"compat": "paper", "density": percent / 100})
            assert_close(result, core_file.tensors[key], TOLERANCE[tag])
            checked += 1
    assert checked >= 2


@pytest.mark.parametrize("tag", ["f64", "f32"])
@pytest.mark.parametrize("name", ["hom4", "het246", "wide12"])
def test_the_knots_preset_is_the_reference(knots_file: Golden, name: str, tag: str) -> None:
    stacks = [knots_file.stack(name, layer, DTYPES[tag]) for layer in LAYERS]
    for percent in (20, 50, 100):
        results = run("knots", stacks, {"compat": "paper", "density": percent / 100})
        for layer, result in zip(LAYERS, results, strict=True):
            key = f"out.{name}.ties_K{percent}_mean.scale1.0.{tag}.{layer}"
            assert_close(result, knots_file.tensors[key], 2e-5)


KNOTS_SUMS: dict[str, tuple[str, dict[str, object]]] = {
    "tv_sum": ("linear", {}),
    "tv_mean": ("linear", {"normalize": True}),
    "tv_K30_sum": ("magnitude_prune", {"compat": "paper", "density": 0.3, "trim_scope": "global"}),
}


@pytest.mark.parametrize("tag", ["f64", "f32"])
@pytest.mark.parametrize("case", KNOTS_SUMS)
@pytest.mark.parametrize("name", ["hom4", "het246", "wide12"])
def test_sums_in_knots_coordinates(knots_file: Golden, name: str, case: str, tag: str) -> None:
    method, parameters = KNOTS_SUMS[case]
    stacks = [knots_file.stack(name, layer, DTYPES[tag]) for layer in LAYERS]
    results = run(method, stacks, parameters, space="knots")
    for layer, result in zip(LAYERS, results, strict=True):
        assert_close(result, knots_file.tensors[f"out.{name}.{case}.scale1.0.{tag}.{layer}"], 2e-5)
