"""Stopping in order: workers end what they have begun, the API ends its streams."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.running import descendants, until
from tests.workers.conftest import in_the_middle, submit_slow
from tests.workers.evidence import finished_once, nothing_in_hand
from tests.workers.split import Split

pytestmark = pytest.mark.slow


def test_a_worker_that_is_to_stop_finishes_its_merge_and_starts_no_other(
    split: Callable[..., Split], middling: list[Path]
) -> None:
    service = split()
    service.serve()
    supervisor = service.work()
    with service.client() as client:
        first = submit_slow(client, middling)
        in_the_middle(client, first)
        second = submit_slow(client, middling)
        supervisor.send_signal(signal.SIGTERM)
        assert supervisor.wait(60) == 0
        assert finished_once(service, client, first, (1,))
        assert client.merge(second)["state"] == "queued"
        shown = client.merge(second)
        assert (shown["message"], shown["eta_seconds"]) == ("no worker is connected", None)
        client.cancel(second)
    nothing_in_hand(service)


def test_a_merge_that_takes_longer_is_left_to_others_and_is_not_to_blame(
    split: Callable[..., Split], large: list[Path]
) -> None:
    service = split(drain_seconds="0.2")
    service.serve()
    supervisor = service.work()
    with service.client() as client:
        merge_id = submit_slow(client, large)
        in_the_middle(client, merge_id)
        family = descendants(supervisor.pid)
        supervisor.send_signal(signal.SIGTERM)
        assert supervisor.wait(30) == 0
        assert client.merge(merge_id)["state"] != "succeeded"  # it was not waited for
        assert len(family) == 2
        with service.redis() as connection:
            assert connection.lrange("rq:queue:merges", 0, -1) == [merge_id.encode()]
            assert connection.hget(f"rq:job:{merge_id}", "retries_left") == b"5"
        service.work()
        finished_once(service, client, merge_id, (2,))


def test_an_api_that_is_to_stop_ends_its_streams_in_order(
    split: Callable[..., Split], middling: list[Path]
) -> None:
    service = split()
    api = service.serve()
    with service.client() as client:
        merge_id = submit_slow(client, middling)  # nobody runs it: its streams would not end
    ended: list[int] = []

    def follow() -> None:
        with service.client() as client:
            ended.append(len(list(client.events(merge_id))))

    threads = [threading.Thread(target=follow) for _ in range(5)]
    for thread in threads:
        thread.start()
    with service.client() as client:
        metric = "merganser_event_streams 5"
        until(lambda: metric in client._http.get("/metrics").text, what="all of them listen")
    api.send_signal(signal.SIGTERM)
    assert api.wait(30) == 0
    for thread in threads:
        thread.join(30)
    assert ended == [1] * 5  # each had the one event there is, and a proper end
