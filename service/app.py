"""The API as one ASGI application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from merging import __version__
from service import handlers, openapi
from service.deps import Services
from service.gates import BODY_LIMIT, HostGate, LengthGate
from service.hub import lfs as hub_lfs
from service.hub import router as hub
from service.hub import writing as hub_writing
from service.routers import (
    events,
    health,
    keys,
    merges,
    methods,
    metrics,
    models,
    pages,
    pushes,
    uploads,
    webhooks,
)
from service.settings import Settings
from service.telemetry import RequestCounts, Telemetry


def create_app(settings: Settings) -> FastAPI:
    """The application for these settings. Nothing is connected before it starts."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        services = Services.open(settings)
        app.state.services = services
        await asyncio.to_thread(services.welcome)
        sender = asyncio.create_task(services.deliverer().run(services.closing))
        try:
            yield
        finally:
            services.closing.set()
            await asyncio.gather(sender, return_exceptions=True)
            await services.close()

    app = FastAPI(
        title="Merganser",
        version=__version__,
        summary="Merge LoRA adapters over HTTP.",
        description=openapi.DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
        redirect_slashes=False,
    )
    handlers.install(app)
    app.add_middleware(LengthGate, limit=BODY_LIMIT)
    if settings.auth == "off":
        app.add_middleware(HostGate, settings=settings)
    hubs = (hub, hub_writing, hub_lfs)
    for module in (
        models,
        uploads,
        merges,
        pushes,
        events,
        webhooks,
        methods,
        keys,
        metrics,
        health,
        pages,
        *hubs,
    ):
        app.include_router(module.router)
    app.state.counts = RequestCounts()
    app.add_middleware(Telemetry, counts=app.state.counts)  # the last one added is the outermost
    app.webhooks.include_router(webhooks.messages)
    openapi.customise(app)
    return app
