"""A merge is stopped whatever it is doing: at once, by its own next report, or else by force."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from service.client import Client
from tests.running import Up, alive, until
from tests.workers.conftest import in_the_middle, submit_slow
from tests.workers.evidence import nothing_in_hand

pytestmark = pytest.mark.slow


def test_a_running_merge_stops_by_itself(start: Callable[..., Up], large: list[Path]) -> None:
    up = start()
    with up.client() as client:
        merge_id = submit_slow(client, large)
        in_the_middle(client, merge_id)
        horse = up.horse()
        assert client.cancel(merge_id)["state"] == "cancelling"
        done = client.wait(merge_id)
        assert "did not stop" not in up.log()
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
        assert "did not stop" in up.log()
        until(lambda: not alive(horse), what="the work-horse is killed")
        assert up.pid_of("workers.process") == worker
        again = client._object("POST", f"/v1/merges/{merge_id}/retry")
        assert client.wait(again["id"])["state"] == "succeeded"


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """One service for the merges that never get to work."""
    up = Up(tmp_path_factory.mktemp("up") / "data")
    yield up
    up.stop()


class TestBeforeTheEngineWorks:
    """Whether a merge waits, has been taken, or loads the engine: it is cancelled and nobody goes on."""

    def test_in_the_queue(self, up: Up, middling: list[Path]) -> None:
        worker = up.pid_of("workers.process")
        with up.client() as client:
            os.kill(worker, signal.SIGSTOP)
            merge_id = submit_slow(client, middling)
            done = client.cancel(merge_id)
            assert (done["state"], done["attempts"]) == ("cancelled", 0)
            with up.redis() as connection:
                assert connection.keys("rq:queue:merges*") == []
            os.kill(worker, signal.SIGCONT)
            self.nobody_goes_on(up, client, merge_id, attempts=0)

    def test_in_the_hands_of_a_worker(self, up: Up, middling: list[Path]) -> None:
        with up.client() as client:
            merge_id = submit_slow(client, middling)
            horse = until(lambda: started(up), what="a work-horse is started")
            os.kill(horse, signal.SIGSTOP)
            assert client.merge(merge_id)["state"] == "queued"
            assert client.cancel(merge_id)["state"] == "cancelled"
            os.kill(horse, signal.SIGCONT)
            self.nobody_goes_on(up, client, merge_id, attempts=0)

    def test_while_the_engine_is_loaded(self, up: Up, middling: list[Path]) -> None:
        with up.client() as client:
            merge_id = submit_slow(client, middling)
            until(lambda: client.merge(merge_id)["phase"] == "starting", what="the engine starts")
            assert client.cancel(merge_id)["state"] == "cancelling"
            again = client.cancel(merge_id)  # asking again changes nothing
            assert again["state"] in ("cancelling", "cancelled")
            assert client.wait(merge_id)["state"] == "cancelled"
            self.nobody_goes_on(up, client, merge_id, attempts=1)

    @staticmethod
    def nobody_goes_on(up: Up, client: Client, merge_id: str, *, attempts: int) -> None:
        nothing_in_hand(up)
        done = client.merge(merge_id)
        assert (done["state"], done["attempts"], done["result"]) == ("cancelled", attempts, None)
        assert not (up.storage / "merges" / "local" / merge_id / "attempts").exists()


def started(up: Up) -> int | None:
    try:
        return up.horse()
    except AssertionError:
        return None
