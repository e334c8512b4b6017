"""What request handlers depend on. Everything is made once per app and reached through here."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Annotated

import redis
from fastapi import Depends, Query, Request
from redis.asyncio import Redis as AsyncRedis

from service.broker import connect, connect_async
from service.jobs import Jobs
from service.quota import Quota
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
    quota: Quota
    closing: asyncio.Event = field(default_factory=asyncio.Event)

    @classmethod
    def open(cls, settings: Settings) -> Services:
        """Connect everything. Nothing is read or written yet."""
        connection = connect(settings)
        storage = Storage.open(settings.storage_location)
        jobs = Jobs(connection, storage)
        registry = Registry(storage, connection, settings.scratch_dir)
        sources = Sources(registry, jobs, storage)
        events = connect_async(settings)
        quota = Quota(events, settings.max_tenant_bytes)
        return cls(settings, connection, events, storage, registry, jobs, sources, quota)

    async def close(self) -> None:
        """Give the connections back."""
        self.closing.set()
        await self.events.aclose()
        self.redis.close()


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
