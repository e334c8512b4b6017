"""``merganser inspect`` on checkpoints and task vectors: what their headers tell."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.cli_console import size

if TYPE_CHECKING:
    from merging.formats.tensor_set import TensorSet


def whole_model(path: Path) -> dict[str, Any] | None:
    """Plain data about the checkpoint or task vector at ``path``; ``None`` for anything else."""
    from merging.dense.inputs import is_dense, open_model
    from merging.formats.tensor_set import TensorSet

    if not is_dense(path):
        return None
    model = open_model(path, str(path))
    assert isinstance(model, TensorSet)
    try:
        return _described(model)
    finally:
        model.close()


def _described(model: TensorSet) -> dict[str, Any]:
    infos = model.infos
    config = model.config or {}
    return {
        "path": str(model.path),
        "format": model.format,
        "model_type": config.get("model_type"),
        "architectures": config.get("architectures"),
        "files": sorted({model.file_of(name) for name in infos}),
        "bytes": sum(info.end - info.begin for info in infos.values()),
        "parameters": sum(math.prod(info.shape) for info in infos.values()),
        "dtypes": sorted({info.dtype for info in infos.values()}),
        "tensors": [
            {"name": name, "dtype": info.dtype, "shape": list(info.shape)} for name, info in infos.items()
        ],
        "warnings": list(model.warnings),
    }


def whole_text(data: dict[str, Any]) -> str:
    """The same for readers."""
    shapes = Counter(" x ".join(map(str, tensor["shape"])) or "scalar" for tensor in data["tensors"])
    kinds = ", ".join(f"{count} of {shape}" for shape, count in shapes.most_common(8))
    lines = [
        f"{data['path']}: {data['format']}" + (f" of {data['model_type']}" if data["model_type"] else ""),
        f"tensors     {len(data['tensors'])} in {len(data['files'])} files, {size(data['bytes'])}",
        f"parameters  {data['parameters']:,} in {', '.join(data['dtypes'])}",
        f"shapes      {kinds}" + (" ..." if len(shapes) > 8 else ""),
    ]
    return "\n".join([*lines, *(f"warning: {text}" for text in data["warnings"])])
