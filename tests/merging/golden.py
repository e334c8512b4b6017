"""Reading the golden reference outputs: adapters as stacks, outputs as dense matrices."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from merging import catalog
from merging.kernels import Context, Kernel
from merging.lowrank import ThinSVD
from merging.recipe import Recipe
from merging.updates import LowRank, UpdateStack


@dataclass
class Golden:
    """One golden file and the adapter sets it holds; ``dtype`` is the one in which inputs are merged."""

    path: Path
    dtype: torch.dtype = torch.float64

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        with safe_open(str(self.path), "pt") as handle:
            return {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118

    def keys(self, start: str) -> list[str]:
        return sorted(key for key in self.tensors if key.startswith(start))

    def stack(self, name: str, layer: str, dtype: torch.dtype | None = None) -> UpdateStack:
        """The adapters of set ``name`` for one layer."""
        dtype = dtype or self.dtype
        tasks = sorted(
            {key.split(".")[2] for key in self.tensors if key.startswith(f"in.{name}.t") and "lora" in key}
        )
        B = tuple(self.tensors[f"in.{name}.{t}.{layer}.lora_B"].to(dtype).unsqueeze(0) for t in tasks)
        A = tuple(self.tensors[f"in.{name}.{t}.{layer}.lora_A"].to(dtype).unsqueeze(0) for t in tasks)
        return UpdateStack((layer,), tuple(range(len(tasks))), B, A)


def dense(update: LowRank | ThinSVD) -> Tensor:
    """``(m, n)`` of a batch of one."""
    if isinstance(update, ThinSVD):
        return (update.U * update.S.to(update.U.dtype).unsqueeze(-2) @ update.Vh)[0]
    return update.dense()[0]


def run(
    method: str,
    stacks: list[UpdateStack],
    parameters: dict[str, Any] | None = None,
    *,
    space: str | None = None,
    weights: list[float] | None = None,
    seed: int = 0,
    budget: int = 1 << 28,
) -> list[Tensor]:
    """Run a method of the catalogue over the modules of a model; dense results, one per stack."""
    count = max(max(stack.tasks) for stack in stacks) + 1
    weights = weights or [1.0] * count
    recipe = Recipe.load(
        {
            "merge_method": method,
            "space": space,
            "models": [{"model": f"t{i}", "parameters": {"weight": w}} for i, w in enumerate(weights)],
            "parameters": parameters or {},
        }
    )
    resolved = catalog.resolve(recipe)
    kernel: Kernel = catalog.load_kernel(resolved.method)
    shared: Any = None
    digests = tuple(f"digest-{i}" for i in range(count))

    def context() -> Context:
        return Context(
            resolved.params,
            resolved.per_model,
            digests,
            space=resolved.space,
            seed=seed,
            budget=budget,
            shared=shared,
        )

    for index in range(kernel.surveys(context())):
        partials = [kernel.survey(index, stack, context()) for stack in stacks]
        shared = kernel.reduce(index, partials, context())
    return [dense(kernel.merge(stack, context()).update) for stack in stacks]


FLOAT32 = 2e-5
"""The stated tolerance of results from float32 inputs."""

DTYPES = {"f64": torch.float64, "f32": torch.float32}


def both(file: str) -> Any:
    """A fixture: the golden file of that name, once for float64 and once for float32 inputs."""

    @pytest.fixture(scope="module", params=DTYPES)
    def golden(golden_dir: Path, request: pytest.FixtureRequest) -> Golden:
        return Golden(golden_dir / f"{file}.safetensors", DTYPES[request.param])

    return golden


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative Frobenius error below ``tolerance``.

    Below 1e-6 that is meant for float64; float32 results are then held to the one stated for them.
    """
    if actual.dtype == torch.float32 and tolerance < 1e-6:
        tolerance = FLOAT32
    error = float((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-300))
    if float(expected.double().norm()) == 0.0:
        error = float(actual.double().norm())
    assert error < tolerance, f"relative error {error:.3e} is not below {tolerance:.0e}"
