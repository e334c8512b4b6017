"""DRM, LoRA-LEGO, LoRE and RMM against reference outputs, for float32 and float64 inputs."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import Golden, assert_close, dense, run

from merging import spaces
from merging.catalog.named import LegoParams, RmmParams
from merging.kmeans import kmeans
from merging.methods import lego, lore, rmm
from merging.updates import UpdateStack

MODULES = ("layers.0.attn.q_proj", "layers.0.mlp.up_proj")
DTYPES = {"f64": torch.float64, "f32": torch.float32}


class Named(Golden):
    """A golden file of the named methods: tasks are numbered, alphas stand in the sidecar."""

    @cached_property
    def sidecar(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.path.with_suffix(".json").read_text())
        return found

    @property
    def hyper(self) -> dict[str, Any]:
        found: dict[str, Any] = self.sidecar["hyper"]
        return found

    def adapters(self, module: str, dtype: torch.dtype, *, scaled: bool = True) -> UpdateStack:
        """The inputs of a module, with ``sqrt(alpha / r)`` in both factors unless ``scaled`` is off."""
        B, A = [], []
        for task, alpha in enumerate(self.hyper["alpha"]):
            lora_B = self.tensors[f"in.task{task}.{module}.lora_B"].to(dtype)
            lora_A = self.tensors[f"in.task{task}.{module}.lora_A"].to(dtype)
            root = (alpha / lora_A.shape[0]) ** 0.5 if scaled else 1.0
            B.append((lora_B * root).unsqueeze(0))
            A.append((lora_A * root).unsqueeze(0))
        return UpdateStack((module,), tuple(range(len(B))), tuple(B), tuple(A))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(("method", "direction"), [("drm_h", "horizontal"), ("drm_v", "vertical")])
def test_drm_is_the_reference(golden_dir: Path, method: str, direction: str, module: str, dtype: str) -> None:
    file = Named(golden_dir / "drm.safetensors")
    stack = file.adapters(module, DTYPES[dtype])
    tolerance = 1e-9 if dtype == "f64" else 1e-3  # a tie at the threshold may fall differently
    for drop in file.hyper["drop"]:
        for tag, weights in file.hyper["coeffs"].items():
            for mean in ("disjoint", "mean"):
                parameters = {"density": 1.0 - drop, "disjoint_mean": mean == "disjoint", "lambda": 1.0}
                [merged] = run(method, [stack], parameters, weights=[float(w) for w in weights])
                key = f"out.{direction}.drop{drop}.{tag}.{mean}.{module}.merged_delta"
                assert_close(merged, file.tensors[key], tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("module", MODULES)
def test_lego_given_the_labels(golden_dir: Path, module: str, dtype: str) -> None:
    file = Named(golden_dir / "lego.safetensors")
    stack = file.adapters(module, DTYPES[dtype])
    tolerance = 1e-12 if dtype == "f64" else 1e-6
    units = lego.pool(stack, torch.ones(stack.T, dtype=torch.float64))
    assert_close(torch.cat([units.A, units.B.mT], dim=2)[0], file.tensors[f"out.pool.{module}"], tolerance)
    variants = {
        "inf.p0o0": {"param_reweight": False, "output_reweight": False},
        "inf.p1o0": {"output_reweight": False},
        "inf.p1o1": {},
        "l2.p1o0": {"norm": "l2", "output_reweight": False},
        "l2.p1o1": {"norm": "l2"},
    }
    for k in file.hyper["k"]:
        labels = file.tensors[f"out.k{k}.{module}.labels"].unsqueeze(0)
        for tag, options in variants.items():
            params = LegoParams.model_validate({**options, "canonicalize": False})
            B, A = lego.rebuild(units, labels, k, params, file.hyper["r"]).factors()
            assert_close(A[0], file.tensors[f"out.k{k}.{tag}.{module}.lora_A"], tolerance)
            assert_close(B[0], file.tensors[f"out.k{k}.{tag}.{module}.lora_B"], tolerance)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_lego_finds_the_partition_that_every_seed_finds(
    golden_dir: Path, module: str, k: int, seed: int
) -> None:
    file = Named(golden_dir / "lego.safetensors")
    stack = file.adapters(module, torch.float64)
    units = lego.pool(stack, torch.ones(stack.T, dtype=torch.float64))
    generator = torch.Generator().manual_seed(seed)
    labels = kmeans(units.gram(), units.weights, k, [generator])
    assert labels[0].tolist() == file.tensors[f"out.k{k}.{module}.labels"].tolist()
    [merged] = run("lora_lego", [stack], {"k": k, "canonicalize": False}, seed=seed)
    lora_A = file.tensors[f"out.k{k}.inf.p1o1.{module}.lora_A"]
    lora_B = file.tensors[f"out.k{k}.inf.p1o1.{module}.lora_B"]
    assert_close(merged, lora_B @ lora_A, 1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("mu", [0.05, 0.3])
def test_lore_is_the_prototype(golden_dir: Path, mu: float, module: str, dtype: str) -> None:
    file = Named(golden_dir / "lore.safetensors")
    stack = file.adapters(module, DTYPES[dtype])
    tolerance = 1e-11 if dtype == "f64" else 2e-6
    for scale in file.hyper["lam"]:
        parameters = {"mu": mu, "mu_mode": "absolute", "iters": file.hyper["T"], "delta_scale": scale}
        [merged] = run("lore", [stack], {**parameters, "tol": 0.0, "final": "average"})
        assert_close(merged, file.tensors[f"out.mu{mu}.lam{scale}.{module}.merged_delta"], tolerance)
    place = spaces.core(stack)
    thetas = place.coordinates.rows(0, place.coordinates.m)
    base, deltas = lore.sweeps(thetas, torch.tensor(mu, dtype=torch.float64), file.hyper["T"])

    def lifted(core: torch.Tensor) -> torch.Tensor:
        return dense(place.lift(core))

    assert_close(lifted(base), file.tensors[f"out.mu{mu}.{module}.theta0_shift"], tolerance)
    for task in range(stack.T):
        expected = file.tensors[f"out.mu{mu}.{module}.task{task}.delta_lowrank"]
        assert_close(lifted(deltas[:, task]), expected, tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("p", [1, 2, 4])
def test_rmm_is_the_prototype(golden_dir: Path, p: int, module: str, dtype: str) -> None:
    file = Named(golden_dir / "rmm.safetensors")
    stack = file.adapters(module, DTYPES[dtype], scaled=False)
    tolerance = 1e-12 if dtype == "f64" else 1e-6
    basis = rmm.fit(stack, RmmParams(basis_size=p, align="none"))
    assert_close(basis.mean_A[0], file.tensors[f"out.p{p}.{module}.mean_A"], tolerance)
    assert_close(basis.mean_B[0], file.tensors[f"out.p{p}.{module}.mean_B"], tolerance)
    error = rmm.recon_error(basis, stack)[0]
    stored = file.sidecar["check"][f"{module}|p={p}"]
    assert rmm.storage_ratio(basis, stack.ranks) == pytest.approx(stored["storage_ratio"], rel=1e-12)
    assert error.tolist() == pytest.approx(stored["delta_rel_err"], rel=1e-5, abs=1e-6)
    for side, factors in (("A", [A.mT for A in stack.A]), ("B", list(stack.B))):
        left = sum(
            (factor - (recovered.mT if side == "A" else recovered)).double().square().sum(-1)
            for factor, recovered in zip(
                factors, [rmm.recover(basis, t)[0 if side == "B" else 1] for t in range(stack.T)], strict=True
            )
        )
        values = file.tensors[f"out.{module}.sv_{side}"]
        assert (left[0] - values[:, p:].square().sum(-1)).abs().max() < tolerance * values.square().max()
    for task in range(stack.T):
        B, A = rmm.recover(basis, task)
        assert_close(B[0], file.tensors[f"out.p{p}.task{task}.{module}.lora_B"], tolerance)
        assert_close(A[0], file.tensors[f"out.p{p}.task{task}.{module}.lora_A"], tolerance)
