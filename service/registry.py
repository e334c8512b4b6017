"""Models and their immutable revisions.

A client uploads files one by one; they are staged for the next revision. ``commit`` opens them as an
adapter and, if that succeeds, writes the manifest. Manifests live in storage; Redis holds the staged
names and the order of models and revisions, and can be rebuilt.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import redis

from merging.errors import MergeFailure
from service.broker import models_key, revisions_key, staging_key, text
from service.clock import at, millis, now
from service.documents import FileEntry, Manifest, manifest_key, revision_of
from service.errors import Conflict, NotFound, TooLarge, Unavailable
from service.inspection import inspect, inspect_parts
from service.marks import Marks
from service.names import WEIGHTS, Reference
from service.outlines import can_be_outlined, outline
from service.paging import page
from service.scratch import scratch
from service.storage import Blob, Storage, blob_key
from service.uploaded import uploaded

STAGING_SECONDS = 24 * 3600
MAX_FILES = 1000
NO_WEIGHTS = "none"
"""The format of a revision that holds no weights: a repository that was just made, or a model card alone."""
_LOCK_SECONDS = 30

# Forget staged files, but only those that are still what was committed.
_UNSTAGE = """
for i = 1, #ARGV, 2 do
  if redis.call('HGET', KEYS[1], ARGV[i]) == ARGV[i + 1] then redis.call('HDEL', KEYS[1], ARGV[i]) end
