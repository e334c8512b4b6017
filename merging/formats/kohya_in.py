"""Read LoRA files of kohya's scripts (sd-scripts) and those of LyCORIS that are plain LoRA (LoCon)."""

from __future__ import annotations

from merging.formats.guard import Header
from merging.formats.image_in import ImageReader, group
from merging.formats.image_keys import diffusers_key, kohya_key
from merging.formats.loaded import Adapter
from merging.formats.shapes import fail
from merging.formats.source import Source
from merging.formats.tensors import TensorFile

FORMAT = "kohya"


def recognises(source: Source, header: Header) -> bool:
    """Whether any tensor is named as kohya's scripts do."""
    return source.config is None and any(kohya_key(key) for key in header.tensors)


def read(source: Source, header: Header, label: str) -> Adapter:
    """The adapter in a kohya file. The scale is alpha / rank; no alpha, or 0, means alpha = rank.

    Raises :class:`InputError`: ``several_families`` and the codes of :mod:`merging.formats.image_in`.
    """
    file = source.weights.name
    for key in header.tensors:
        other = diffusers_key(key)
        if other is not None and other.role != "alpha":
            fail("several_families", file, other.path, f"mixes kohya's names with others ({key})",
                 remedy="Convert it to one spelling, or split it into one file per component")  # fmt: skip
    modules = group({key: kohya_key(key) for key in header.tensors}, file)
    weights = TensorFile(source.weights, header)
    reader = ImageReader(weights, header, zero_alpha_is_rank=True)
    described = {name: reader.module(name, roles) for name, roles in sorted(modules.items())}
    weights.close()
    warnings = list(source.notes)
    if reader.zero:
        warnings.append(f"alpha is 0 for {len(reader.zero)} modules, which kohya's scripts take as the rank")
    return Adapter(
        label=label,
        path=source.weights if source.single else source.folder,
        format=FORMAT,
        files=source.files,
        weights=weights,
        modules=described,
        base_model=header.metadata.get("ss_base_model_version") or None,
        warnings=tuple(warnings),
    )
