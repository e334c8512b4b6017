"""Is the process alive, and can it do its work?"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from merging import __version__
from service.broker import TRANSIENT
from service.deps import ServicesDep
from service.errors import Unavailable

router = APIRouter(tags=["health"])


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok", "version": __version__}


@router.get("/readyz")
def readyz(services: ServicesDep) -> dict[str, Any]:
    """Redis and the storage answer; also how many workers are registered."""
    try:
        names = sorted(services.redis.smembers("rq:workers"))
        alive = sum(bool(services.redis.exists(name)) for name in names)
    except TRANSIENT as error:
        raise Unavailable("redis_unavailable", "the job store cannot be reached") from error
    services.storage.check()
    return {"status": "ready", "workers": alive}
