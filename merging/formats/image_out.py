"""Write LoRA files of image models: one file, every scale 1.

kohya files state alpha = rank for each module; diffusers files have no alpha tensors, which means the same
there. A Tucker core of an input has become part of A, so every result is a plain LoRA.
"""

from __future__ import annotations

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


def kohya_tensors(module: ResultModule, B: torch.Tensor, A: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Alpha, A and B in the shapes of :func:`kohya_specs`."""
    import torch

    return torch.tensor(float(module.rank)), *peft_out.factor_tensors(module, B, A)


def diffusers_specs(module: ResultModule, dtype: str) -> tuple[TensorSpec, ...]:
    """The specs of A and B under the names that diffusers itself writes."""
    A, B = peft_out.factor_specs(module, dtype)
    return (
        TensorSpec(f"{module.name}.lora_A.weight", dtype, A.shape),
        TensorSpec(f"{module.name}.lora_B.weight", dtype, B.shape),
    )
