"""What an upload is: opened, described, or refused with errors that a client understands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from merging.errors import MergeError
from merging.formats.guard import check_safetensors
from service.data_uploads import inspect_data
from service.names import WEIGHTS

PARTS = "parts"
"""The format of a revision with an adapter in each of several folders."""


def inspect(folder: Path, model: str) -> dict[str, Any]:
    """What the manifest says about the adapter, whole model or data in ``folder``.

    Errors name the model, not the folder.
    """
    from merging import load_adapter
    from merging.dense.inputs import is_dense

    try:
        data = inspect_data(folder)
        if data is not None:
            return data
        _check_weights(folder)
        if is_dense(folder):
            return _inspect_whole(folder, model)
        adapter = load_adapter(folder, label=model)
    except MergeError as error:
        raise hide_folder(error, folder) from None
    try:
        return {
            "format": adapter.format,
            "modules": len(adapter.modules),
            "rank": max((module.rank for module in adapter.modules.values()), default=0),
            "base_model": adapter.base_model,
            "warnings": tuple(warning.replace(f"{folder}/", "") for warning in adapter.warnings),
        }
    finally:
        adapter.close()


def _inspect_whole(folder: Path, model: str) -> dict[str, Any]:
    """Of a checkpoint or a task vector: ``modules`` counts its tensors."""
    from merging.dense.inputs import open_model

    found = open_model(folder, model)
    try:
        return {
            "format": found.format,
            "modules": len(getattr(found, "infos", ())),
            "rank": 0,
            "base_model": found.base_model,
            "warnings": tuple(text.replace(f"{folder}/", "") for text in found.warnings),
        }
    finally:
        found.close()


def inspect_parts(folder: Path, model: str) -> dict[str, Any] | None:
    """The same for an adapter in each of several sub-folders, as merges with several outputs are; else None.

    Weights outside of these folders must at least be well-formed: they may be what the parts share.
    """
    from merging.formats.source import CONFIG_NAME

    parts = sorted(path.parent for path in folder.glob(f"*/{CONFIG_NAME}"))
    if len(parts) < 2 or (folder / CONFIG_NAME).exists():
        return None
    found = [inspect(part, f"{model}/{part.name}") for part in parts]
    _check_weights(folder)
    warnings = [f"{part.name}: {text}" for part, facts in zip(parts, found, strict=True)
                for text in facts["warnings"]]  # fmt: skip
    return {
        "format": PARTS,
        "modules": max(facts["modules"] for facts in found),
        "rank": max(facts["rank"] for facts in found),
        "base_model": found[0]["base_model"],
        "warnings": tuple(warnings),
    }


def _check_weights(folder: Path) -> None:
    """Raise the errors of the guard for any weights in a folder, be they of the model or beside it."""
    for path in sorted(folder.rglob(f"*{WEIGHTS}")):
        name = path.relative_to(folder).as_posix()
        try:
            check_safetensors(path)
        except MergeError as error:
            error.message = error.message.replace(path.name, name, 1)
            error.where = {**error.where, "file": name}
            raise


def hide_folder(error: MergeError, folder: Path) -> MergeError:
    """The same error without the path of a temporary folder, which says nothing to a client."""

    def clean(value: str) -> str:
        return value.replace(f"{folder}/", "").replace(str(folder), "the upload")

    error.message = clean(error.message)
    error.remedy = clean(error.remedy) if error.remedy else None
    error.where = {key: clean(value) for key, value in error.where.items()}
    return error
