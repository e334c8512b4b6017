"""Work-horses that have loaded torch before their job comes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapters import write_adapter

from benchmarks.latency import start_of
from service.client import Client
from tests.running import Up, alive, push, until
from workers.warm import WarmHorse

pytestmark = pytest.mark.slow


def has_torch(pid: int) -> bool:
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


def warm(up: Up) -> int:
    """The process id of the work-horse that waits, once it has loaded torch."""
    pid = int(until(lambda: horses(up), what="a work-horse is there")[0])
    until(lambda: has_torch(pid), what="it has loaded torch")
    return pid


def horses(up: Up) -> list[int]:
    try:
        return [up.horse()]
    except AssertionError:  # none, or two
        return []


def run(client: Client, recipe: dict[str, Any]) -> str:
    merge_id = str(client.submit(recipe, fresh=True)["id"])
    done = client.wait(merge_id)
    assert (done["state"], done["attempts"]) == ("succeeded", 1)
    return merge_id


def test_a_process_that_is_ready_runs_the_next_merge_and_no_other(
    start: Callable[..., Up], tmp_path: Path
) -> None:
    up = start(warm_horses="true")
    with up.client() as client:
        recipe = {
            "merge_method": "linear",
            "models": [{"model": push(client, write_adapter(tmp_path), "a/b")}],
        }
        first = warm(up)
        worker = up.pid_of("workers.process")
        assert not has_torch(worker)
        assert not has_torch(up.process.pid)
        assert start_of(up, run(client, recipe))["engine_loaded"]
        until(lambda: not alive(first), what="it ended with its job")
        second = warm(up)
        assert second != first
        os.kill(second, signal.SIGKILL)  # nobody notices before there is a job
        until(lambda: not alive(second), what="it is dead")
        assert not start_of(up, run(client, recipe))["engine_loaded"]
        third = warm(up)
        os.kill(worker, signal.SIGKILL)
        until(lambda: not alive(third), what="it dies with its worker")


def test_none_is_kept_unless_asked_for(start: Callable[..., Up], tmp_path: Path) -> None:
    up = start()
    with up.client() as client:
        recipe = {
            "merge_method": "linear",
            "models": [{"model": push(client, write_adapter(tmp_path), "a/b")}],
        }
        for _ in range(2):  # nor after a first one
            assert not start_of(up, run(client, recipe))["engine_loaded"]
        until(lambda: horses(up) == [], what="the last one has ended")


def test_a_process_that_died_with_its_job_in_hand_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.warm.COMMAND", ["/bin/sh", "-c", "exit 0"])
    monkeypatch.setattr("sys.executable", "/bin/sh")
    horse = WarmHorse()
    until(lambda: not alive(horse.pid), what="it ended")
    assert horse.give({"RQ_JOB_ID": "j"}) is None
