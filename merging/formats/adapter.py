"""Open an adapter of any supported family.

Each family has a reader; the first one that recognises the tensor names reads the file. All readers return
the same :class:`Adapter`, so nothing else needs to know the family.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from merging.errors import InputError
from merging.formats import diffusers_in, kohya_in, peft_in
from merging.formats.guard import Header, check_safetensors
from merging.formats.loaded import Adapter, Module
from merging.formats.peft_config import parse_adapter_config
from merging.formats.source import CONFIG_NAME, Source, locate
from merging.formats.tails import refuse_unsupported

__all__ = ["READERS", "Adapter", "Module", "Reader", "open_adapter"]


class Reader(Protocol):
    """One file family: a module with these two functions."""

    def recognises(self, source: Source, header: Header) -> bool:
        """Whether the tensor names (and a configuration beside them) are of this family."""

    def read(self, source: Source, header: Header, label: str) -> Adapter:
        """Check the names, shapes and scales and return the adapter; reads no factor."""


READERS: tuple[Reader, ...] = (kohya_in, diffusers_in, peft_in)


def open_adapter(path: str | Path, *, label: str | None = None) -> Adapter:
    """Open the adapter at ``path``: its folder, the folder above it, or a single file.

    Reads and checks headers and configuration only (and the single numbers that state alpha).
    ``label`` (default: the name of the folder, or of a single file) names the adapter in messages and
    reports. Raises :class:`InputError`; see the codes of
    :mod:`merging.formats.guard`, :mod:`~merging.formats.source`, :mod:`~merging.formats.peft_config`,
    :mod:`~merging.formats.tails`, :mod:`~merging.formats.peft_in` and :mod:`~merging.formats.image_in`.
    An error names the adapter by ``label`` if there is one: the files of all adapters have the same names.
    """
    try:
        return _opened(path, label)
    except InputError as error:
        if label is None:
            raise
        message = error.message if label in error.message else f"{label}: {error.message}"
        where = {**error.where, "model": label}
        raise InputError(error.code, message, remedy=error.remedy, where=where) from error


def _opened(path: str | Path, label: str | None) -> Adapter:
    source = locate(path)
    header = check_safetensors(source.weights)
    refuse_unsupported(header.tensors, source.weights.name)
    for reader in READERS:
        if reader.recognises(source, header):
            return reader.read(source, header, label or source.label)
    if source.config is not None:
        parse_adapter_config(source.config, file=CONFIG_NAME)  # refuses the other tuners of PEFT by name
    first = ", ".join(list(header.tensors)[:3])
    raise InputError(
        "unknown_format",
        f"{source.weights.name} holds no LoRA factors of a known family (its first tensors: {first})",
        remedy="Send a PEFT adapter (adapter_config.json and adapter_model.safetensors), or the "
        ".safetensors file of a kohya or diffusers LoRA",
        where={"file": source.weights.name},
    )
