"""Remove from the storage what nothing refers to.

Safe beside a running service. Nothing younger than the grace period is touched, which protects what is on
its way. For older content see :mod:`service.marks`. For attempts of merges it is enough that they are listed
before the merge is looked at: a merge that has ended never changes again, and one that has not is left alone.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import redis

from service.broker import merges_key, text
from service.bulk import documents
from service.documents import Manifest
from service.jobs import Jobs
from service.marks import Marks
from service.quota import Reservations
from service.storage import Entry, Storage
from service.storage.blobs import BLOBS, STAGING

GRACE_SECONDS = 24 * 3600.0
"""As long as staged files of a next revision are kept."""

_BATCH = 200
_PARTIAL = re.compile(r"#\d+$")
_log = logging.getLogger("merganser.collect")


class Stopped(Exception):
    """The process is to end; the rest is collected another time."""


@dataclass
class Collected:
    """What was removed, or would be: objects and bytes by kind; the tenants whose counters were set right."""

    objects: dict[str, int] = field(default_factory=dict)
    size: dict[str, int] = field(default_factory=dict)
    corrected: list[str] = field(default_factory=list)

    def count(self, kind: str, entries: Iterable[Entry]) -> None:
        """Add entries of a kind."""
        for entry in entries:
            self.objects[kind] = self.objects.get(kind, 0) + 1
            self.size[kind] = self.size.get(kind, 0) + entry.size


class Collector:
    """One collection over all tenants. ``dry``: only tell."""

    def __init__(
        self,
        storage: Storage,
        connection: redis.Redis,
        *,
        grace: float = GRACE_SECONDS,
        dry: bool = False,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._storage = storage
        self._redis = connection
        self._jobs = Jobs(connection, storage)
        self._marks = Marks(connection)
        self._counters = Reservations(connection, 0)
        self._before = time.time() - grace
        self._dry = dry
        self._stopping = stopping
        self._found = Collected()

    def run(self) -> Collected:
        """Collect, and tell what was removed."""
        self._partial_files()
        tenants = sorted(
            {name for prefix in (BLOBS, STAGING, "merges") for name in self._storage.folders(prefix)}
        )
        for tenant in tenants:
            self._heed()
            seen = self._counters.used(tenant)
            self._staging(tenant)
            stored = self._blobs(tenant) + self._attempts(tenant)
            if not self._dry and self._counters.correct(tenant, stored, seen=seen):
                if self._counters.used(tenant) != seen:
                    self._found.corrected.append(tenant)
            elif not self._dry:
                _log.info("the counter of %s changed meanwhile; it is corrected another time", tenant)
        return self._found

    def _heed(self) -> None:
        """Nothing is half done between any two steps, so this may end the collection anywhere."""
        if self._stopping():
            raise Stopped

    def _old(self, entries: Iterable[Entry]) -> list[Entry]:
        return [entry for entry in entries if entry.modified < self._before]

    def _remove(self, kind: str, entries: list[Entry]) -> None:
        self._found.count(kind, entries)
        if not self._dry:
            self._storage.delete(*(entry.key for entry in entries))

    def _partial_files(self) -> None:
        """What a killed process left of files that were being written to a folder."""
        root = self._storage.root
        if root is None:
            return
        for path in sorted(root.rglob("*#*")):
            stat = path.stat() if _PARTIAL.search(path.name) and path.is_file() else None
            if stat is not None and stat.st_mtime < self._before:
                self._found.count("partial", [Entry(path.name, stat.st_size, stat.st_mtime)])
                if not self._dry:
                    path.unlink(missing_ok=True)

    def _staging(self, tenant: str) -> None:
        """Uploads that broke off; parts of upload sessions stay as long as their session."""
        old = self._old(self._storage.entries(f"{STAGING}/{tenant}"))
        sessions: dict[str, bool] = {}
        lost = []
        for entry in old:
            name = entry.key.split("/")[2]
            if name not in sessions:
                sessions[name] = self._storage.size(f"uploads/{tenant}/{name}.json") is not None
            if not sessions[name]:
                lost.append(entry)
        self._remove("staging", lost)

    # blobs

    def _blobs(self, tenant: str) -> int:
        """Remove blobs that nothing refers to; the bytes of those that stay."""
        every = self._storage.entries(f"{BLOBS}/{tenant}")
        total = sum(entry.size for entry in every)
        referred = self._references(tenant)  # a first look, so that little has to be marked
        lost = {
            digest: entry
            for entry in self._old(every)
            if (digest := entry.key.rpartition("/")[2]) not in referred
        }
        if not lost:
            return total
        if self._dry:
            self._found.count("blobs", lost.values())
            return total
        self._marks.mark(tenant, list(lost))
        referred = self._references(tenant)
        self._marks.forget(tenant, [digest for digest in lost if digest in referred])
        digests = [digest for digest in lost if digest not in referred]
        for start in range(0, len(digests), _BATCH):
            self._heed()
            condemned = self._marks.condemn(tenant, digests[start : start + _BATCH])
            self._remove("blobs", [lost[digest] for digest in condemned])
            self._marks.forget(tenant, condemned)
            total -= sum(lost[digest].size for digest in condemned)
        return total

    def _references(self, tenant: str) -> set[str]:
        """Digests that staged files and revisions name. In this order: a commit writes before it unstages."""
        found: set[str] = set()
        for key in self._redis.scan_iter(f"mg:{tenant}:staging:*", count=1000):
            found.update(_digest(text(value)) for value in self._redis.hvals(key))
        manifests = (key for key, _ in self._storage.keys(f"models/{tenant}"))
        for _, document in documents(self._storage, manifests):
            self._heed()
            found.update(entry.sha256 for entry in Manifest.model_validate(document).files)
        return found

    # attempts

    def _attempts(self, tenant: str) -> int:
        """Remove attempts that are not the published one; the bytes of results that stay."""
        merges: dict[str, dict[str, list[Entry]]] = {}
        for entry in self._storage.entries(f"merges/{tenant}"):
            parts = entry.key.split("/")
            if len(parts) > 5 and parts[3] == "attempts":
                merges.setdefault(parts[2], {}).setdefault(parts[4], []).append(entry)
        succeeded = {text(item) for item in self._redis.zrange(merges_key(tenant, "succeeded"), 0, -1)}
        stay = 0
        for merge_id, attempts in merges.items():
            self._heed()
            if merge_id in succeeded and len(attempts) == 1:
                stay += sum(entry.size for entry in next(iter(attempts.values())))
                continue
            record = self._jobs.find(tenant, merge_id)
            if record is not None and not record.ended:
                continue  # not counted before it is published
            published = record.result.attempt if record and record.result else None
            stay += sum(entry.size for entry in attempts.pop(published or "", []))
            for entries in attempts.values():
                self._remove("attempts", self._old(entries))
        return stay


def _digest(staged: str) -> str:
    """The digest in a staged file's entry, a JSON list of digest and size."""
    return staged[2:66]
