"""Which worker a merge waits for, and what happens when it does not fit. Memory really runs out here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from adapters import write_adapter

from service import outlook
from service.broker import QUEUES, SIZES, queue_name
from service.client import Client
from service.jobs import Jobs
from service.settings import load_settings
from service.sizes import GB, served, served_with, size_for, workers
from service.storage import Storage
from tests.redis_server import RECIPE
from tests.running import ROOT, Up, descendants, push, until
from tests.running import command as command_line
from workers import environment as env
from workers import memory
from workers.devices import Device
from workers.rungs import Rung, rungs
from workers.worker import MergeWorker


class TestClasses:
    """The smallest class that holds a merge, the largest that a worker has."""

    @pytest.mark.parametrize(
        ("need", "size"), [(0, 4), (3.6 * GB, 4), (3.7 * GB, 8), (20 * GB, 24), (70 * GB, 80), (500 * GB, 80)]
    )
    def test_of_a_merge(self, need: float, size: int) -> None:
        assert size_for(int(need)) == size

    @pytest.mark.parametrize(
        ("memory", "sizes"),
        [(0, (4,)), (GB, (4,)), (8 * GB, (8, 4)), (15 << 30, (16, 8, 4)), (80 << 30, (80, 48, 24, 16, 8, 4))],
    )
    def test_of_a_worker(self, memory: int, sizes: tuple[int, ...]) -> None:
        assert served_with(memory) == sizes

    def test_priority_comes_before_size(self) -> None:
        assert QUEUES[: len(SIZES) + 1] == (
            *("merges-80g-high", "merges-48g-high", "merges-24g-high", "merges-16g-high", "merges-8g-high"),
            *("merges-high", "merges-80g"),
        )

    def test_the_memory_of_workers(self, tmp_path: Path) -> None:
        machine = memory.machine()
        assert 1 << 28 < machine <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        cpu, settings = Device("cpu"), load_settings(data_dir=tmp_path)
        assert memory.of(cpu, [cpu, cpu, Device("cuda", "0")], settings) == machine // 2
        given = load_settings(data_dir=tmp_path, worker_memory="16GB")
        assert memory.of(Device("cuda", "0"), [cpu], given) == 16 * GB

    def test_a_gpu_is_asked_for_its_memory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text('#!/bin/sh\n[ "$2" = GPU-7 ] && echo 81559\n')
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        gpu, settings = Device("cuda", "GPU-7"), load_settings(data_dir=tmp_path)
        assert served_with(memory.of(gpu, [gpu], settings))[0] == 80
        assert memory.of(Device("cuda", "GPU-8"), [gpu], settings) == 0


class TestRungs:
    """A worker tries with less memory before it gives up."""

    def test_of_a_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(env.DEVICE, "cpu")
        monkeypatch.setenv(env.THREADS, "4")
        monkeypatch.setenv(env.MEMORY, str(8 * GB))
        small, large, all_of_it = 400 << 20, 3 * GB, 7 * GB
        assert rungs(small) == (Rung("cpu", 4), Rung("cpu", 1))
        assert rungs(large) == (Rung("cpu", 2), Rung("cpu", 1))
        assert rungs(all_of_it) == (Rung("cpu", 1),)

    def test_of_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(env.DEVICE, "cuda")
        assert [rung.device for rung in rungs(GB)] == ["cuda", "cpu", "cpu"]


def register(connection: redis.Redis, name: str, size: int) -> MergeWorker:
    names = [queue_name("normal", each) for each in served_with(size * GB)]
    worker = MergeWorker(names, connection=connection, name=name)
    worker.register_birth()
    return worker


def test_a_merge_that_no_worker_can_run_waits_and_says_why(connection: redis.Redis, jobs: Jobs) -> None:
    merge = jobs.create("t", RECIPE, memory_bytes=20 * GB)
    assert connection.llen("rq:queue:merges-24g") == 1
    assert outlook.obstacle(connection, merge) == "no worker is connected"
    register(connection, "small", 8)
    reason = outlook.obstacle(connection, merge)
    assert reason == "no connected worker has 24 GB of memory; the largest has 8 GB"
    large = register(connection, "large", 48)
    assert served(connection) == [4, 8, 16, 24, 48]
    assert outlook.obstacle(connection, merge) is None
    assert workers(connection) == 2
    connection.delete(large.key)  # it died and nobody tidied up yet
    assert served(connection) == [4, 8]
    assert workers(connection) == 1


def test_a_merge_moves_past_the_worker_that_it_did_not_fit_on(connection: redis.Redis, jobs: Jobs) -> None:
    merge = jobs.create("t", RECIPE)
    jobs.claim("t", merge.id, "one")
    register(connection, "here", 16)
    assert jobs.move_up("t", merge.id, "one", 16 * GB, "it ran out of memory") is None
    register(connection, "there", 80)
    assert jobs.move_up("t", merge.id, "late", 16 * GB, "it ran out of memory") is None
    assert jobs.move_up("t", merge.id, "one", 16 * GB, "it ran out of memory") == 24
    moved = jobs.get("t", merge.id)
    assert (moved.state, size_for(moved.memory_bytes)) == ("queued", 24)
    assert moved.message == "it ran out of memory; it waits for a worker with 24 GB"
    assert jobs.move_up("t", merge.id, "one", 16 * GB, "once more") is None  # it does not run


# the real thing

NEEDS = {f"layers.{i}.q_proj": (2400 + 8 * i, 2400) for i in range(2)}
"""A TIES merge of such modules in full space needs about 450 MB with one thread."""


@pytest.fixture
def small(start: Callable[..., Up]) -> Up:
    """A service whose worker has 360 MB."""
    return start(worker_memory="360MB")


@pytest.fixture
def spare(small: Up) -> Iterator[int]:
    """A second worker of that service, with 8 GB, that is registered and stands still; its process."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "MERGANSER_REDIS_URL": f"unix://{small.data}/redis/redis.sock?db=0",
        "MERGANSER_DATA_DIR": str(small.data),
        "MERGANSER_DEVICES": "cpu",
        "MERGANSER_WORKER_MEMORY": "8GB",
    }
    with (small.data / "spare.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "workers", "worker"],
            env=environment,
            cwd=small.data,
            stdout=log,
            stderr=log,
        )
    try:
        with small.redis() as connection:
            until(lambda: served(connection) == [4, 8], what="both workers are there")
        found = [pid for pid in descendants(process.pid) if "workers.process" in command_line(pid)]
        os.kill(found[0], signal.SIGSTOP)
        yield found[0]
        os.kill(found[0], signal.SIGCONT)
    finally:
        process.terminate()
        process.wait(30)


