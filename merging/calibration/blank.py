"""Adapters that are not trained yet, for methods that choose how training starts. No torch at import."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from merging.calibration.base_files import TRANSPOSED, BaseFiles
from merging.calibration.inputs import Inputs
from merging.catalog.data import OsrmInitParams
from merging.errors import InputError
from merging.formats.adapter import Adapter, Module

if TYPE_CHECKING:
    import torch


Rename = Callable[[BaseFiles, Sequence[str]], Mapping[str, str]]
"""Names of layers in the files of a base model -> their names in memory."""


class BlankAdapter(Adapter):
    """An adapter whose update is zero; ``label`` is the name of its task."""

    def __init__(self, label: str, modules: Mapping[str, Module], base_model: str | None) -> None:
        self.label = label
        self.path = Path(label)
        self.format = "peft"
        self.config = None
        self.base_model = base_model
        self.base_revision = None
        self.warnings = ()
        self.modules = MappingProxyType(dict(sorted(modules.items())))
        self.full_tensors = MappingProxyType({})
        described = [label, *((m.name, m.m, m.n, m.rank) for m in self.modules.values())]
        self.digest = hashlib.sha256(json.dumps(described).encode()).hexdigest()

    @property
    def metadata(self) -> Mapping[str, str]:
        return {}

    def factors(
        self, name: str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        module = self.modules[name]
        dtype = dtype or torch.float32
        return (
            torch.zeros(module.m, module.rank, dtype=dtype, device=device),
            torch.zeros(module.rank, module.n, dtype=dtype, device=device),
        )

    def close(self) -> None:
        pass


def blank_adapters(
    labels: tuple[str, ...],
    params: OsrmInitParams,
    inputs: Inputs,
    base_model: str | None,
    rename: Rename | None = None,
) -> list[Adapter]:
    """One blank adapter per task on the layers that the parameters target.

    The layers come from the statistics or from the base model, whose files may name them otherwise than
    the model that is trained: ``rename`` tells. Raises ``target_modules_missing``,
    ``rank_too_large``.
    """
    shapes = _shapes(inputs)
    wanted = {
        name: shape
        for name, shape in shapes.items()
        if any(name == end or name.endswith(f".{end}") for end in params.target_modules)
    }
    if not wanted:
        raise InputError(
            "target_modules_missing",
            f"no layer ends with any of: {', '.join(params.target_modules[:10])}",
            remedy="Set target_modules to the endings of layer names of the base model.",
            where={"field": "parameters.target_modules"},
        )
    if rename is not None and inputs.base is not None and not any(inputs.statistics):
        names = rename(inputs.base, tuple(wanted))
        wanted = {names[name]: shape for name, shape in wanted.items()}
    for name, (m, n) in wanted.items():
        if params.r > min(m, n):
            raise InputError(
                "rank_too_large",
                f"{name} is {m} x {n}; it cannot have rank {params.r}",
                where={"module": name, "field": "parameters.r"},
            )
    modules = {name: _module(name, m, n, params.r) for name, (m, n) in wanted.items()}
    return [BlankAdapter(label, modules, base_model) for label in labels]


def _shapes(inputs: Inputs) -> dict[str, tuple[int, int]]:
    """``(m, n)`` of the layers that may be targeted."""
    for file in inputs.statistics:
        if file is not None:
            return {name: (module.m, module.n) for name, module in file.info.modules.items()}
    assert inputs.base is not None
    return base_layers(inputs.base)


def base_layers(base: BaseFiles) -> dict[str, tuple[int, int]]:
    """``(m, n)`` of every matrix of a base model by the name of its layer."""
    found = {}
    for key, info in base.tensors.items():
        if key.endswith(".weight") and len(info.shape) == 2 and "embed" not in key:
            m, n = info.shape[::-1] if base.model_type in TRANSPOSED else info.shape
            found[key.removesuffix(".weight")] = (m, n)
    return found


def _module(name: str, m: int, n: int, rank: int) -> Module:
    prefix = f"base_model.model.{name}"
    return Module(
        name,
        "linear",
        m,
        n,
        rank,
        1.0,
        "F32",
        (m, n),
        False,
        f"{prefix}.lora_A.weight",
        f"{prefix}.lora_B.weight",
    )
