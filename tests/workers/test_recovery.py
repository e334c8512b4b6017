"""A service starts and ends in order, whatever is going on. For what is killed see the kill matrix."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.running import Up, alive, descendants, until
from tests.workers.conftest import in_the_middle, submit_slow
from tests.workers.evidence import finished_once

pytestmark = pytest.mark.slow


def test_an_orderly_end_takes_everything_along_and_the_next_start_goes_on(
    start: Callable[..., Up], large: list[Path]
) -> None:
    up = start()
    with up.client() as client:
        merge_id = submit_slow(client, large)
        in_the_middle(client, merge_id)
    family = descendants(up.process.pid)
    assert len(family) >= 3  # redis, worker, work-horse
    up.process.send_signal(signal.SIGTERM)
    assert up.process.wait(60) == 0, up.log()
    until(lambda: not any(alive(pid) for pid in family), what="no process is left")
    assert not up.state.exists()
    up.start()
    with up.client() as client:  # an orderly end leaves a merge two seconds, which may be enough for it
        finished_once(up, client, merge_id, (1, 2))


def test_open_event_streams_do_not_hold_up_the_end(start: Callable[..., Up], large: list[Path]) -> None:
    up = start()
    with up.client() as client:
        merge_id = submit_slow(client, large)
        with httpx.stream("GET", f"{up.url}/v1/merges/{merge_id}/events", timeout=30) as response:
            lines = response.iter_lines()
            next(lines)
            up.process.terminate()
            assert up.process.wait(30) == 0
            assert [*lines][-1] == ""  # a proper end: no connection is cut off


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
    up = start()  # which waits for half a minute
    family = descendants(up.process.pid)
    assert up.stop() == 0
    assert not any(alive(pid) for pid in family)
    assert not up.state.exists()
    assert not (up.data / "redis" / "redis.sock").exists()
