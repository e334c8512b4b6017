"""One running service, shared by the tests of a process, and two adapters in it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from adapters import write_adapter

from service.client import Client
from tests.redis_server import connection, jobs, redis_server, storage  # noqa: F401 (fixtures)
from tests.running import Up, push
from tests.seaweed import seaweed  # noqa: F401 (fixture)


@pytest.fixture(scope="session")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """`merganser up`: Redis, API and one worker."""
    running = Up(tmp_path_factory.mktemp("up"), max_upload_bytes=str(8 << 20))
    yield running
    assert running.stop() == 0, running.log()


@pytest.fixture
def http(up: Up) -> httpx.Client:
    return up.http


@pytest.fixture
def client(up: Up) -> Iterator[Client]:
    with up.client() as client:
        yield client


_seeds = itertools.count(1)


@dataclass(frozen=True)
class Pair:
    """Two adapters in the service and on disk."""

    folders: tuple[Path, Path]
    models: tuple[str, str]

    def recipe(self, **more: Any) -> dict[str, Any]:
        """A recipe that merges the two, and was never asked for before."""
        models = [{"model": name} for name in self.models]
        return {"merge_method": "linear", "models": models, "seed": next(_seeds), **more}


@pytest.fixture(scope="session")
def pair(up: Up, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    root = tmp_path_factory.mktemp("adapters")
    first, second = write_adapter(root / "a", seed=1), write_adapter(root / "b", seed=2)
    with up.client() as client:
        return Pair((first, second), (push(client, first, "pair/a"), push(client, second, "pair/b")))


@pytest.fixture(scope="session")
def merged(up: Up, pair: Pair) -> dict[str, Any]:
    """A merge of the pair that succeeded."""
    with up.client() as client:
        done = client.wait(client.submit(pair.recipe(), name="fixture")["id"])
    assert done["state"] == "succeeded", done
    return done
