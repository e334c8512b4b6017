"""Open a full checkpoint: a folder with ``model.safetensors`` or shards and their index. No torch here.

Only headers, the index and ``config.json`` are read. What is quantised is refused by name: its stored numbers
are codes, and neither a difference nor a mean of codes means anything.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merging.errors import InputError
from merging.formats.guard import TensorInfo
from merging.formats.shards import read_json
from merging.formats.sniff import PICKLE_SUFFIXES
from merging.formats.source import check_inside
from merging.formats.tensor_set import TensorSet, open_file, open_files

STEMS = ("model", "diffusion_pytorch_model")
CONFIG_NAME = "config.json"
MAX_CONFIG_BYTES = 4 << 20

_COMPANIONS = re.compile(
    r"\.(weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.[a-z_0-9]+)"
    r"|weight_scale_inv|weight_scale|weight_zero_point|activation_scale|input_scale"
    r"|qweight|qzeros|g_idx|SCB)$|_(blocks|scales)$"
)


def holds_checkpoint(path: Path) -> bool:
    """Whether a path looks like a full checkpoint: a folder, or the file ``model.safetensors`` itself."""
    if path.is_dir():
        return _stem(path) is not None
    return path.is_file() and path.name in {f"{stem}.safetensors" for stem in STEMS}


def open_checkpoint(path: str | Path, *, label: str | None = None) -> TensorSet:
    """Open the checkpoint at ``path``.

    Raises :class:`InputError`: ``checkpoint_not_found``, ``pickle_not_accepted``, ``quantised_base``, and the
    codes of :mod:`merging.formats.shards` and of the guard.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    label = label or folder.resolve().name
    if path.is_dir():
        stem = _stem(folder)
        if stem is None:
            raise _nothing(folder, label)
        files = open_files(folder, stem)
    else:
        files = (open_file(folder, path.name),)
    config_path = folder / CONFIG_NAME
    config: dict[str, Any] | None = None
    if config_path.exists():
        check_inside(folder, config_path)
        config = read_json(config_path, MAX_CONFIG_BYTES)
    found = TensorSet(
        label=label,
        path=folder,
        kind="checkpoint",
        files=files,
        config=config,
        config_path=config_path if config is not None else None,
    )
    refuse_quantised(found.infos, config, label)
    return found


def _stem(folder: Path) -> str | None:
    for stem in STEMS:
        if (folder / f"{stem}.safetensors.index.json").exists() or (folder / f"{stem}.safetensors").exists():
            return stem
    return None


def _nothing(folder: Path, label: str) -> InputError:
    pickles = sorted(entry.name for entry in folder.iterdir() if entry.suffix in PICKLE_SUFFIXES)
    if pickles:
        return InputError(
            "pickle_not_accepted",
            f"{label} holds pickled weights ({pickles[0]}), which can run code when loaded",
            remedy="Convert it on your own machine with save_pretrained(safe_serialization=True)",
            where={"model": label, "file": pickles[0]},
        )
    if (folder / "adapter_config.json").exists():
        return InputError(
            "checkpoint_not_found",
            f"{label} is an adapter, and this merge is of whole checkpoints",
            remedy="Fold it into its base first; or write a recipe: for adapters parameters are numbers, "
            "neither lists over layers nor filters",
            where={"model": label},
        )
    return InputError(
        "checkpoint_not_found",
        f"{label} has no model.safetensors and no model.safetensors.index.json",
        remedy="Give the folder of a full checkpoint in safetensors format",
        where={"model": label},
    )


def refuse_quantised(infos: Mapping[str, TensorInfo], config: Mapping[str, Any] | None, label: str) -> None:
    """Raise ``quantised_base`` for a model whose weights are not plain floating-point numbers."""
    reason = None
    settings = (config or {}).get("quantization_config")
    if settings:
        method = settings.get("quant_method", "") if isinstance(settings, Mapping) else ""
        reason = f"its config.json states quantization_config {str(method)[:40]}".rstrip()
    for name, info in infos.items():
        if reason is not None:
            break
        if info.dtype.startswith("F8"):
            reason = f"tensor {name} is {info.dtype}"
        elif _COMPANIONS.search(name):
            reason = f"tensor {name} belongs to quantised weights"
    if reason is None:
        return
    raise InputError(
        "quantised_base",
        f"{label} is quantised ({reason}) and cannot be merged as a checkpoint",
        remedy="Use the unquantised bf16 or fp16 checkpoint. Merging adapters into an adapter "
        "needs no base at all",
        where={"model": label},
    )
