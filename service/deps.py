"""What request handlers depend on. Everything is made once per app and reached through here."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from typing import Annotated

import redis
from fastapi import Depends, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from redis.asyncio import Redis as AsyncRedis

from service.auth import ANYONE, FIRST_KEY, Keys, Principal, Scope
from service.broker import connect, connect_async
from service.errors import Forbidden, Unauthorized, Unavailable
from service.fanout import Fanout
from service.idempotency import Idempotency
from service.jobs import Jobs
from service.limits import Limits
from service.pushes import Pushes
from service.quota import Quota
from service.registry import Registry
from service.remote.references import Hubs
from service.settings import Settings
from service.signing import Signer
from service.sources import Sources
from service.storage import Storage
from service.uploads import Uploads
from service.webhooks.deliver import Deliverer
from service.webhooks.deliveries import Deliveries
from service.webhooks.endpoints import Endpoints
from service.webhooks.guard import Allowed
from service.webhooks.outbox import Outbox

_log = logging.getLogger("merganser.api")


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
    hubs: Hubs
    pushes: Pushes
    quota: Quota
    keys: Keys
    idempotency: Idempotency
    limits: Limits
    fanout: Fanout
    signer: Signer
    uploads: Uploads
    webhooks: Endpoints
    deliveries: Deliveries
    webhook_allowed: Allowed
    closing: asyncio.Event

    @classmethod
    def open(cls, settings: Settings) -> Services:
        """Connect everything. Nothing is read or written yet."""
        connection = connect(settings)
        storage = Storage.open(settings.storage_location, keep_free=settings.min_free_bytes)
        jobs = Jobs(connection, storage)
        registry = Registry(storage, connection, settings.scratch_dir)
        hubs = Hubs.of(settings)
        sources = Sources(registry, jobs, storage, hubs, import_limit=settings.max_upload_bytes)
        events = connect_async(settings)
        quota = Quota(events, settings.max_tenant_bytes, storage)
        keys = Keys(storage)
        closing = asyncio.Event()
        return cls(
            settings=settings,
            redis=connection,
            events=events,
            storage=storage,
            registry=registry,
            jobs=jobs,
            sources=sources,
            hubs=hubs,
            pushes=Pushes(connection, jobs),
            quota=quota,
            keys=keys,
            idempotency=Idempotency(events),
            limits=Limits(events, read=settings.reads_per_minute, write=settings.writes_per_minute),
            fanout=Fanout(events, closing),
            signer=Signer(connection),
            uploads=Uploads(
                storage,
                connection,
                events,
                registry,
                tenant_limit=settings.max_tenant_bytes,
                file_limit=settings.max_upload_bytes,
                seconds=settings.upload_seconds,
            ),
            webhooks=Endpoints(storage),
            deliveries=Deliveries(connection),
            webhook_allowed=Allowed.parse(settings.webhook_allow),
            closing=closing,
        )

    def welcome(self) -> None:
        """Say how to make the first key, if there is none and one is needed."""
        with contextlib.suppress(Unavailable):
            if self.settings.auth == "keys" and not self.keys.exist():
                _log.warning("nobody has a key to this service. %s", FIRST_KEY)

    def deliverer(self) -> Deliverer:
        """The loop that sends webhooks."""
        return Deliverer(self.webhooks, self.deliveries, Outbox(self.storage), self.webhook_allowed)

    async def close(self) -> None:
        """Give the connections back."""
        self.closing.set()
        await self.events.aclose()
        self.redis.close()


def services(request: Request) -> Services:
    """The app's parts."""
    found: Services = request.app.state.services
    return found


ServicesDep = Annotated[Services, Depends(services)]
bearer = HTTPBearer(
    auto_error=False, scheme_name="key", description="A key of `merganser keys create`: `mk_...`"
)


async def principal(
    request: Request,
    services: ServicesDep,
    given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
) -> Principal:
    """Who sent the request. Raises ``key_missing``, ``key_invalid``, ``rate_limited``."""
    if services.settings.auth == "off":
        return ANYONE
    if given is None:
        some = await run_in_threadpool(services.keys.exist)
        remedy = "Send the header Authorization: Bearer mk_..." if some else FIRST_KEY
        raise Unauthorized("key_missing", "this service needs a key", remedy=remedy)
    known, found = services.keys.cached(given.credentials)
    if not known:
        found = await run_in_threadpool(services.keys.identify, given.credentials)
    if found is None:
        raise Unauthorized("key_invalid", "the key is unknown or was revoked")
    request.state.tenant = found.tenant
    looking = request.method in ("GET", "HEAD")
    request.state.rate_headers = await services.limits.take(found.tenant, "read" if looking else "write")
    return found


PrincipalDep = Annotated[Principal, Depends(principal)]


def demand(found: Principal, scope: Scope) -> str:
    """The tenant of someone who holds a scope. Raises ``scope_missing``."""
    if not found.may(scope):
        raise Forbidden("scope_missing", f"the key does not have the scope {scope!r}")
    return found.tenant


def tenant(request: Request, found: PrincipalDep) -> str:
    """The tenant of the request: looking needs the scope ``read``, everything else ``write``."""
    return demand(found, "read" if request.method in ("GET", "HEAD") else "write")


def reader(found: PrincipalDep) -> str:
    """The tenant of a request that changes nothing, whatever its method."""
    return demand(found, "read")


def administrator(found: PrincipalDep) -> str:
    """The tenant of a request that needs the scope ``admin``."""
    return demand(found, "admin")


TenantDep = Annotated[str, Depends(tenant)]
ReaderDep = Annotated[str, Depends(reader)]
AdminDep = Annotated[str, Depends(administrator)]
Limit = Annotated[int, Query(ge=1, le=200, description="Most items of a page")]
Cursor = Annotated[
    str | None, Query(max_length=1024, description="`next_cursor` of the page before, unchanged")
]
