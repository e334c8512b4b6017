"""The names that users may give: models, files, references. Strict, because they become keys and paths."""

from __future__ import annotations

import re
from dataclasses import dataclass

from merging.errors import InputError
from merging.formats.sniff import PICKLE_SUFFIXES
from service.errors import ServiceError

NAME_PATTERN = r"^[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?$"
REVISION_PATTERN = r"^[0-9a-f]{40}$"
MERGE_ID_PATTERN = r"^mrg_[0-9a-f]{32}$"
RESULTS = "merges"
"""The namespace under which results of merges can be used as models."""

_NAME = re.compile(NAME_PATTERN)
_REVISION = re.compile(REVISION_PATTERN)
_SEGMENT = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.=+-]{0,127}$")
_RESERVED = (RESULTS, "api", "datasets", "models", "spaces", "v1")
WEIGHTS = ".safetensors"
_TEXTS = (".json", ".jsonl", ".md", ".txt", ".yaml", ".yml", ".jinja")
_VOCABULARIES = (".model", ".spm", ".tiktoken")
"""Tokenizers of SentencePiece and tiktoken: kept, passed on, and never opened."""
_BARE = re.compile(r"^(LICEN[CS]E|NOTICE|COPYING|tokenizer\.model\.v\d+)$", re.IGNORECASE)
"""Names without a suffix of their own that folders of models have."""
TEXT_LIMIT = 64 << 20
"""Most bytes of a file that is not weights; the largest known ones are tokenizers."""


@dataclass(frozen=True)
class Reference:
    """``ns/name`` with an optional revision: a model of the registry or the result of a merge."""

    ns: str
    name: str
    revision: str | None = None

    @property
    def model(self) -> str:
        """``ns/name``."""
        return f"{self.ns}/{self.name}"

    def __str__(self) -> str:
        return f"{self.model}@{self.revision}" if self.revision else self.model


def check_model(ns: str, name: str) -> str:
    """``ns/name``, or an error that says what is wrong with it: ``name_invalid``, ``name_reserved``."""
    for field, value in (("ns", ns), ("name", name)):
        if not _NAME.fullmatch(value) or ".." in value or "--" in value:
            raise ServiceError(
                "name_invalid",
                f"{value[:100]!r} is not a usable {'namespace' if field == 'ns' else 'name'}",
                remedy="Use up to 96 letters, digits, '.', '_' and '-', with no '..' or '--' in it",
                where={"field": field},
            )
    if ns in _RESERVED:
        raise ServiceError("name_reserved", f"the namespace {ns!r} is reserved", where={"field": "ns"})
    return f"{ns}/{name}"


def parse_reference(text: str) -> Reference | None:
    """The reference in ``ns/name[@revision]``, or None when the text is something else."""
    model, at, revision = text.partition("@")
    parts = model.split("/")
    if len(parts) != 2 or not all(_NAME.fullmatch(part) and ".." not in part for part in parts):
        return None
    if at and not _REVISION.fullmatch(revision):
        return None
    return Reference(parts[0], parts[1], revision or None)


def check_path(path: str) -> str:
    """A file's path inside a model: ``path_invalid``, ``pickle_not_accepted``, ``file_type_not_accepted``."""
    segments = path.split("/")
    where = {"file": path[:255], "field": "path"}
    if len(path) > 255 or len(segments) > 5 or not all(_SEGMENT.fullmatch(part) for part in segments):
        raise ServiceError(
            "path_invalid",
            f"{path[:255]!r} is not a usable file path",
            remedy="Use up to 5 plain names of letters, digits, '.', '_', '-', '=' and '+', joined by '/'",
            where=where,
        )
    lower = path.lower()
    if lower.endswith(PICKLE_SUFFIXES):
        raise InputError(
            "pickle_not_accepted",
            f"{path} has the suffix of a pickle, which can run code when it is loaded",
            remedy="Convert it to safetensors on your own machine, or leave it out if these are there too",
            where=where,
        )
    accepted = (WEIGHTS, *_TEXTS, *_VOCABULARIES)
    if not lower.endswith(accepted) and not _BARE.match(segments[-1]):
        raise ServiceError(
            "file_type_not_accepted",
            f"{path} has a type that is not accepted",
            remedy=f"Leave it out: only {', '.join(accepted)} files and licences are taken",
            where=where,
        )
    return path


def size_limit(path: str, weights_limit: int) -> int:
    """Most bytes that a file of this name may have."""
    return weights_limit if path.lower().endswith(WEIGHTS) else min(TEXT_LIMIT, weights_limit)
