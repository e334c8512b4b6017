"""Write merged adapters in PEFT's format: key names, tensor shapes and a fresh configuration.

The configuration is written field by field, never copied from an input. Every scale is 1: alpha equals
the rank everywhere, and ``rank_pattern`` and ``alpha_pattern`` are the same table.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merging.errors import InputError
from merging.formats.experts import Expert, parameters_of
from merging.formats.peft_in import HEADS
from merging.formats.peft_keys import PREFIX, Kind, config_path, factor_keys
from merging.formats.source import CONFIG_NAME, WEIGHTS_NAME
from merging.formats.writer import TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = [
    "CONFIG_NAME",
    "WEIGHTS_NAME",
    "ResultModule",
    "adapter_config",
    "factor_specs",
    "factor_tensors",
    "full_key",
    "result_ranks",
    "write_adapter_config",
]


TASK_TYPES = (
    "CAUSAL_LM",
    "FEATURE_EXTRACTION",
    "QUESTION_ANS",
    "SEQ_2_SEQ_LM",
    "SEQ_CLS",
    "TOKEN_CLS",
)
"""The task types that PEFT knows; it refuses a configuration with any other."""


@dataclass(frozen=True, slots=True)
class ResultModule:
    """One module of a result: ``delta = B @ A`` with B (m, rank) and A (rank, n)."""

    name: str
    kind: Kind
    m: int
    n: int
    rank: int
    weight_shape: tuple[int, ...]
    expert: Expert | None = None


def result_ranks(ranks: Mapping[str, int], layers: Mapping[str, str] | None = None) -> dict[str, int]:
    """The ranks to write, given those that the merge needs: at least 1, and what PEFT can express.

    PEFT gives both projections of a ``nn.MultiheadAttention`` one rank; the lower one is raised and its
    factors are padded with zeros. So are those of the experts of a layer; ``layers`` names the layer of
    each module that is an expert.
    """
    paths: dict[str, int] = {}
    layers = layers or {}
    for name, rank in ranks.items():
        path = layers.get(name) or config_path(name)
        paths[path] = max(rank, paths.get(path, 1))
    return {name: paths[layers.get(name) or config_path(name)] for name in ranks}


def factor_specs(module: ResultModule, dtype: str) -> tuple[TensorSpec, TensorSpec]:
    """The specs of A and B as PEFT stores them (in this order, which is that of the names)."""
    key_A, key_B = factor_keys(module.name, module.kind)
    shape_A, shape_B = _stored_shapes(module)
    return TensorSpec(key_A, dtype, shape_A), TensorSpec(key_B, dtype, shape_B)


def factor_tensors(
    module: ResultModule, B: torch.Tensor, A: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B in the stored shapes of :func:`factor_specs`, padded with zeros up to ``module.rank``.

    ``B`` is (m, k) and ``A`` (k, n) with k at most the rank of the module.
    """
    shape_A, shape_B = _stored_shapes(module)
    missing = module.rank - B.shape[1]
    if missing > 0:
        B = _padded(B, (module.m, module.rank))
        A = _padded(A, (module.rank, module.n))
    return A.reshape(shape_A), B.reshape(shape_B)


def full_key(name: str) -> str:
    """The key of a fully trained tensor (``modules_to_save``)."""
    return PREFIX + name


def adapter_config(
    modules: Iterable[ResultModule],
    *,
    base_model: str | None = None,
    revision: str | None = None,
    task_type: str | None = None,
    fan_in_fan_out: bool = False,
    modules_to_save: Sequence[str] = (),
    anchored_targets: bool = False,
    target_parameters: Sequence[str] = (),
) -> dict[str, Any]:
    """The fields of ``adapter_config.json`` for a result with these modules.

    A task type whose head PEFT would look for is only written when ``modules_to_save`` holds the head.
    ``anchored_targets`` (of :class:`~merging.formats.compatible.Compatibility`) says that the base may
    have layers that are not adapted though their names end like those of the result.
    Raises :class:`InputError` ``empty_result`` when there are no modules and :class:`ValueError` for
    ranks that :func:`result_ranks` would not give.
    """
    modules = sorted(modules, key=lambda module: module.name)
    if not modules:
        raise InputError("empty_result", "the result has no modules")
    ranks: dict[str, int] = {}
    names: list[str] = []
    for module in modules:
        paths = [config_path(module.name)]
        if module.expert is not None:
            paths = parameters_of(module.expert.layer, target_parameters)
        elif paths[0] not in ranks:
            names += paths
        for path in paths:
            if module.rank < 1 or ranks.setdefault(path, module.rank) != module.rank:
                raise ValueError(f"module {module.name} cannot have rank {module.rank}")
    counts = Counter(ranks.values())
    rank = max(counts, key=lambda value: (counts[value], value))
    pattern = {f"^{re.escape(path)}": value for path, value in ranks.items() if value != rank}
    head = HEADS.get(task_type or "", ())
    if task_type not in TASK_TYPES or (head and not any(name in modules_to_save for name in head)):
        task_type = None
    return {
        "alpha_pattern": pattern,
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": rank,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "modules_to_save": sorted(set(modules_to_save)) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": dict(pattern),
        "revision": revision,
        "target_modules": _targets(sorted(names), anchored_targets) if names else [],
        "target_parameters": sorted(target_parameters) or None,
        "task_type": task_type,
        "use_dora": False,
        "use_rslora": False,
    }


def write_adapter_config(folder: Path, config: Mapping[str, Any]) -> str:
    """Write the configuration of a result and return its sha256 (hex)."""
    data = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    with (folder / CONFIG_NAME).open("xb") as file:
        file.write(data)
    return hashlib.sha256(data).hexdigest()


def _targets(names: Sequence[str], anchored: bool) -> list[str] | str:
    """The full names, or one regular expression that matches exactly these where a list would not.

    PEFT also finds a listed name at the end of longer paths; only names of one segment are at risk.
    """
    if anchored and any("." not in name for name in names):
        return "|".join(re.escape(name) for name in names)
    return list(names)


def _stored_shapes(module: ResultModule) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if module.kind == "conv2d":
        _, inputs, height, width = module.weight_shape
        return (module.rank, inputs, height, width), (module.m, module.rank, 1, 1)
    return (module.rank, module.n), (module.m, module.rank)


def _padded(tensor: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    result = tensor.new_zeros(shape)
    result[: tensor.shape[0], : tensor.shape[1]] = tensor
    return result
