"""Write LoRA files of image models.

diffusers files have no alpha tensors, which means scale 1. kohya files state one alpha for all modules: the
most common rank. Modules of another rank have the ratio in their factors, because diffusers (0.42) loses an
alpha that differs between modules. A Tucker core of an input has become part of A, so every result is a
plain LoRA.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from merging.formats import peft_out
from merging.formats.peft_out import ResultModule
from merging.formats.writer import TensorSpec

if TYPE_CHECKING:
    import torch

KOHYA_NAME = "lora.safetensors"


def kohya_specs(module: ResultModule, dtype: str) -> tuple[TensorSpec, ...]:
    """The specs of alpha, A and B. Alpha is float32: half precision cannot hold every rank."""
    A, B = peft_out.factor_specs(module, dtype)
    return (
        TensorSpec(f"{module.name}.alpha", "F32", ()),
        TensorSpec(f"{module.name}.lora_down.weight", dtype, A.shape),
        TensorSpec(f"{module.name}.lora_up.weight", dtype, B.shape),
    )


def kohya_tensors(
    module: ResultModule, B: torch.Tensor, A: torch.Tensor, alpha: int
) -> tuple[torch.Tensor, ...]:
    """Alpha, A and B in the shapes of :func:`kohya_specs`: ``alpha / rank`` times the written B A is B A."""
    import torch

    if module.rank != alpha:
        root = math.sqrt(module.rank / alpha)
        B, A = B * root, A * root
    return torch.tensor(float(alpha)), *peft_out.factor_tensors(module, B, A)


def common_alpha(modules: Sequence[ResultModule]) -> int:
    """The most common rank, the largest of several."""
    counts = Counter(module.rank for module in modules)
    return max(counts, key=lambda rank: (counts[rank], rank))


def diffusers_specs(module: ResultModule, dtype: str) -> tuple[TensorSpec, ...]:
    """The specs of A and B under the names that diffusers itself writes."""
    A, B = peft_out.factor_specs(module, dtype)
    return (
        TensorSpec(f"{module.name}.lora_A.weight", dtype, A.shape),
        TensorSpec(f"{module.name}.lora_B.weight", dtype, B.shape),
    )
