"""An event stream ends after a while although its merge goes on, and is resumed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest
import redis

from service.app import create_app
from service.embedded_redis import EmbeddedRedis
from service.jobs import Jobs
from service.routers import events
from service.settings import Settings
from service.storage import Storage
from tests.redis_server import RECIPE


def test_a_stream_does_not_live_for_ever(
    redis_server: EmbeddedRedis, connection: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "_LIFE_SECONDS", 0.5)
    settings = Settings(redis_url=redis_server.url, data_dir=tmp_path, auth="off")
    storage = Storage.open(settings.storage_location)
    merge = Jobs(connection, storage).create("local", RECIPE)

    async def main() -> str:
        app = create_app(settings)
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://localhost") as http,
        ):
            answer = await asyncio.wait_for(http.get(f"/v1/merges/{merge.id}/events"), 10)
            assert app.state.services.fanout.listening == 0
            return answer.text

    text = asyncio.run(main())
    assert '"queued"' in text
    assert text.count("event:") == 1
