"""The names of LoRA tensors in single files of image models: kohya's and diffusers' spellings.

kohya (sd-scripts) writes ``lora_unet_<path with underscores>.lora_down.weight``; the module name cannot be
turned back into a path, and need not be. Diffusers and other trainers write
``<component>.<dotted path>`` with one of seven tails, which all mean the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

ImageRole = Literal["A", "B", "mid", "alpha"]

COMPONENTS = (
    "unet",
    "transformer",
    "transformer_2",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "prior",
)
"""The components of a diffusers pipeline, which its loaders find by these prefixes."""

ORIGINAL = ("diffusion_model", "text_encoders")
"""Components under the names of the original models; loaders convert these names by model."""

_ROLES: dict[str, ImageRole] = {"up": "B", "down": "A", "mid": "mid", "B": "B", "A": "A"}
_KOHYA = re.compile(r"((?:lora|lycoris)_[^.]+)\.(?:lora_(up|down|mid)\.weight|alpha)\Z")
_PEFT_TAIL = re.compile(r"(.+)\.lora_(A|B)(?:\.weight|\.([^.]+)\.weight)?\Z")
_UP_DOWN = re.compile(r"(.+)\.lora_(up|down|mid)\.weight\Z")
_PROCESSOR = re.compile(r"(.+)_lora\.(up|down)\.weight\Z")
_LINEAR = re.compile(r"(.+)\.(?:lora|lora_linear_layer)\.(up|down)\.weight\Z")
_ALPHA = re.compile(r"(.+?)(_lora|\.lora|\.lora_linear_layer)?\.alpha\Z")


@dataclass(frozen=True, slots=True)
class ImageKey:
    """One key: its module and its part. ``legacy`` tells of a spelling that only U-Nets ever had."""

    path: str
    role: ImageRole
    adapter_name: str | None = None
    legacy: bool = False


def kohya_key(key: str) -> ImageKey | None:
    """The key as kohya's scripts spell it, or None."""
    match = _KOHYA.match(key)
    if match is None:
        return None
    return ImageKey(match[1], _ROLES[match[2]] if match[2] else "alpha")


def diffusers_key(key: str) -> ImageKey | None:
    """The key in one of the dotted spellings, or None."""
    if _KOHYA.match(key):
        return None
    if match := _PEFT_TAIL.match(key):
        # PEFT's own files look like this too, but never begin with a component
        return ImageKey(match[1], _ROLES[match[2]], match[3]) if component(key) else None
    if match := _UP_DOWN.match(key):
        return ImageKey(match[1], _ROLES[match[2]])
    if match := _PROCESSOR.match(key):
        return ImageKey(_attention(match[1]), _ROLES[match[2]], legacy=True)
    if match := _LINEAR.match(key):
        return ImageKey(match[1], _ROLES[match[2]], legacy=True)
    if match := _ALPHA.match(key):
        processor = match[2] == "_lora"
        return ImageKey(_attention(match[1]) if processor else match[1], "alpha", legacy=match[2] is not None)
    return None


def component(name: str) -> str | None:
    """The component with which a dotted name begins, or None."""
    first, dot, _ = name.partition(".")
    return first if dot and first in (*COMPONENTS, *ORIGINAL) else None


def _attention(path: str) -> str:
    """The layer behind an attention processor: ``attn1.processor.to_out`` is ``attn1.to_out.0``."""
    parent, _, name = path.rpartition(".")
    parent = parent.removesuffix(".processor")
    return f"{parent}.{'to_out.0' if name == 'to_out' else name}"
