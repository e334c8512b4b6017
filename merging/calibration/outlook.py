"""What looking at data will cost: bytes, memory, time. Estimates from headers and text; no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from merging.calibration.base_files import BaseFiles
from merging.calibration.dataset import Dataset
from merging.calibration.inputs import Inputs
from merging.catalog.data import AdarankParams
from merging.catalog.spec import MethodParams
from merging.errors import InputError
from merging.formats.adapter import Module

MAX_STATISTICS_BYTES = 32 << 30
"""Statistics of one task that are larger than this are refused; a sketch is smaller."""

_RATE = 2.5e10
"""Operations per second of one core of a current server."""

_IMAGE_TOKENS = 197
_SOLVE = 4.0
"""Times ``n^3``: a factorisation or an eigenvalue problem per module and task."""


def outlook(inputs: Inputs, modules: Mapping[str, Module], params: MethodParams) -> dict[str, Any]:
    """Samples, tokens, ``seconds`` and ``memory_bytes`` beyond those of the merge itself.

    Raises ``statistics_too_large``.
    """
    measured = [task for task, file in enumerate(inputs.statistics) if file is None]
    tokens = {task: _tokens(inputs, task) for task in measured}
    size = statistics_bytes(inputs, modules)
    if not inputs.entropy and measured and size > MAX_STATISTICS_BYTES:
        raise InputError(
            "statistics_too_large",
            f"the statistics of one task would take {size >> 20} MiB, the limit is "
            f"{MAX_STATISTICS_BYTES >> 20} MiB",
            remedy="Set calibration.statistic: sketch.",
            where={"field": "calibration.statistic"},
        )
    found: dict[str, Any] = {
        "samples": {str(task): inputs.samples(task) for task in measured},
        "tokens": sum(tokens.values()),
    }
    weights = 0 if inputs.base is None or not measured else _weights(inputs.base)
    loaded = 0 if inputs.base is None or not measured else 4 * _numbers(inputs.base)
    if isinstance(params, AdarankParams):
        per_sample = sum(tokens[task] / inputs.samples(task) for task in measured)
        step_tokens = params.batch_size * per_sample
        # forward once, backward about twice; the components cost about as much as the layers they stand in
        work = params.steps * step_tokens * 2 * weights * 3 * 1.5
        layers = len(modules)
        activations = step_tokens / max(1, len(measured)) * _width(modules) * layers * 4 * 4
        found["seconds"] = round(work / _RATE, 1)
        found["memory_bytes"] = int(loaded + activations)
        return found
    work = sum(tokens.values()) * 2.0 * weights
    if inputs.settings.rows == "tokens":
        work += sum(tokens.values()) * sum(2.0 * n * n for n in _inputs_of(modules).values())
    work += len(inputs.statistics) * sum(_SOLVE * module.n**3 for module in modules.values())
    found["statistics_bytes"] = size
    found["seconds"] = round(work / _RATE, 1)
    # the base model is gone when the layers are solved
    found["memory_bytes"] = int(max(loaded + (2 * size if measured else 0), _solving(inputs, modules)))
    return found


def _solving(inputs: Inputs, modules: Mapping[str, Module]) -> int:
    """Bytes of the float64 matrices of the largest layer while it is solved."""
    tasks = len(inputs.statistics)

    def layer(m: int, n: int) -> int:
        if inputs.method == "regmean":
            return 8 * 6 * n * n
        if inputs.method == "mats":
            return 8 * (tasks * (n * n + m * m + m * n) + 2 * n * n + 6 * m * n)
        return 8 * (tasks + 5) * n * n

    return max(layer(module.m, module.n) for module in modules.values())


def statistics_bytes(inputs: Inputs, modules: Mapping[str, Module]) -> int:
    """An upper bound of the statistics of one task, in bytes."""
    total = 0
    for n in _inputs_of(modules).values():
        rows = n if inputs.settings.statistic == "gram" else inputs.settings.sketch_rows
        total += 4 * n * (rows + 1)
    return total


def _inputs_of(modules: Mapping[str, Module]) -> dict[str, int]:
    """Input size per layer that reads one of its own: q, k and v share theirs."""
    found: dict[str, int] = {}
    for name, module in modules.items():
        parent, _, own = name.rpartition(".")
        shared = own in ("query", "key", "value", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
        found[f"{parent}.{module.n}" if shared else name] = module.n
    return found


def _tokens(inputs: Inputs, task: int) -> float:
    """Tokens of the samples of a task, roughly."""
    dataset = inputs.datasets[task]
    assert dataset is not None
    return inputs.samples(task) * _mean_tokens(dataset, inputs.settings.max_length)


def _mean_tokens(dataset: Dataset, most: int) -> float:
    if dataset.is_images:
        return _IMAGE_TOKENS
    width = dataset.width()
    if width is not None:
        return width
    lengths = [(len(text) + len(pair or "")) / 4 + 3 for text, pair in dataset.texts]
    return sum(min(length, most) for length in lengths) / len(lengths)


def _weights(base: BaseFiles) -> int:
    """Numbers that take part in a product with every token."""
    tensors = base.tensors.items()
    return sum(
        info.shape[0] * info.shape[1] for key, info in tensors if len(info.shape) == 2 and "embed" not in key
    )


def _numbers(base: BaseFiles) -> int:
    """All numbers of the base model; it is loaded in float32."""
    return sum(math.prod(info.shape) for info in base.tensors.values())


def _width(modules: Mapping[str, Module]) -> int:
    return max(module.m + module.n for module in modules.values())
