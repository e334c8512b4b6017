"""Header metadata of image-model LoRA files: what a merge keeps, joins, rewrites and drops.

Kept where all inputs that state it agree: what says which model and network the file is for. Joined:
licence, author, tags, trigger words, and what was merged. Rewritten: rank and alpha. All else is dropped:
hashes, since they are of other weights, and the training log, which describes one input only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace

from merging.errors import InputError
from merging.formats.diffusers_in import METADATA_KEY
from merging.formats.image_keys import COMPONENTS
from merging.formats.image_out import common_alpha
from merging.formats.loaded import Adapter
from merging.formats.peft_out import ResultModule, adapter_config

ARCHITECTURE = "modelspec.architecture"
MERGED_FROM = "modelspec.merged_from"
_KEPT = (
    "modelspec.architecture",
    "modelspec.encoder_layer",
    "modelspec.implementation",
    "modelspec.prediction_type",
    "modelspec.resolution",
    "modelspec.sai_model_spec",
    "modelspec.timestep_range",
    "ss_base_model_version",
    "ss_v2",
)
_JOINED = {
    "modelspec.author": "; ",
    "modelspec.license": "; ",
    "modelspec.tags": ", ",
    "modelspec.trigger_phrase": ", ",
    MERGED_FROM: ", ",
}
_TITLES = ("modelspec.title", "ss_output_name", "name")
_MAX_ENTRIES = 256
_MAX_TEXT = 1024


def check_architecture(adapters: Sequence[Adapter], allow_mismatch: bool, warnings: list[str]) -> None:
    """Refuse files whose ``modelspec.architecture`` differ. Raises ``base_model_mismatch``."""
    found: dict[str, str] = {}
    for adapter in adapters:
        if text := adapter.metadata.get(ARCHITECTURE):
            found.setdefault(text, adapter.label)
    if len(found) < 2:
        return
    shown = ", ".join(f"{text[:80]} ({label})" for text, label in found.items())
    if not allow_mismatch:
        raise InputError(
            "base_model_mismatch",
            f"the adapters are for different architectures: {shown}",
            remedy="Merge adapters of one base, or set allow_base_mismatch if the bases are the same",
            where={"field": ARCHITECTURE},
        )
    warnings.append(f"the adapters are for different architectures: {shown}")


def kohya_header(adapters: Sequence[Adapter], modules: Sequence[ResultModule]) -> dict[str, str]:
    """The metadata of a merged kohya file."""
    header = _shared(adapters)
    header["ss_network_module"] = _network_module(adapters)
    header["ss_network_dim"] = _rank(modules)
    alpha = header["ss_network_alpha"] = str(common_alpha(modules))
    kernels = [
        module for module in modules if module.kind == "conv2d" and set(module.weight_shape[2:]) != {1}
    ]
    if kernels:
        header["ss_network_args"] = json.dumps({"conv_alpha": alpha, "conv_dim": _rank(kernels)})
    return header


def diffusers_header(adapters: Sequence[Adapter], modules: Sequence[ResultModule]) -> dict[str, str]:
    """The metadata of a merged diffusers file, with the configuration of each component.

    Diffusers takes a configuration that lacks a component for one of PEFT's defaults, so files with other
    names than those of its own components get none; scale 1 is then what every loader assumes.
    """
    header = _shared(adapters)
    parts: dict[str, list[ResultModule]] = {}
    for module in modules:
        component, _, path = module.name.partition(".")
        parts.setdefault(component, []).append(replace(module, name=path))
    if all(component in COMPONENTS for component in parts):
        fields = {
            f"{component}.{field}": value
            for component, own in parts.items()
            for field, value in adapter_config(own, anchored_targets=True).items()
        }
        header[METADATA_KEY] = json.dumps(fields, sort_keys=True)
    return header


def _shared(adapters: Sequence[Adapter]) -> dict[str, str]:
    header: dict[str, str] = {}
    for key in _KEPT:
        stated = sorted({text for adapter in adapters if (text := adapter.metadata.get(key))})
        if len(stated) == 1 and _plain(stated[0]):
            header[key] = stated[0]
    for key, separator in _JOINED.items():
        texts = [adapter.metadata.get(key, "") for adapter in adapters]
        if key == MERGED_FROM:
            texts = [text or _title(adapter) for text, adapter in zip(texts, adapters, strict=True)]
        joined = _join(texts, separator)
        if joined:
            header[key] = joined
    return header


def _join(texts: Iterable[str], separator: str) -> str:
    """The distinct entries of all texts, sorted: the order of the inputs must not show."""
    entries = {part.strip() for text in texts for part in text.split(separator.strip())}
    return separator.join(sorted(part for part in entries if part and _plain(part))[:_MAX_ENTRIES])


def _title(adapter: Adapter) -> str:
    """A name that comes from the file alone, so that where it lies never reaches the result."""
    for key in _TITLES:
        text = adapter.metadata.get(key, "").replace(",", " ").strip()
        if text and _plain(text):
            return text
    return f"sha256:{adapter.digest[:16]}"


def _network_module(adapters: Sequence[Adapter]) -> str:
    """The trainer's module if all agree on one of its own; LyCORIS and the rest have become plain LoRA."""
    stated = sorted({adapter.metadata.get("ss_network_module", "") for adapter in adapters} - {""})
    own = len(stated) == 1 and stated[0].startswith("networks.") and _plain(stated[0])
    return stated[0] if own else "networks.lora"


def _rank(modules: Sequence[ResultModule]) -> str:
    ranks = {module.rank for module in modules}
    return str(ranks.pop()) if len(ranks) == 1 else "Dynamic"


def _plain(text: str) -> bool:
    return len(text) <= _MAX_TEXT and text.isprintable()
