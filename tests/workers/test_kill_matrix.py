"""Whatever dies while a merge runs: the work goes on within 15 s, nothing is lost, one result is published.

Each row of the table kills real processes. How long it took is measured with the ids of the merge's events,
which are the Redis server's time in milliseconds.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from adapters import write_adapter

from tests.running import Up, alive, descendants, push, until
from tests.workers.conftest import in_the_middle, submit_slow
from tests.workers.evidence import finished_once, nothing_in_hand, recovery
from tests.workers.split import Split

pytestmark = pytest.mark.slow
_log = logging.getLogger(__name__)

RECOVERY_SECONDS = 15.0
OUTAGE_SECONDS = 8.0


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """Everything in one process tree; it serves several rows, as it should."""
    up = Up(tmp_path_factory.mktemp("up") / "data")
    yield up
    up.stop()


def kill_horse(up: Up) -> float:
    os.kill(up.horse(), signal.SIGKILL)
    return 0.0


def kill_worker(up: Up) -> float:
    horse = up.horse()
    os.kill(up.pid_of("workers.process"), signal.SIGKILL)
    until(lambda: not alive(horse), what="the work-horse dies with its worker")
    return 0.0


def kill_everything(up: Up) -> float:
    """The parent of all: supervisor, API and the keeper of Redis."""
    up.process.kill()
    up.process.wait()
    up.start()
    return 0.0


def kill_redis(up: Up) -> float:
    os.kill(up.pid_of("redis.sock"), signal.SIGKILL)
    return 0.0


def freeze_redis(up: Up) -> float:
    server = up.pid_of("redis.sock")
    os.kill(server, signal.SIGSTOP)
    time.sleep(OUTAGE_SECONDS)
    os.kill(server, signal.SIGCONT)
    return OUTAGE_SECONDS


@dataclass(frozen=True)
class Row:
    """What is done to a service, and how often the merge is then started in all.

    ``strike`` returns for how long it kept the service down itself.
    """

    strike: Callable[[Up], float]
    attempts: tuple[int, ...]

    def __str__(self) -> str:
        return self.strike.__name__


TABLE = (
    Row(kill_horse, (2,)),
    Row(kill_worker, (2,)),
    Row(kill_everything, (2,)),
    Row(kill_redis, (1,)),
    Row(freeze_redis, (1,)),
)


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_of_one_machine(up: Up, middling: list[Path], row: Row) -> None:
    with up.client() as client:
        merge_id = submit_slow(client, middling)
        in_the_middle(client, merge_id)
        struck = time.time()
        outage = row.strike(up)
    with up.client() as client:
        done = finished_once(up, client, merge_id, row.attempts)
        seconds = recovery(client, merge_id, struck, done["attempts"]) - outage
        _log.info("%s: the work went on after %.2f s", row, seconds)
        assert seconds < RECOVERY_SECONDS
    nothing_in_hand(up)


def test_a_redis_outage_in_which_the_merge_ends(split: Callable[..., Split], middling: list[Path]) -> None:
    service = split()
    service.serve()
    service.work()
    with service.client() as client:
        merge_id = submit_slow(client, middling)
        in_the_middle(client, merge_id)
        horse = service.horse()
        service.server.stop()
        down = time.monotonic()
        assert client._http.get("/readyz").status_code == 503
        time.sleep(OUTAGE_SECONDS - (time.monotonic() - down))
        assert alive(horse)  # it has a result and holds on to it
        service.server.start()
        back = time.time()
        finished_once(service, client, merge_id, (1,))
        seconds = recovery(client, merge_id, back, 1)
        _log.info("a Redis outage of %.0f s: the merge ended %.2f s after it", OUTAGE_SECONDS, seconds)
        assert seconds < RECOVERY_SECONDS
    nothing_in_hand(service)


def test_a_killed_supervisor_whose_work_another_machine_takes(
    split: Callable[..., Split], middling: list[Path]
) -> None:
    service = split()
    service.serve()
    supervisors = [service.work(), service.work()]
    with service.client() as client:
        merge_id = submit_slow(client, middling)
        in_the_middle(client, merge_id)
        horse = service.horse()
        (busy,) = [process for process in supervisors if horse in descendants(process.pid)]
        struck = time.time()
        busy.kill()
        until(lambda: not alive(horse), what="its work-horse dies with it")
        finished_once(service, client, merge_id, (2,))
        seconds = recovery(client, merge_id, struck, 2)
        _log.info("kill_supervisor: another machine went on after %.2f s", seconds)
        assert seconds < RECOVERY_SECONDS
    nothing_in_hand(service)


def test_a_silent_worker_that_comes_back_publishes_nothing(
    split: Callable[..., Split], middling: list[Path]
) -> None:
    """It was not dead, only frozen, and another machine has done its work meanwhile."""
    service = split()
    service.serve()
    supervisors = [service.work(), service.work()]
    with service.client() as client:
        merge_id = submit_slow(client, middling)
        in_the_middle(client, merge_id)
        horse = service.horse()
        (busy,) = [process for process in supervisors if horse in descendants(process.pid)]
        frozen = [busy.pid, *descendants(busy.pid)]
        struck = time.time()
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)
        until(lambda: client.merge(merge_id)["attempts"] == 2, what="another starts it")
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)
        finished_once(service, client, merge_id, (2,))
        seconds = recovery(client, merge_id, struck, 2)
        _log.info("freeze_worker: another machine went on after %.2f s", seconds)
        assert seconds < RECOVERY_SECONDS
    nothing_in_hand(service)


def test_random_moments_of_the_publication(up: Up, tmp_path: Path) -> None:
    """The work-horse dies at some moment between the first file of its result and the end of its job."""
    modules = {f"layers.{i}.q_proj": (1024, 1024) for i in range(4)}
    folder = write_adapter(tmp_path / "adapter", rank=64, modules=modules)
    hits = tries = 0
    with up.client() as client:
        recipe = {"merge_method": "linear", "models": [{"model": push(client, folder, "kill/publish")}]}
        while tries < 3 or (hits == 0 and tries < 12):  # the moment is short; now and then it is missed
            merge_id = str(client.submit(recipe, fresh=True)["id"])
            horse = until(lambda: horse_or_none(up), what="it runs")
            storing(up, merge_id)
            time.sleep(0.01 * (tries % 3))
            with contextlib.suppress(ProcessLookupError):
                os.kill(horse, signal.SIGKILL)
            done = finished_once(up, client, merge_id, (1, 2))
            hits += done["attempts"] == 2
            tries += 1
    assert hits >= 1
    nothing_in_hand(up)


def storing(up: Up, merge_id: str) -> None:
    """Return as soon as a merge stores its result."""
    deadline = time.monotonic() + 30
    with up.redis() as connection:
        while connection.hget(f"mg:local:merge:{merge_id}", "phase") not in (b"store", b"succeeded"):
            assert time.monotonic() < deadline


def horse_or_none(up: Up) -> int | None:
    try:
        return up.horse()
    except AssertionError:
        return None


class TestApi:
    """The API dies; the workers are none the wiser, and clients go on where they were."""

    def test_in_the_middle_of_a_stream(self, split: Callable[..., Split], middling: list[Path]) -> None:
        service = split()
        api = service.serve()
        service.work()
        with service.client() as client:
            merge_id = submit_slow(client, middling)
            seen = []
            with contextlib.suppress(httpx.TransportError):
                for event in client.events(merge_id):
                    seen.append(event)
                    if event[2].get("progress", 0.0) > 0.1:
                        api.kill()
            struck = time.monotonic()
            assert seen[-1][2].get("state") is None  # it was cut off
            service.serve()
            for event in client.events(merge_id, after=seen[-1][0]):
                seen.append(event)
            assert time.monotonic() - struck < RECOVERY_SECONDS
            finished_once(service, client, merge_id, (1,))
            assert seen == list(client.events(merge_id))

    def test_in_the_middle_of_an_upload(self, split: Callable[..., Split], tmp_path: Path) -> None:
        service = split()
        api = service.serve()
        folder = write_adapter(tmp_path / "adapter", rank=256, modules={"q_proj": (4096, 4096)})
        weights = (folder / "adapter_model.safetensors").read_bytes()
        half_sent = threading.Event()

        def halting() -> Iterator[bytes]:
            yield weights[: len(weights) // 2]
            half_sent.set()
            api.wait(60)
            yield weights[len(weights) // 2 :]

        def kill() -> None:
            half_sent.wait(30)
            with contextlib.suppress(AssertionError):  # it is killed in any case
                until(lambda: some_of_it(service), what="the service has received a part")
            api.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        with service.client() as client:
            path = "/v1/models/kill/upload/files/adapter_model.safetensors"
            headers = {"Content-Length": str(len(weights)), "Content-Type": "application/octet-stream"}
            with pytest.raises(httpx.TransportError):
                client._http.put(path, content=halting(), headers=headers)
            killer.join()
            struck = time.monotonic()
            service.serve()
            assert client._http.get("/v1/models/kill/upload").status_code == 404
            assert client._http.post("/v1/models/kill/upload/commit").status_code in (404, 409, 422)
            assert client._http.get("/v1/models").json()["data"] == []
            assert not [
                file for file in service.storage.rglob("*") if file.is_file() and whole(file, weights)
            ]
            revision = client.push_dir(folder, "kill/upload")
            assert time.monotonic() - struck < RECOVERY_SECONDS
            assert revision["modules"] == 1
            client.pull("kill/upload", tmp_path / "again")
        assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == weights


def some_of_it(service: Split) -> bool:
    files = [file for folder in (service.data, service.storage) for file in folder.rglob("*")]
    return any(file.is_file() and file.stat().st_size >= 1 << 20 for file in files)


def whole(file: Path, weights: bytes) -> bool:
    return file.stat().st_size >= len(weights)
