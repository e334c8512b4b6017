"""What request handlers depend on. Everything is made once per app and reached through here."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import redis
from fastapi import Depends, Query, Request
from redis.asyncio import Redis as AsyncRedis

from service.broker import connect, connect_async
from service.jobs import Jobs
from service.registry import Registry
from service.settings import LOCAL_TENANT, Settings
from service.sources import Sources
from service.storage import Storage


@dataclass
class Services:
    """The parts of one running API."""

    settings: Settings
    redis: redis.Redis
    events: AsyncRedis
    storage: Storage
    registry: Registry
    jobs: Jobs
    sources: Sources
    closing: asyncio.Event = field(default_factory=asyncio.Event)

    @classmethod
    def open(cls, settings: Settings) -> Services:
        """Connect everything. Nothing is read or written yet."""
        connection = connect(settings)
        storage = Storage.open(settings.storage_location)
        jobs = Jobs(connection, storage)
        registry = Registry(storage, connection, lambda: workplace(settings))
        sources = Sources(registry, jobs, storage)
        return cls(settings, connection, connect_async(settings), storage, registry, jobs, sources)

    async def close(self) -> None:
        """Give the connections back."""
        self.closing.set()
        await self.events.aclose()
        self.redis.close()


@contextmanager
def workplace(settings: Settings) -> Iterator[Path]:
    """A fresh private folder on the data volume, removed afterwards."""
    settings.scratch_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="check-", dir=settings.scratch_dir))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def services(request: Request) -> Services:
    """The app's parts."""
    found: Services = request.app.state.services
    return found


def tenant() -> str:
    """The tenant of the request. Without keys there is one."""
    return LOCAL_TENANT


ServicesDep = Annotated[Services, Depends(services)]
TenantDep = Annotated[str, Depends(tenant)]
Limit = Annotated[int, Query(ge=1, le=200, description="Most items of a page")]
Cursor = Annotated[
    str | None, Query(max_length=1024, description="`next_cursor` of the page before, unchanged")
]
