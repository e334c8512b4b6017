"""A service of its own for each test that kills something, and a merge that takes long enough for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from adapters import write_adapter

from service.client import Client
from tests.redis_server import connection, jobs, redis_server, storage  # noqa: F401 (fixtures)
from tests.running import Up, push
from tests.seaweed import seaweed  # noqa: F401 (fixture)
from tests.workers.split import Split

MODULES = {f"layers.{i}.q_proj": (640 + 8 * i, 640) for i in range(12)}
"""No two modules have the same shape, so the engine reports after each of them."""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    """Starts `merganser up` with settings of the test's choice; whatever is left is stopped."""
    running: list[Up] = []

    def start(**settings: str) -> Up:
        running.append(Up(tmp_path / "data", **settings))
        return running[-1]

    yield start
    for up in running:
        up.stop()


@pytest.fixture
def split(tmp_path: Path) -> Iterator[Callable[..., Split]]:
    """Starts the Redis of a split deployment with settings of the test's choice."""
    made: list[Split] = []

    def split(**settings: str) -> Split:
        made.append(Split(tmp_path, **settings))
        return made[-1]

    yield split
    for deployment in made:
        deployment.stop()


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three adapters whose TIES merge in full space takes seconds."""
    root = tmp_path_factory.mktemp("large")
    return [write_adapter(root / str(seed), seed=seed, rank=16, modules=MODULES) for seed in range(3)]


@pytest.fixture(scope="session")
def middling(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same, but it takes a second or two."""
    root = tmp_path_factory.mktemp("middling")
    some = dict(list(MODULES.items())[:8])
    return [write_adapter(root / str(seed), seed=seed, rank=8, modules=some) for seed in range(2)]


def submit_slow(client: Client, folders: list[Path]) -> str:
    """Request the slow merge; its id."""
    models = [{"model": push(client, folder, f"slow/m{i}")} for i, folder in enumerate(folders)]
    recipe: dict[str, Any] = {
        "merge_method": "ties",
        "space": "full",
        "models": models,
        "parameters": {"density": 0.3},
        "output": {"rank": 16},
    }
    return str(client.submit(recipe, fresh=True)["id"])


def in_the_middle(client: Client, merge_id: str) -> str:
    """Wait until the engine has reported a part of its work; the id of that event."""
    for event_id, kind, data in client.events(merge_id):
        assert data.get("state") in (None, "queued", "running"), data
        if kind == "progress" and 0 < data["progress"] < 0.9:
            return event_id
    raise AssertionError("the merge ended before its middle")
