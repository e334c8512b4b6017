"""The split deployment: a Redis, an API and workers, each a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from adapters import write_adapter

from service.client import Client
from service.embedded_redis import EmbeddedRedis
from service.serve import listen
from service.settings import load_settings
from tests.running import ROOT, alive, descendants, push, until


@pytest.fixture
def environment(redis_server: EmbeddedRedis, tmp_path: Path) -> dict[str, str]:
    with listen(load_settings(port=0)) as probe:
        port = probe.getsockname()[1]
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "MERGANSER_REDIS_URL": redis_server.url.replace("db=0", "db=1"),
        "MERGANSER_STORAGE_URL": (tmp_path / "objects").as_uri(),
        "MERGANSER_DATA_DIR": str(tmp_path / "data"),
        "MERGANSER_DEVICES": "cpu,cpu",
        "MERGANSER_PORT": str(port),
    }


@pytest.fixture
def processes(environment: dict[str, str], tmp_path: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    with (tmp_path / "log").open("wb") as log:
        running = [
            subprocess.Popen(
                [sys.executable, "-m", *command], env=environment, cwd=tmp_path, stdout=log, stderr=log
            )
            for command in (("service", "serve"), ("workers", "worker"))
        ]
    yield running
    for process in running:
        process.kill()
        process.wait()


def ready(client: Client) -> bool:
    try:
        return bool(client._call("GET", "/readyz").json()["workers"] == 2)
    except Exception:
        return False


def test_a_merge_runs_and_each_process_ends_in_order(
    processes: list[subprocess.Popen[bytes]], environment: dict[str, str], tmp_path: Path
) -> None:
    with Client(f"http://127.0.0.1:{environment['MERGANSER_PORT']}") as client:
        until(lambda: ready(client), what="API and both workers are there")
        names = [push(client, write_adapter(tmp_path / str(i), seed=i), f"split/m{i}") for i in range(2)]
        recipe = {"merge_method": "linear", "models": [{"model": name} for name in names]}
        ids = [client.submit(recipe)["id"] for _ in range(3)]
        results = [client.wait(merge_id) for merge_id in ids]
    assert [done["state"] for done in results] == ["succeeded"] * 3
    assert len({str(done["result"]["files"]) for done in results}) == 1
    for process in processes:
        family = descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, (tmp_path / "log").read_text()
        assert not any(alive(pid) for pid in family)
