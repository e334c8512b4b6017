"""Make small adapter folders by hand: no torch and no safetensors library, so every byte can be wrong."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1, "BOOL": 1, "C64": 8, "F4": 1}
PREFIX = "base_model.model."
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q"],
    "base_model_name_or_path": "example/base",
    "bias": "none",
}
Shapes = Mapping[str, tuple[int, ...]]
PAIR: Shapes = {
    f"{PREFIX}layers.0.q.lora_A.weight": (2, 3),
    f"{PREFIX}layers.0.q.lora_B.weight": (4, 2),
}


def values(count: int, start: int = 1) -> bytes:
    """Little-endian float32 numbers, none of them zero."""
    return struct.pack(f"<{count}f", *(0.25 * (start + i % 7) for i in range(count)))


def entries(shapes: Shapes, dtype: str = "F32") -> dict[str, Any]:
    """A correct header for these shapes."""
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    return header


def data_bytes(header: Mapping[str, Any]) -> int:
    """How many bytes of data a header claims."""
    return max((e["data_offsets"][1] for n, e in header.items() if n != "__metadata__"), default=0)


def pack(header: bytes | Mapping[str, Any], data: bytes | None = None) -> bytes:
    """A safetensors file from a header (or its raw text) and data (default: float32 numbers)."""
    if not isinstance(header, bytes):
        if data is None:
            data = values(-(-data_bytes(header) // 4))[: data_bytes(header)]
        header = json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + (data or b"")


def write_adapter(
    folder: Path,
    shapes: Shapes = PAIR,
    *,
    dtype: str = "F32",
    weights: bytes | None = None,
    config: bytes | None = None,
    drop: tuple[str, ...] = (),
    **fields: Any,
) -> Path:
    """An adapter folder; ``fields`` change the configuration, ``drop`` removes fields from it."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is None:
        settings = {key: value for key, value in {**CONFIG, **fields}.items() if key not in drop}
        config = json.dumps(settings).encode()
    (folder / "adapter_config.json").write_bytes(config)
    data = pack(entries(shapes, dtype)) if weights is None else weights
    (folder / "adapter_model.safetensors").write_bytes(data)
    return folder


@dataclass(frozen=True)
class Case:
    """One bad adapter. ``upload`` is False when it cannot be sent as plain files (links, pipes)."""

    name: str
    build: Callable[[Path], object]
    code: str
    upload: bool = True
