"""Methods that look at data against reference outputs: RegMean, MaTS, OSRM, AdaRank."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import Golden, assert_close
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from merging.calibration.adapting import Adaptation
from merging.catalog.data import AdarankParams
from merging.methods import osrm_init, osrm_project, regmean
from merging.methods.adarank import Components, decompose
from merging.rules import task_generator
from merging.updates import UpdateStack

TASKS = range(4)


def sidecar(file: Golden) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.path.with_suffix(".json").read_text())
    return found


# RegMean and MaTS


@dataclass
class Grams:
    B: list[Tensor]
    A: list[Tensor]
    C: list[Tensor]
    G: list[Tensor]
    file: Golden

    @property
    def deltas(self) -> list[Tensor]:
        return [B @ A for B, A in zip(self.B, self.A, strict=True)]


@pytest.fixture
def grams(golden_dir: Path) -> Grams:
    file = Golden(golden_dir / "mats_regmean.safetensors")
    t = file.tensors
    return Grams(
        [t["in.scales"][i] * t[f"in.{i}.lora_B"] for i in range(3)],
        [t[f"in.{i}.lora_A"] for i in range(3)],
        [t[f"in.C{i}"] for i in range(3)],
        [t[f"in.G{i}"] for i in range(3)],
        file,
    )


def test_regmean_in_rank_space_is_the_formula_on_full_weights(grams: Grams) -> None:
    C = [regmean.conditioned(gram, 0.9, 0.0) for gram in grams.C]
    B, A = regmean.regmean_factors(grams.B, grams.A, C, "layer")
    assert B.shape[1] == A.shape[0] == 12
    assert_close(B @ A, grams.file.tensors["out.regmean.delta"], 1e-12)
    base = torch.randn(24, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = [base + delta for delta in grams.deltas]
    right = sum((w @ c for w, c in zip(weights, C, strict=True)), torch.zeros_like(base))
    full = right @ torch.linalg.inv(sum(C[1:], C[0]))
    assert_close(base + B @ A, full, 1e-12)


def test_mats_takes_the_steps_of_the_reference(grams: Grams) -> None:
    X, residuals = regmean.conjugate_gradient(grams.deltas, grams.C, grams.G, iterations=20, tolerance=0.0)
    assert_close(X, grams.file.tensors["out.mats.delta_20iters"], 1e-10)
    expected = grams.file.tensors["out.mats.residuals_20iters"]
    assert_close(torch.tensor(residuals, dtype=torch.float64), expected, 1e-8)


def test_mats_converges_to_the_solution(grams: Grams) -> None:
    X, residuals = regmean.conjugate_gradient(
        grams.deltas, grams.C, grams.G, iterations=2000, tolerance=1e-12
    )
    assert residuals[-1] <= 1e-12
    assert_close(X, grams.file.tensors["out.mats.delta_exact"], 1e-8)


# OSRM


@pytest.fixture
def osrm(golden_dir: Path) -> Golden:
    return Golden(golden_dir / "osrm.safetensors")


def features(osrm: Golden, task: int) -> tuple[Tensor, Tensor]:
    """The features of a task and of the others, in float64."""
    own = osrm.tensors[f"in.task{task}.H"].double()
    return own, torch.cat([osrm.tensors[f"in.task{t}.H"].double() for t in TASKS if t != task])


@pytest.mark.parametrize("task", TASKS)
def test_osrm_starts_in_the_directions_of_least_energy(osrm: Golden, task: int) -> None:
    own, others = features(osrm, task)
    A = osrm_init.from_grams(others.T @ others, own.T @ own, 4)
    assert_close(A @ A.T, torch.eye(4, dtype=torch.float64), 1e-12)
    assert_close(A.T @ A, osrm.tensors[f"out.task{task}.projector"], 1e-9)
    smallest = osrm.tensors[f"out.task{task}.eigvals"].sort().values[:4].sum()
    assert float((A @ others.T).square().sum()) == pytest.approx(
        float((len(others) - 1) * smallest), rel=1e-9
    )
    expected = sidecar(osrm)["check"][f"task{task}"]["interference_min"]
    assert float((A @ others.T).square().sum()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_the_mean_version_is_blind_to_the_means_and_keeps_the_own_energy(osrm: Golden, task: int) -> None:
    own, others = features(osrm, task)
    means = torch.stack([osrm.tensors[f"ref.task{t}.mean_H"].double() for t in TASKS if t != task])
    A = osrm_init.from_rows(means, own, 4, task_generator(0, "digest", "layer"))
    assert float((A @ means.T).norm()) < 1e-12 * float(means.norm())
    reference = osrm.tensors[f"ref.task{task}.lora_A"].double()
    assert float((reference @ means.T).norm()) < 1e-5 * float(means.norm())
    check = sidecar(osrm)["check"][f"task{task}"]
    share = float((A @ own.T).square().sum() / own.square().sum())
    assert share == pytest.approx(check["own_energy_tiebreak"], rel=1e-6)
    assert share > check["own_energy_ref"]
    assert float((A @ others.T).square().sum()) == pytest.approx(check["others_energy_tiebreak"], rel=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_rows_and_grams_give_one_answer(osrm: Golden, task: int) -> None:
    own, _ = features(osrm, task)
    rows = torch.cat([osrm.tensors[f"in.task{t}.H"][:4].double() for t in TASKS if t != task])
    generator = task_generator(0, "digest", "layer")
    from_rows = osrm_init.from_rows(rows, own, 4, generator)
    from_grams = osrm_init.from_grams(rows.T @ rows, own.T @ own, 4)
    assert_close(from_rows.T @ from_rows, from_grams.T @ from_grams, 1e-8)


@pytest.mark.parametrize("task", TASKS)
def test_the_projections_are_those_of_the_reference(osrm: Golden, task: int) -> None:
    own, others = features(osrm, task)
    A = osrm.tensors[f"post.task{task}.lora_A_in"].double()
    hyper = sidecar(osrm)["hyper"]
    own_gram, other_gram = own.T @ own, others.T @ others
    beta, ridge = hyper["post_beta"], hyper["post_ridge"]
    expected = osrm.tensors[f"post.task{task}.soft_beta0.3_A"]
    ours = osrm_project.soft(A, own_gram, other_gram, beta, ridge)
    # ours pulls towards A and the reference towards 0: they differ by ridge * A (...)^-1
    metric = own_gram + beta * other_gram + ridge * torch.eye(20, dtype=torch.float64)
    assert_close(ours - ridge * A @ torch.linalg.inv(metric), expected, 1e-9)
    removed = osrm_project.complement(A, other_gram, hyper["post_q"])
    assert_close(removed, osrm.tensors[f"post.task{task}.proj_q6_A"], 1e-9)


@pytest.mark.parametrize("task", TASKS)
def test_the_soft_projection_needs_no_gram_matrix(osrm: Golden, task: int) -> None:
    own, others = features(osrm, task)
    A = osrm.tensors[f"post.task{task}.lora_A_in"].double()
    from_grams = osrm_project.soft(A, own[:6].T @ own[:6], others[:6].T @ others[:6], 0.3, 1e-3)
    assert_close(osrm_project.soft_from_rows(A, own[:6], others[:6], 0.3, 1e-3), from_grams, 1e-9)


# AdaRank

LAYERS = ("attn.weight", "mlp_up.weight", "mlp_down.weight")


class ToyEncoder:
    """The encoder of the reference run, with the updates in factored form."""

    def __init__(self, file: Golden, components: list[Components]) -> None:
        self.t = {key: value.double() for key, value in file.tensors.items() if key.startswith("in.")}
        self.parts = {part.name: part for part in components}

    def _layer(self, x: Tensor, name: str, cores: dict[str, Tensor]) -> Tensor:
        part = self.parts[f"{name}.weight"]
        plain = linear(x, self.t[f"in.base.{name}.weight"], self.t[f"in.base.{name}.bias"])
        return plain + x @ part.V.T @ cores[part.name].T @ part.U.T

    def logits(self, task: int, step: int, cores: dict[str, Tensor]) -> Tensor:
        batches = self.t[f"in.data.task{task}"]
        x = batches[step % len(batches)]
        x = x + self._layer(x, "attn", cores)
        x = layer_norm(x, (12,), self.t["in.base.ln.weight"], self.t["in.base.ln.bias"], 1e-5)
        x = self._layer(gelu(self._layer(x, "mlp_up", cores)), "mlp_down", cores)
        return linear(x, self.t[f"in.head.t{task}.weight"], self.t[f"in.head.t{task}.bias"])


def toy_run(file: Golden, origin: str) -> Adaptation:
    hyper = sidecar(file)["hyper"]
    tag = "TA" if origin == "task_arithmetic" else "CART"
    params = AdarankParams(
        origin=origin,
        prior=hyper[tag]["prior"],
        init_rank=3 if origin == "cart" else None,  # int(0.3 * min(m, n)) of every layer
        lr=hyper["lr"],
    )
    parts: list[Components] = []
    for name in LAYERS:
        B = tuple(
            hyper["alpha/r"] * file.tensors[f"in.task{t}.{name}.lora_B"].double()[None] for t in range(3)
        )
        A = tuple(file.tensors[f"in.task{t}.{name}.lora_A"].double()[None] for t in range(3))
        parts += decompose(UpdateStack((name,), (0, 1, 2), B, A), params, [1.0] * 3)
    return Adaptation(parts, params, ToyEncoder(file, parts))


@pytest.mark.parametrize("origin", ["task_arithmetic", "cart"])
def test_adarank_follows_the_trajectory_of_the_reference(golden_dir: Path, origin: str) -> None:
    file = Golden(golden_dir / "adarank.safetensors")
    tag = "TA" if origin == "task_arithmetic" else "CART"
    run = toy_run(file, origin)
    check_state(file, run, f"out.{tag}.steps0")
    for _ in range(60):
        run.advance()
    losses = torch.tensor(run.state.losses, dtype=torch.float64)
    assert float((losses - file.tensors[f"out.{tag}.steps60.losses"]).abs().max()) < 1e-6
    check_state(file, run, f"out.{tag}.steps60")


def check_state(file: Golden, run: Adaptation, key: str) -> None:
    """Masks, coefficients and merged updates of every layer."""
    start = 0
    for index, part in enumerate(run.components):
        logits = run.state.z[start : start + len(part.S)]
        start += len(part.S)
        expected = file.tensors[f"{key}.{part.name}.mask_logits"]
        for task in range(3):
            own = logits[part.task == task]
            assert float((own - expected[task, : len(own)]).abs().max()) < 1e-6
        lam = file.tensors[f"{key}.{part.name}.lambda"]
        assert float((run.state.lam[index] - lam).abs().max()) < 1e-6
        delta = part.U @ run.cores()[part.name] @ part.V
        assert_close(delta, file.tensors[f"{key}.{part.name}.merged_delta"], 1e-6)