end
"""


class Registry:
    """Models of all tenants. Every method takes the tenant first; another tenant's model does not exist.

    ``scratch_dir`` is for temporary folders, best on the volume of the storage.
    """

    def __init__(
        self,
        storage: Storage,
        connection: redis.Redis,
        scratch_dir: Path,
    ) -> None:
        self._storage = storage
        self._redis = connection
        self._scratch_dir = scratch_dir
        self._marks = Marks(connection)

    # the next revision

    def stage(self, tenant: str, model: str, path: str, blob: Blob) -> FileEntry:
        """Note an uploaded blob as a file of the next revision, replacing one of the same path."""
        key = staging_key(tenant, model)
        if not self._redis.hexists(key, path) and self._redis.hlen(key) >= MAX_FILES:
            raise TooLarge("too_many_files", f"{model} would have more than {MAX_FILES} files")
        with self._redis.pipeline() as pipe:
            pipe.hset(key, path, json.dumps([blob.sha256, blob.size]))
            pipe.expire(key, STAGING_SECONDS)
            pipe.execute()
        self._hold(tenant, (blob.sha256,))
        return FileEntry(path=path, sha256=blob.sha256, size=blob.size)

    def commit(self, tenant: str, model: str, wanted: Mapping[str, str] | None = None) -> Manifest:
        """Make a revision of the staged files, or of exactly those that are ``wanted``, by path and sha256.

        Raises ``nothing_to_commit``, ``file_not_uploaded`` and every error of opening an adapter; the files
        then stay staged, so that the client can replace the wrong one.
        """
        staged = {
            text(path): text(value) for path, value in self._redis.hgetall(staging_key(tenant, model)).items()
        }
        rows = {path: json.loads(value) for path, value in staged.items()}
        entries = [FileEntry(path=path, sha256=row[0], size=row[1]) for path, row in rows.items()]
        if wanted is not None:
            entries = [self._uploaded(tenant, path, sha256) for path, sha256 in wanted.items()]
            staged = {entry.path: json.dumps([entry.sha256, entry.size]) for entry in entries}
        if not entries:
            raise Conflict(
                "nothing_to_commit",
                f"no file was uploaded for the next revision of {model}",
                remedy="PUT its files first",
            )
        files = tuple(sorted(entries, key=lambda entry: entry.path))
        _refuse_nesting(files)
        revision = revision_of(files)
        manifest = self._load(tenant, model, revision)
        if manifest is None or manifest.format == NO_WEIGHTS:
            manifest = self._create(tenant, model, revision, files)
        elif self._redis.zrevrange(revisions_key(tenant, model), 0, 0) != [revision.encode()]:
            manifest = manifest.model_copy(update={"created_at": now()})  # the newest again
            self._save(tenant, manifest)
        self.index(tenant, manifest)
        arguments = [item for pair in staged.items() for item in pair]
        self._redis.eval(_UNSTAGE, 1, staging_key(tenant, model), *arguments)
        return manifest

    def revise(
        self, tenant: str, model: str, parent: str | None, files: tuple[FileEntry, ...]
    ) -> Manifest | None:
        """Make ``files`` the newest revision if ``parent`` (None: no revision) still is; else None.

        A revision without weights is allowed here; its format is :data:`NO_WEIGHTS`. Raises every error of
        opening an adapter.
        """
        if len(files) > MAX_FILES:
            raise TooLarge("too_many_files", f"{model} would have more than {MAX_FILES} files")
        _refuse_nesting(files)
        revision = revision_of(files)
        manifest = self._load(tenant, model, revision) or self._describe(tenant, model, revision, files)
        with self._redis.lock(f"{revisions_key(tenant, model)}:lock", timeout=_LOCK_SECONDS):
            newest = self._redis.zrevrange(revisions_key(tenant, model), 0, 0, withscores=True)
            if (text(newest[0][0]) if newest else None) != parent:
                return None
            # What came later sorts later, whatever the clocks say.
            moment = max(millis(now()), int(newest[0][1]) + 1 if newest else 0)
            manifest = manifest.model_copy(update={"created_at": at(moment)})
            self._save(tenant, manifest)
            self.index(tenant, manifest)
        return manifest

    def _uploaded(self, tenant: str, path: str, sha256: str) -> FileEntry:
        found = uploaded(self._storage, tenant, path, sha256, sys.maxsize)
        if found is None:
            told = f"{path} with the sha256 {sha256} was not uploaded, or long ago"
            raise Conflict("file_not_uploaded", told, remedy="PUT it first", where={"file": path})
        return found

    def _create(self, tenant: str, model: str, revision: str, files: tuple[FileEntry, ...]) -> Manifest:
        manifest = self._describe(tenant, model, revision, files, weights=True)
        self._save(tenant, manifest)
        return manifest

    def _describe(
        self, tenant: str, model: str, revision: str, files: tuple[FileEntry, ...], *, weights: bool = False
    ) -> Manifest:
        facts: dict[str, Any] = {"format": NO_WEIGHTS, "modules": 0, "rank": 0}
        if weights or any(entry.path.lower().endswith(WEIGHTS) for entry in files):
            with scratch(self._scratch_dir) as root:
                folder = root / model  # an error names it
                self._place(tenant, files, folder, outlines=True)
                facts = (None if weights else inspect_parts(folder, model)) or inspect(folder, model)
        return Manifest(model=model, revision=revision, created_at=now(), files=files, **facts)

    def _save(self, tenant: str, manifest: Manifest) -> None:
        key = manifest_key(tenant, manifest.model, manifest.revision)
        new = self._storage.size(key) is None
        self._storage.put_json(key, manifest.model_dump(mode="json"))
        try:
            self._hold(tenant, [entry.sha256 for entry in manifest.files])
        except Unavailable:
            if new:
                self._storage.delete(key)
            raise

    def _hold(self, tenant: str, digests: Sequence[str]) -> None:
        """Keep content that is referred to as of now. Raises ``content_collected`` if that is too late."""
        late = self._marks.spare(tenant, digests)
        if late or any(self._storage.size(blob_key(tenant, digest)) is None for digest in digests):
            raise Unavailable(
                "content_collected",
                "the same content was not referred to for long and has just been removed",
                remedy="Send the file again",
            )

    def index(self, tenant: str, manifest: Manifest) -> None:
        """Enter a revision into the order of revisions and its model into that of models."""
        score = millis(manifest.created_at)
        with self._redis.pipeline() as pipe:
            pipe.zadd(revisions_key(tenant, manifest.model), {manifest.revision: score})
            pipe.zadd(models_key(tenant), {manifest.model: score}, gt=True)
            pipe.execute()

    # what there is

    def models(self, tenant: str, *, limit: int, cursor: str | None) -> tuple[list[Manifest], str | None]:
        """The newest revision of each model, the model committed last first, and the next cursor."""
        names, following = page(self._redis, models_key(tenant), limit=limit, cursor=cursor)
        return [found for name in names if (found := self._newest(tenant, name))], following

    def revisions(
        self, tenant: str, model: str, *, limit: int, cursor: str | None
    ) -> tuple[list[Manifest], str | None]:
        """The revisions of a model, the newest first. Raises ``model_not_found``."""
        found, following = page(self._redis, revisions_key(tenant, model), limit=limit, cursor=cursor)
        if not found and cursor is None:
            raise _missing(model)
        manifests = [self._load(tenant, model, revision) for revision in found]
        return [manifest for manifest in manifests if manifest], following

    def manifest(self, tenant: str, reference: Reference) -> Manifest:
        """The manifest of a revision, by default the newest: ``model_not_found``, ``revision_not_found``."""
        if reference.revision is None:
            newest = self._newest(tenant, reference.model)
            if newest is None:
                raise _missing(reference.model)
            return newest
        found = self._load(tenant, reference.model, reference.revision)
        if found is None:
            raise NotFound(
                "revision_not_found",
                f"there is no revision {reference.revision} of {reference.model}",
                where={"model": reference.model},
            )
        return found

    def delete(self, tenant: str, reference: Reference) -> None:
        """Remove one revision, or the model with all of its revisions.

        The blobs stay until nothing refers to them and they are collected.
        """
        model = reference.model
        if reference.revision is not None:
            gone = [self.manifest(tenant, reference).revision]
        else:
            gone = [text(item) for item in self._redis.zrange(revisions_key(tenant, model), 0, -1)]
            if not gone:
                raise _missing(model)
        for revision in gone:
            self._storage.delete(manifest_key(tenant, model, revision))
        with self._redis.pipeline() as pipe:
            pipe.zrem(revisions_key(tenant, model), *gone)
            pipe.exists(revisions_key(tenant, model))
            left = pipe.execute()[-1]
        if not left:
            self._redis.zrem(models_key(tenant), model)

    def place(self, tenant: str, manifest: Manifest, folder: Path, *, outlines: bool = False) -> None:
        """Bring the files of a revision into a folder, as links where possible; they are read-only.

        With ``outlines`` the weights of whole models may be there by their headers only.
        """
        self._place(tenant, manifest.files, folder, outlines=outlines)

    def outlined(self, manifest: Manifest) -> list[str]:
        """The files that :meth:`place` brings by their headers only, if it may."""
        paths = [entry.path for entry in manifest.files]
        return [path for path in paths if can_be_outlined(self._storage, paths, path)]

    def fetch(self, tenant: str, manifest: Manifest, path: str, folder: Path) -> None:
        """Bring one file of a revision, in place of its outline."""
        (folder / path).unlink(missing_ok=True)
        self._place(tenant, tuple(entry for entry in manifest.files if entry.path == path), folder)

    def _place(
        self, tenant: str, files: tuple[FileEntry, ...], folder: Path, *, outlines: bool = False
    ) -> None:
        paths = [entry.path for entry in files]
        for entry in files:
            key, target = blob_key(tenant, entry.sha256), folder / entry.path
            try:
                if outlines and can_be_outlined(self._storage, paths, entry.path):
                    outline(self._storage, key, entry.size, target)
                else:
                    self._storage.fetch(key, target)
            except FileNotFoundError as error:
                raise MergeFailure(
                    "content_missing",
                    f"the content of {entry.path} is gone from the storage",
                    remedy="Upload the file again",
                    where={"file": entry.path},
                ) from error

    def _newest(self, tenant: str, model: str) -> Manifest | None:
        found = self._redis.zrevrange(revisions_key(tenant, model), 0, 0)
        return self._load(tenant, model, text(found[0])) if found else None

    def _load(self, tenant: str, model: str, revision: str) -> Manifest | None:
        data = self._storage.get_json(manifest_key(tenant, model, revision))
        return None if data is None else Manifest.model_validate(data)


def _refuse_nesting(files: tuple[FileEntry, ...]) -> None:
    paths = [entry.path for entry in files]
    for path in paths:
        inside = next((other for other in paths if other.startswith(f"{path}/")), None)
        if inside:
            raise Conflict(
                "path_conflict",
                f"{path} is a file and, in {inside}, a folder",
                where={"file": path},
            )


def _missing(model: str) -> NotFound:
    return NotFound("model_not_found", f"there is no model {model}", where={"model": model})
