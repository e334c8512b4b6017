"""What every job opens first: the settings of its process, Redis, the storage, and what recipes may name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import redis

from service.broker import connect
from service.jobs import Jobs
from service.pushes import Pushes
from service.quota import Reservations
from service.registry import Registry
from service.remote.references import Hubs
from service.settings import Settings, load_settings
from service.sources import Sources
from service.storage import Storage


@dataclass(frozen=True)
class Workplace:
    """The connections of one job."""

    settings: Settings
    redis: redis.Redis
    storage: Storage
    jobs: Jobs
    sources: Sources
    pushes: Pushes
    room: Reservations

    @classmethod
    def open(cls) -> Self:
        """By the environment; patient with a Redis or a storage that is away for a moment."""
        settings = load_settings()
        connection = connect(settings, patient=True)
        storage = Storage.open(settings.storage_location, patient=True, keep_free=settings.min_free_bytes)
        room = Reservations(connection, settings.max_tenant_bytes)
        jobs = Jobs(connection, storage)
        registry = Registry(storage, connection, settings.scratch_dir)
        limit = settings.max_upload_bytes
        sources = Sources(registry, jobs, storage, Hubs.of(settings), import_limit=limit)
        return cls(settings, connection, storage, jobs, sources, Pushes(connection, jobs), room)
