"""The merge step of the Core Space authors' code, run from the reader's own checkout of it.

Their repository is neither a dependency nor part of this one; ``--core-space-reference FOLDER`` names a
checkout (with ``einops`` and ``tqdm`` installed). The base model is a stand-in of zeros in float32, as
their merger adds to one and copies it twice. ``rank_print: false`` replaces the dense ``matrix_rank``,
which it computes for every module only to print an average, by a constant.
"""

from __future__ import annotations

import importlib
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.inputs import ALPHA, RANK

Step = Callable[[], None]
SCALE = math.sqrt(ALPHA / RANK)
"""Their code ignores the scale of an adapter, so it is folded into the factors."""


def step(checkout: Path, paths: list[Path], out: Path, *, rank_print: bool, **config: Any) -> Step:
    """Everything from reading the adapters to writing the merged update's model, as a function."""
    sys.path.insert(0, str(checkout))
    sys.modules.setdefault("utils", _utils())
    merger = importlib.import_module("task_merger").MatrixPerLayerMerger
    handler = importlib.import_module("ft_handlers").LoRAHandler
    if not rank_print:
        torch.linalg.matrix_rank = lambda *_: torch.tensor(0)

    def run() -> None:
        adapters = [
            {key: value * SCALE for key, value in load_file(path / "adapter_model.safetensors").items()}
            for path in paths
        ]
        subject = merger(adapters, _base(adapters[0]), handler)
        subject.set_scaling_coeffs(1.0)
        merged = subject.merge({"merge_space": "core", **config})
        save_file({"last": next(reversed(merged.state_dict().values()))}, out)

    return run


def _utils() -> types.ModuleType:
    """Their ``utils`` imports datasets and image models; the merger needs one name of it."""
    module = types.ModuleType("utils")
    module.get_mask_fn = None  # type: ignore[attr-defined]
    return module


def _base(adapter: dict[str, Any]) -> nn.Module:
    """A model of zeros with the parameters that the adapter changes."""
    root = nn.Module()
    for key in adapter:
        if ".lora_B" not in key:
            continue
        m, n = adapter[key].shape[0], adapter[key.replace("lora_B", "lora_A")].shape[1]
        *parents, last = key.replace(".lora_B", "").split(".")
        parent = root
        for part in parents:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.register_parameter(last, nn.Parameter(torch.zeros(m, n), requires_grad=False))
    return root
