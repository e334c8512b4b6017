"""What must be done now and then, by whichever supervisor comes first.

An index that is gone is rebuilt at once, and what was deleted is deleted again after a while. Merges that
are too old are deleted every hour, upload sessions that have expired every ten minutes, and what nothing
refers to is collected as often as the settings say.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time

import redis

from service.clock import now
from service.collect import Collector, Stopped
from service.jobs import Jobs
from service.reindex import Reindexer
from service.retention import Retention
from service.settings import Settings
from service.storage import Storage
from service.uploads import expired

_RETENTION_SECONDS = 3600
_UPLOADS_SECONDS = 600
_log = logging.getLogger("merganser.housekeeper")


class Housekeeper:
    """Looks after one storage and its Redis. ``sweep`` may run in any number of processes at once."""

    def __init__(self, settings: Settings, connection: redis.Redis, storage: Storage) -> None:
        self._collect_seconds = round(settings.collect_hours * 3600)
        self._stopping = threading.Event()
        self._redis = connection
        self._storage = storage
        self._jobs = Jobs(connection, storage)
        self._retention = Retention(storage, connection, settings.results_days)

    def sweep(self) -> None:
        """Do what is due."""
        reindexer = Reindexer(self._storage, self._redis)
        if reindexer.needed() and reindexer.run() is None:
            return  # another process is at it
        self._jobs.complete_deletions()
        if self._due("uploads", _UPLOADS_SECONDS):
            self._tell("expired uploads removed", expired(self._storage, self._redis, time.time()))
        if self._due("retention", _RETENTION_SECONDS):
            self._tell("old merges deleted", self._retention.sweep())
        if self._collect_seconds and self._due("collect", self._collect_seconds):
            collector = Collector(self._storage, self._redis, stopping=self._stopping.is_set)
            with contextlib.suppress(Stopped):
                self._tell("objects collected", collector.run().objects)

    def stop(self) -> None:
        """Let a long sweep end soon."""
        self._stopping.set()

    def _due(self, name: str, seconds: int) -> bool:
        return bool(self._redis.set(f"mg:housekeeping:{name}", now(), nx=True, ex=seconds))

    def _tell(self, what: str, found: object) -> None:
        if found:
            _log.info("%s: %s", what, found)
