"""Read LoRA files of diffusers and of trainers that use dotted names with a component before them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from merging.formats.guard import Header
from merging.formats.image_in import ImageReader, Scaling, group
from merging.formats.image_keys import COMPONENTS, ImageKey, component, diffusers_key
from merging.formats.loaded import Adapter
from merging.formats.peft_config import AdapterConfig, check_adapter_config, load_json
from merging.formats.shapes import fail
from merging.formats.source import Source
from merging.formats.tensors import TensorFile

FORMAT = "diffusers"
METADATA_KEY = "lora_adapter_metadata"
"""The header field in which diffusers keeps the LoraConfig of each component as JSON."""


def recognises(source: Source, header: Header) -> bool:
    """Whether any tensor is a LoRA factor under a dotted name that is not PEFT's."""
    parsed = (diffusers_key(key) for key in header.tensors)
    return source.config is None and any(key is not None and key.role != "alpha" for key in parsed)


def read(source: Source, header: Header, label: str) -> Adapter:
    """The adapter in a diffusers file.

    The scale is that of the header's ``lora_adapter_metadata``, else alpha / rank of the alpha tensors,
    else 1. Raises :class:`InputError`: ``component_missing`` and the codes of
    :mod:`merging.formats.image_in` and, for the metadata, of :mod:`merging.formats.peft_config`.
    """
    file = source.weights.name
    warnings = list(source.notes)
    parsed = {key: diffusers_key(key) for key in header.tensors}
    modules = group(_with_components(parsed, file, warnings), file)
    configs = _configs(header, file)
    weights = TensorFile(source.weights, header)
    reader = ImageReader(weights, header, zero_alpha_is_rank=False)
    described = {
        name: reader.module(name, roles, _scaling(name, configs)) for name, roles in sorted(modules.items())
    }
    weights.close()
    silent = [name for name, module in described.items() if module.scale == 0]
    if silent:
        warnings.append(f"alpha is 0 for {len(silent)} modules, which therefore add nothing")
    bases = sorted({base for config in configs.values() if (base := config.base_model_name_or_path)})
    stated = header.metadata.get("ss_base_model_version")
    return Adapter(
        label=label,
        path=source.weights if source.single else source.folder,
        format=FORMAT,
        files=source.files,
        weights=weights,
        modules=described,
        base_model=stated or (bases[0] if len(bases) == 1 else None),
        warnings=(*warnings, *(note for config in configs.values() for note in config.notes)),
    )


def _with_components(
    parsed: Mapping[str, ImageKey | None], file: str, warnings: list[str]
) -> dict[str, ImageKey | None]:
    """The keys with their component; the oldest files leave ``unet.`` out."""
    result: dict[str, ImageKey | None] = {}
    added = 0
    legacy = {key.path for key in parsed.values() if key is not None and key.legacy}
    for text, key in parsed.items():
        if key is not None and component(key.path) is None:
            if key.path not in legacy:
                fail("component_missing", file, key.path,
                     f"names no component of a pipeline in {text}",
                     remedy=f"Put one of {', '.join(COMPONENTS)} or diffusion_model and a dot before the "
                     "names")  # fmt: skip
            key = replace(key, path=f"unet.{key.path}")
            added += 1
        result[text] = key
    if added:
        warnings.append(f"{added} names have no component; they were taken as those of the unet")
    return result


def _configs(header: Header, file: str) -> dict[str, AdapterConfig]:
    """Component -> its configuration in the header."""
    text = header.metadata.get(METADATA_KEY)
    if text is None:
        return {}
    where = f"{file} ({METADATA_KEY})"
    fields: dict[str, dict[str, Any]] = {}
    for name, value in load_json(text.encode(), where).items():
        first, dot, field = name.partition(".")
        if not dot or first not in COMPONENTS:
            fail("config_field", file, None, f"has {METADATA_KEY} with the field {name[:80]!r}, which "
                 "belongs to no component", remedy="Remove the field")  # fmt: skip
        fields.setdefault(first, {"peft_type": "LORA"})[field] = value
    return {
        name: check_adapter_config(raw, file=f"{where[:-1]} of {name})")
        for name, raw in sorted(fields.items())
    }


def _scaling(name: str, configs: Mapping[str, AdapterConfig]) -> Scaling | None:
    first, _, path = name.partition(".")
    return Scaling(configs[first], path) if first in configs else None
