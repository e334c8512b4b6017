"""Whatever is killed in the middle of a merge: the merge finishes, its result is published once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.client import Client
from tests.running import Up, alive, descendants, until
from tests.workers.conftest import in_the_middle, submit_slow

pytestmark = pytest.mark.slow


def finished_once(up: Up, client: Client, merge_id: str, *attempts: int) -> dict[str, Any]:
    """The merge, after a look at everything that must exist exactly once."""
    done = client.wait(merge_id)
    assert done["state"] == "succeeded", done
    assert done["attempts"] in attempts
    states = [data["state"] for _, kind, data in client.events(merge_id) if kind == "state"]
    assert states == ["queued", *["running"] * done["attempts"], "succeeded"]
    folder = up.storage / "merges" / "local" / merge_id / "attempts"
    until(lambda: len(list(folder.iterdir())) >= 1, what="the result is stored")
    with_files = [path for path in folder.iterdir() if any(file.is_file() for file in path.rglob("*"))]
    assert len(with_files) == 1
    return done


def nothing_in_hand(up: Up) -> bool:
    """Whether no queue, no list on the way and no registry holds a job, and no scratch folder is left."""
    with up.redis() as redis:
        keys = ("rq:queue:merges", "rq:queue:merges:intermediate", "rq:wip:merges", "mg:active", "mg:unsaved")
        return not any(redis.exists(key) for key in keys) and not any((up.data / "scratch").iterdir())


def test_a_killed_worker(start: Callable[..., Up], large: list[Path]) -> None:
    up = start()
    with up.client() as client:
        merge_id = submit_slow(client, large)
        in_the_middle(client, merge_id)
        horse = up.horse()
        killed = time.monotonic()
        os.kill(up.pid_of("workers.process"), signal.SIGKILL)
        until(lambda: not alive(horse), what="the work-horse dies with its worker", patience=1)
        until(lambda: client.merge(merge_id)["attempts"] == 2, what="the merge starts again", patience=10)
        assert time.monotonic() - killed < 10
        finished_once(up, client, merge_id, 2)
        until(lambda: nothing_in_hand(up), what="nothing is left over", patience=15)


def test_a_killed_work_horse(start: Callable[..., Up], large: list[Path]) -> None:
    up = start()
    with up.client() as client:
        merge_id = submit_slow(client, large)
        in_the_middle(client, merge_id)
        os.kill(up.horse(), signal.SIGKILL)
        finished_once(up, client, merge_id, 2)
        until(lambda: nothing_in_hand(up), what="nothing is left over", patience=15)


def test_a_killed_redis(start: Callable[..., Up], large: list[Path]) -> None:
    up = start()
    with up.client() as client:
        merge_id = submit_slow(client, large)
        in_the_middle(client, merge_id)
        os.kill(up.pid_of("redis.sock"), signal.SIGKILL)
        assert client.wait(merge_id)["attempts"] == 1
        finished_once(up, client, merge_id, 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_the_end_of_the_parent_takes_everything_along_and_the_next_start_goes_on(
    start: Callable[..., Up], large: list[Path], number: signal.Signals
) -> None:
    up = start()
    with up.client() as client:
        merge_id = submit_slow(client, large)
        in_the_middle(client, merge_id)
    family = descendants(up.process.pid)
    assert len(family) >= 3  # redis, worker, work-horse
    up.process.send_signal(number)
    status = up.process.wait(15)
    assert status == (0 if number is signal.SIGTERM else -signal.SIGKILL), up.log()
    until(lambda: not any(alive(pid) for pid in family), what="no process is left", patience=5)
    if number is signal.SIGTERM:
        assert not up.state.exists()
    up.start()
    with up.client() as client:
        # an orderly end leaves a merge two seconds, which may be enough for it
        finished_once(up, client, merge_id, *((1, 2) if number is signal.SIGTERM else (2,)))


def test_open_event_streams_do_not_hold_up_the_end(start: Callable[..., Up], large: list[Path]) -> None:
    up = start()
    with up.client() as client:
        merge_id = submit_slow(client, large)
        with httpx.stream("GET", f"{up.url}/v1/merges/{merge_id}/events", timeout=30) as response:
            next(response.iter_lines())
            asked = time.monotonic()
            up.process.terminate()
            assert up.process.wait(10) == 0
            assert time.monotonic() - asked < 8


def test_two_at_once_in_one_folder_are_refused(start: Callable[..., Up]) -> None:
    up = start()
    second = subprocess.run(
        [sys.executable, "-m", "workers", "up"],
        env={**os.environ, "MERGANSER_PORT": "0", "MERGANSER_DATA_DIR": str(up.data)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert second.returncode == 2
    assert "[data_dir_in_use]" in second.stderr
    assert up.http.get("/readyz").status_code == 200
    assert up.state.exists()


def test_it_is_ready_in_seconds_and_leaves_nothing(start: Callable[..., Up]) -> None:
    began = time.monotonic()
    up = start()
    assert time.monotonic() - began < 15
    family = descendants(up.process.pid)
    assert up.stop() == 0
    assert not any(alive(pid) for pid in family)
    assert not up.state.exists()
    assert not (up.data / "redis" / "redis.sock").exists()
