"""A running merge is stopped: by its own next report, or else by force."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.running import Up, alive, until
from tests.workers.conftest import in_the_middle, submit_slow

pytestmark = pytest.mark.slow


def test_a_running_merge_stops_by_itself(start: Callable[..., Up], large: list[Path]) -> None:
    up = start()
    with up.client() as client:
        merge_id = submit_slow(client, large)
        in_the_middle(client, merge_id)
        horse = up.horse()
        asked = time.monotonic()
        assert client.cancel(merge_id)["state"] == "cancelling"
        done = client.wait(merge_id)
        assert time.monotonic() - asked < 8
        assert (done["state"], done["error"]["code"], done["result"]) == ("cancelled", "cancelled", None)
        states = [data["state"] for _, kind, data in client.events(merge_id) if kind == "state"]
        assert states == ["queued", "running", "cancelling", "cancelled"]
        until(lambda: not alive(horse), what="the work-horse ends")
        until(lambda: not any((up.data / "scratch").iterdir()), what="the scratch folder is empty")
        assert not (up.storage / "merges" / "local" / merge_id / "attempts").exists()


def test_an_attempt_that_hangs_is_killed_and_the_worker_goes_on(
    start: Callable[..., Up], large: list[Path]
) -> None:
    up = start()
    with up.client() as client:
        merge_id = submit_slow(client, large)
        in_the_middle(client, merge_id)
        horse, worker = up.horse(), up.pid_of("workers.process")
        os.kill(horse, signal.SIGSTOP)
        client.cancel(merge_id)
        done = client.wait(merge_id)
        assert done["state"] == "cancelled"
        until(lambda: not alive(horse), what="the work-horse is killed", patience=5)
        assert up.pid_of("workers.process") == worker
        again = client._object("POST", f"/v1/merges/{merge_id}/retry")
        assert client.wait(again["id"])["state"] == "succeeded"
