"""Repositories: the models of the registry as ``ns/name``, the results of merges as ``merges/<id>``."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

from merging.formats.families import FAMILIES
from service.deps import Services
from service.documents import FileEntry, result_key, revision_of
from service.errors import NotFound, ServiceError
from service.hub.errors import Missing
from service.inspection import PARTS
from service.names import MERGE_ID_PATTERN, RESULTS, REVISION_PATTERN, Reference, check_model
from service.registry import NO_WEIGHTS
from service.storage import blob_key

_LIBRARIES = {
    **{family.name: family.library for family in FAMILIES.values()},
    "checkpoint": "transformers",
    PARTS: "peft",
}
_TAGS = {"delta": ("task-vector",), "checkpoint": ()}
DELTA_NAME = "delta.safetensors"
MAIN = "main"
"""The only branch; it is the newest commit."""


@dataclass(frozen=True)
class Stored:
    """A file and where its bytes lie."""

    entry: FileEntry
    key: str


@dataclass(frozen=True)
class Repo:
    """One commit of a repository. ``files`` are sorted; a multi-output merge has a folder for each output."""

    id: str
    commit: str
    created_at: str
    base_model: str | None
    files: tuple[Stored, ...]
    merged: bool = False
    format: str = NO_WEIGHTS

    @property
    def library(self) -> str | None:
        """The library that loads it, as the Hub calls it; None for a delta and for no weights at all."""
        return _LIBRARIES.get(self.format)

    @property
    def tags(self) -> list[str]:
        """What the Hub's listings say about it."""
        weights = [] if self.format == NO_WEIGHTS else ["safetensors", *_TAGS.get(self.format, ("lora",))]
        base = [f"base_model:{self.base_model}"] if self.base_model else []
        return [*([self.library] if self.library else []), *weights, *["merge"] * self.merged, *base]

    def file(self, path: str) -> Stored:
        """The file at a path. Raises :class:`Missing`."""
        for stored in self.files:
            if stored.entry.path == path:
                return stored
        raise self.missing(path)

    def missing(self, path: str) -> Missing:
        """The error for a path that leads nowhere."""
        return Missing(
            "EntryNotFound", "file_not_found", f"{self.id} has no file {path[:255]!r}", commit=self.commit
        )

    def tree(self, path: str, *, recursive: bool) -> list[dict[str, Any]]:
        """Files and folders below a folder, as the Hub lists them. Raises :class:`Missing`."""
        prefix = f"{path}/" if path else ""
        below = [stored.entry for stored in self.files if stored.entry.path.startswith(prefix)]
        if path and not below:
            raise self.missing(path)
        rows: dict[str, dict[str, Any]] = {}
        for entry in below:
            parts = entry.path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                folder = prefix + "/".join(parts[:depth])
                rows.setdefault(folder, self._folder(folder))
            if recursive or len(parts) == 1:
                rows[entry.path] = file_row(entry)
        return [rows[name] for name in sorted(rows)]

    def look_up(self, paths: list[str]) -> list[dict[str, Any]]:
        """Those of the paths that exist, as in a tree."""
        found = {stored.entry.path: file_row(stored.entry) for stored in self.files}
        for stored in self.files:
            parts = stored.entry.path.split("/")
            for depth in range(1, len(parts)):
                folder = "/".join(parts[:depth])
                if folder not in found:
                    found[folder] = self._folder(folder)
        wanted = list(dict.fromkeys(path.strip("/") for path in paths))
        return [found[path] for path in wanted if path in found]

    def _folder(self, path: str) -> dict[str, Any]:
        inside = tuple(item.entry for item in self.files if item.entry.path.startswith(f"{path}/"))
        return {"type": "directory", "oid": revision_of(inside), "size": 0, "path": path}


def file_row(entry: FileEntry) -> dict[str, Any]:
    """A file as the Hub lists it. Every file is an LFS one, so that clients see its sha256."""
    pointer, oid = _pointer(entry)
    lfs = {"oid": entry.sha256, "sha256": entry.sha256, "size": entry.size, "pointerSize": pointer}
    return {"type": "file", "oid": oid, "size": entry.size, "path": entry.path, "lfs": lfs}


def _pointer(entry: FileEntry) -> tuple[int, str]:
    """Bytes and git object id of the LFS pointer file that stands for a file in git."""
    body = (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{entry.sha256}\nsize {entry.size}\n"
    ).encode()
    header = f"blob {len(body)}\0".encode()
    return len(body), hashlib.sha1(header + body, usedforsecurity=False).hexdigest()


def find(services: Services, tenant: str, ns: str, name: str, revision: str | None = None) -> Repo:
    """A commit of a repository, by default the newest. Raises :class:`Missing`."""
    wanted = None if revision in (None, MAIN) else revision
    newest = _result(services, tenant, name) if ns == RESULTS else _model(services, tenant, ns, name)
    if wanted in (None, newest.commit):
        return newest
    if ns != RESULTS and wanted is not None and re.fullmatch(REVISION_PATTERN, wanted):
        try:
            return _model(services, tenant, ns, name, wanted)
        except Missing:
            pass
    raise Missing(
        "RevisionNotFound", "revision_not_found", f"there is no revision {str(wanted)[:80]!r} of {ns}/{name}"
    )


def _model(services: Services, tenant: str, ns: str, name: str, revision: str | None = None) -> Repo:
    try:
        check_model(ns, name)
        manifest = services.registry.manifest(tenant, Reference(ns, name, revision))
    except (NotFound, ServiceError) as error:
        raise _no_repo(ns, name) from error
    files = tuple(Stored(entry, blob_key(tenant, entry.sha256)) for entry in manifest.files)
    return Repo(
        *(manifest.model, manifest.revision, manifest.created_at, manifest.base_model, _sorted(files)),
        format=manifest.format,
    )


def _result(services: Services, tenant: str, merge_id: str) -> Repo:
    record = services.jobs.find(tenant, merge_id) if re.fullmatch(MERGE_ID_PATTERN, merge_id) else None
    if record is None:
        raise _no_repo(RESULTS, merge_id)
    result = record.result
    if result is None:
        raise Missing(
            "RepoNotFound",
            "merge_not_succeeded",
            f"the merge {merge_id} has no result; its state is {record.state}",
        )
    files = tuple(
        Stored(entry, result_key(tenant, record.id, result.attempt, entry.path)) for entry in result.files
    )
    base = record.recipe.get("base_model")
    moment = record.finished_at or record.created_at
    return Repo(
        *(f"{RESULTS}/{record.id}", revision_of(result.files), moment, base, _sorted(files)),
        merged=True,
        format=_format(files),
    )


def _format(files: tuple[Stored, ...]) -> str:
    """The format of a result, by the names that we give to its weights, in any of its folders."""
    names = [stored.entry.path.rpartition("/")[2] for stored in files]
    known = (family.name for family in FAMILIES.values() if family.weights_name in names)
    if DELTA_NAME in names:
        return "delta"
    whole = any(name.startswith("model") and name.endswith(".safetensors") for name in names)
    return "checkpoint" if whole else next(known, NO_WEIGHTS)


def _sorted(files: tuple[Stored, ...]) -> tuple[Stored, ...]:
    return tuple(sorted(files, key=lambda stored: stored.entry.path))


def _no_repo(ns: str, name: str) -> Missing:
    return Missing("RepoNotFound", "model_not_found", f"there is no model {ns[:96]}/{name[:96]}")
