"""The names of LoRA tensors in PEFT files: read every spelling, write one.

A key is ``base_model.model.`` + module path + tail. Saved files carry no adapter name; raw state dicts
carry one in the tail, and wrappers (FSDP, torch.compile, DDP) leave fragments in the path.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass
from typing import Literal

Kind = Literal["linear", "embedding", "conv2d"]
Role = Literal["A", "B", "embedding_A", "embedding_B"]

PREFIX = "base_model.model."
MHA_OUT = ".base_layer.out_proj"
"""Under a LoRA-wrapped ``nn.MultiheadAttention`` the output projection lies below ``base_layer``."""

_FACTOR = re.compile(r"(.+)\.lora_(A|B)(?:\.([^.]+))?\.weight\Z")
_EMBEDDING = re.compile(r"(.+)\.lora_(embedding_A|embedding_B)(?:\.([^.]+))?\Z")
_SAVED = re.compile(r"(.+)\.modules_to_save\.([^.]+)\.(.+)\Z")
_WRAPPERS = ("_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")


@dataclass(frozen=True, slots=True)
class ParsedKey:
    """One key: the module path (or, without a ``role``, the whole tensor name), and what was spelled."""

    path: str
    role: Role | None
    adapter_name: str | None
    stripped: str | None


def is_lora_key(key: str) -> bool:
    """Whether the tail is one that PEFT gives to a LoRA factor."""
    return bool(_FACTOR.match(key) or _EMBEDDING.match(key))


def parse_key(key: str) -> ParsedKey:
    """Split a key into module path and role; fragments of wrappers are removed from the path."""
    if match := _FACTOR.match(key) or _EMBEDDING.match(key):
        path, stripped = _strip(match[1])
        role: Role = match[2]  # type: ignore[assignment]
        return ParsedKey(path, role, match[3], stripped)
    saved = _SAVED.match(key)
    name = f"{saved[1]}.{saved[3]}" if saved else key
    path, stripped = _strip(name)
    return ParsedKey(path, None, saved[2] if saved else None, stripped)


def factor_keys(name: str, kind: Kind) -> tuple[str, str]:
    """The keys of A and B under which PEFT saves the module ``name``."""
    if kind == "embedding":
        return f"{PREFIX}{name}.lora_embedding_A", f"{PREFIX}{name}.lora_embedding_B"
    return f"{PREFIX}{name}.lora_A.weight", f"{PREFIX}{name}.lora_B.weight"


def config_path(name: str) -> str:
    """The module path by which PEFT's configuration (patterns, target_modules) knows a module."""
    return name.removesuffix(MHA_OUT)


def weight_key(name: str, names: Container[str]) -> str:
    """The base's own name for the weight of a module; ``names`` are all modules of the adapter.

    That of a ``nn.MultiheadAttention`` is the packed projection, whose output projection is wrapped too.
    """
    if name.endswith(MHA_OUT):
        return f"{name.removesuffix(MHA_OUT)}.out_proj.weight"
    return f"{name}.in_proj_weight" if name + MHA_OUT in names else f"{name}.weight"


def _strip(path: str) -> tuple[str, str | None]:
    """The path without prefixes and wrapper fragments, and the first fragment that was removed."""
    stripped = None
    if any(wrapper in path for wrapper in _WRAPPERS):
        segments = path.split(".")
        stripped = next((segment for segment in segments if segment in _WRAPPERS), None)
        path = ".".join(segment for segment in segments if segment not in _WRAPPERS)
    while True:
        if path.startswith("module."):
            stripped = stripped or "module"
            path = path.removeprefix("module.")
        elif path.startswith(PREFIX):
            path = path.removeprefix(PREFIX)
        else:
            return path, stripped