def submit(up: Up, client: Client, root: Path) -> str:
    folders = [write_adapter(root / str(seed), seed=seed, modules=NEEDS) for seed in range(2)]
    models = [{"model": push(client, folder, f"memory/m{i}")} for i, folder in enumerate(folders)]
    recipe: dict[str, Any] = {"merge_method": "ties", "space": "full", "models": models}
    recipe |= {"parameters": {"density": 0.3}, "output": {"rank": 4}}
    worker = up.pid_of("workers.process")
    os.kill(worker, signal.SIGSTOP)
    merge_id = str(client.submit(recipe)["id"])
    with up.redis() as connection:  # the estimate was too low
        connection.hset(f"mg:local:merge:{merge_id}", "memory_bytes", 0)
    os.kill(worker, signal.SIGCONT)
    return merge_id


def messages(client: Client, merge_id: str) -> list[str]:
    return [data.get("message", "") for _, _, data in client.events(merge_id)]


@pytest.mark.slow
def test_out_of_memory_with_no_larger_worker(small: Up, tmp_path: Path) -> None:
    with small.client() as client:
        merge_id = submit(small, client, tmp_path)
        done = client.wait(merge_id)
        assert (done["state"], done["attempts"]) == ("failed", 1)
        assert done["error"]["code"] == "out_of_memory"
        told = "it ran out of memory on the CPU; now on the CPU with one thread"
        assert told in messages(client, merge_id)
        # the worker goes on, and a merge that nobody can run says so
        jobs = Jobs(small.redis(), Storage.open(small.storage.as_uri()))
        huge = jobs.create("local", RECIPE, memory_bytes=20 * GB)
        shown = client.merge(huge.id)
        assert (shown["state"], shown["memory_class"], shown["eta_seconds"]) == ("queued", 24, None)
        assert shown["message"] == "no connected worker has 24 GB of memory; the largest has 4 GB"
        assert client.cancel(huge.id)["state"] == "cancelled"


@pytest.mark.slow
@pytest.mark.parametrize("end", ["MemoryError", "SIGKILL"])
def test_out_of_memory_with_a_larger_worker(small: Up, spare: int, tmp_path: Path, end: str) -> None:
    with small.client() as client:
        merge_id = submit(small, client, tmp_path)
        if end == "SIGKILL":  # what the kernel does to a process that takes too much
            until(lambda: client.merge(merge_id)["state"] == "running", what="it runs")
            os.kill(small.horse(), signal.SIGKILL)
        moved = until(lambda: queued_again(client, merge_id), what="it waits for the larger worker")
        assert moved["memory_class"] == 8
        with small.redis() as connection:
            waits = [merge_id.encode()]
            until(lambda: connection.lrange("rq:queue:merges-8g", 0, -1) == waits, what="so does its job")
        os.kill(spare, signal.SIGCONT)
        done = client.wait(merge_id)
        assert (done["state"], done["attempts"]) == ("succeeded", 2)
        reason = "its process was killed" if end == "SIGKILL" else "it ran out of memory on the CPU"
        assert f"{reason}; it waits for a worker with 8 GB" in messages(client, merge_id)


def queued_again(client: Client, merge_id: str) -> dict[str, Any] | None:
    found = client.merge(merge_id)
    return found if found["state"] == "queued" and found["attempts"] == 1 else None


@pytest.mark.gpu
def test_out_of_memory_on_a_gpu_is_left_to_the_cpu(
    connection: redis.Redis, jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's own GPU merge with a ten-thousandth of the memory; the merge ends well on the CPU."""
    import torch

    from merging.recipe import Recipe
    from workers.tasks import Task

    monkeypatch.setenv(env.DEVICE, "cuda")
    monkeypatch.setenv(env.MEMORY, str(80 << 30))
    folder = write_adapter(tmp_path / "adapter", modules={"q_proj": (4096, 4096)})
    recipe = {"merge_method": "ties", "space": "full", "models": [{"model": "a"}], "output": {"rank": 4}}
    merge = jobs.create("t", Recipe.load(recipe))
    assert jobs.claim("t", merge.id, "one") == "claimed"
    task = Task("t", merge.id, "one", jobs, Storage.open((tmp_path / "storage").as_uri()))
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        done = task._run_engine(Recipe.load(recipe), 0, tmp_path / "out", lambda _: folder)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert done.report["versions"] is not None
    told = [fields[b"data"] for _, fields in connection.xrange(f"mg:t:merge:{merge.id}:events")]
    assert any(b"it ran out of memory on the GPU; now on the CPU" in data for data in told)
