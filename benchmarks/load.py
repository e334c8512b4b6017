"""Load one service on loopback: ``python -m benchmarks.load [--out FILE]``. Stops by itself within minutes.

Three phases, each beside a probe that asks ``/healthz`` all the time. It needs nothing but the event loop:
what it waits for are stalls of the loop, and the machine. How much is the machine, a second probe tells:
it asks a server that does nothing else, at the same time.

1. clients that list and poll, each with a connection of its own;
2. the same, with event streams open on merges that wait (no worker runs);
3. uploads at once, beside the time of writing and hashing the same bytes without a service.

The clients run in a process of their own, for they would otherwise be what is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

CLIENTS, STREAMS, UPLOADS = 100, 100, 20
UPLOAD_BYTES = 64 << 20
SECONDS = 15.0
PAUSE = 0.5
"""Between two requests of a client: polls are not a flood."""
CHUNK = 1 << 20


@dataclass
class Count:
    """What happened in a phase."""

    latencies: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)

    def summary(self) -> dict[str, Any]:
        """Number, errors and quantiles in milliseconds."""
        ordered = sorted(self.latencies)
        if not ordered:
            return {"requests": 0, "errors": dict(self.errors)}
        at = {name: ordered[min(len(ordered) - 1, int(len(ordered) * q))] for name, q in _QUANTILES}
        told = {name: round(value * 1000, 1) for name, value in at.items()}
        return {"requests": len(ordered), "errors": dict(self.errors), **told}


_QUANTILES = (("p50_ms", 0.5), ("p90_ms", 0.9), ("p99_ms", 0.99), ("max_ms", 1.0))


def client(url: str) -> httpx.AsyncClient:
    """A client with one connection."""
    limits = httpx.Limits(max_connections=1)
    return httpx.AsyncClient(base_url=url, timeout=60, trust_env=False, verify=False, limits=limits)


async def poll(url: str, paths: list[str], until: float, count: Count, pause: float) -> None:
    """Ask for the paths in turn until a time."""
    async with client(url) as http:
        turn = 0
        while time.monotonic() < until:
            started = time.perf_counter()
            try:
                answer = await http.get(paths[turn % len(paths)])
                if answer.status_code != 200:
                    count.errors[str(answer.status_code)] += 1
            except httpx.HTTPError as error:
                count.errors[type(error).__name__] += 1
            count.latencies.append(time.perf_counter() - started)
            turn += 1
            await asyncio.sleep(pause)


async def listen(url: str, path: str, until: float, count: Count) -> None:
    """Hold an event stream open until a time; it has an event soon after it was opened."""
    heard = False
    try:
        async with client(url) as http, asyncio.timeout(until - time.monotonic()):
            started = time.perf_counter()
            async with http.stream("GET", path) as answer:
                if answer.status_code != 200:
                    count.errors[str(answer.status_code)] += 1
                    return
                async for line in answer.aiter_lines():
                    if line.startswith("event:") and not heard:
                        heard = True
                        count.latencies.append(time.perf_counter() - started)
                count.errors["ended early"] += 1
    except TimeoutError:
        if not heard:
            count.errors["no event"] += 1
    except httpx.HTTPError as error:
        count.errors[type(error).__name__] += 1


async def upload(url: str, number: int, size: int, count: Count) -> None:
    """Send one file of random bytes. It is refused at the commit, which is not asked for."""
    block = os.urandom(CHUNK)

    async def body() -> AsyncIterator[bytes]:
        for index in range(size // CHUNK):
            yield number.to_bytes(4, "big") + index.to_bytes(4, "big") + block[8:]

    path = f"/v1/models/load/file-{number}/files/adapter_model.safetensors"
    async with client(url) as http:
        started = time.perf_counter()
        try:
            answer = await http.put(path, content=body(), headers={"Content-Length": str(size)})
            if answer.status_code != 201:
                count.errors[f"{answer.status_code} {answer.text[:80]}"] += 1
        except httpx.HTTPError as error:
            count.errors[type(error).__name__] += 1
        count.latencies.append(time.perf_counter() - started)


def apart(run: Callable[[], Coroutine[Any, Any, Any]], pipe: Any) -> None:
    """Run in a process of its own, once told to."""
    pipe.send("ready")
    pipe.recv()
    pipe.send(asyncio.run(run()))


def idle_server(pipe: Any) -> None:
    """Answer every request at once, for ever."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
                await writer.drain()

    async def serve() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        pipe.send(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        await server.serve_forever()

    asyncio.run(serve())


def processor(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Phase:
    """What one process of clients does."""

    url: str
    kind: str
    paths: list[str]
    number: int
    seconds: float

    async def __call__(self) -> dict[str, dict[str, Any]]:
        """The summary of each kind of client."""
        counts = {"requests": Count(), "streams": Count()}
        requests, streams = counts["requests"], counts["streams"]
        started = time.perf_counter()
        until = time.monotonic() + self.seconds
        async with asyncio.TaskGroup() as group:
            if self.kind == "streams":
                merges = self.paths[2:]
                for number in range(STREAMS):
                    path = f"{merges[number % len(merges)]}/events"
                    group.create_task(listen(self.url, path, until, streams))
            for number in range(self.number):
                if self.kind == "probe":
                    group.create_task(poll(self.url, self.paths, until, requests, 0.005))
                elif self.kind == "upload":
                    group.create_task(upload(self.url, number, UPLOAD_BYTES, requests))
                else:
                    await asyncio.sleep(PAUSE / self.number)  # spread, as real clients are
                    group.create_task(poll(self.url, self.paths, until, requests, PAUSE))
        told: dict[str, Any] = {"requests": requests.summary(), "seconds": time.perf_counter() - started}
        if self.kind == "streams":
            told["streams"] = streams.summary()
        return told


def side_by_side(*phases: Phase) -> list[dict[str, Any]]:
    """Run phases at once, each in a process, and gather what they tell."""
    context = multiprocessing.get_context("spawn")
    running = []
    for phase in phases:
        here, there = context.Pipe()
        process = context.Process(target=apart, args=(phase, there), daemon=True)
        process.start()
        running.append((process, here))
    for _, here in running:
        here.recv()
    for _, here in running:
        here.send("go")
    told = []
    for process, here in running:
        told.append(here.recv() if here.poll(300) else {"requests": {"errors": {"no answer": 1}}})
        process.join(10)
        process.kill()
    return told


def memory(pid: int) -> dict[str, float]:
    """Resident memory now, and at its highest, in MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    kilobytes = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return {name: round(int(kilobytes[key]) / 1024, 1) for name, key in (("now", "VmRSS"), ("peak", "VmHWM"))}


def bare(folder: Path) -> float:
    """Seconds to write and hash what the uploads bring, one after the other, each with an fsync."""
    block = os.urandom(CHUNK)
    started = time.perf_counter()
    for number in range(UPLOADS):
        digest = hashlib.sha256()
        with (folder / f"bare-{number}").open("wb") as file:
            for _ in range(UPLOAD_BYTES // CHUNK):
                digest.update(block)
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        (folder / f"bare-{number}").unlink()
    return time.perf_counter() - started


def measure(folder: Path) -> dict[str, Any]:
    """Run all phases against a Redis and an API of their own."""
    from tests.merging.adapters import write_adapter
    from tests.running import push
    from tests.workers.split import Split

    service = Split(folder)
    try:
        api = service.serve()
        with service.client() as user:
            names = [
                push(user, write_adapter(folder / name, seed=len(name)), f"load/{name}") for name in "ab"
            ]
            recipe = {"merge_method": "linear", "models": [{"model": name} for name in names]}
            merges = [f"/v1/merges/{user.submit({**recipe, 'seed': seed})['id']}" for seed in range(10)]
        return _phases(service.url, api.pid, folder, merges)
    finally:
        service.stop()


def _phases(url: str, api: int, folder: Path, merges: list[str]) -> dict[str, Any]:
    here, there = multiprocessing.get_context("spawn").Pipe()
    control = multiprocessing.get_context("spawn").Process(target=idle_server, args=(there,), daemon=True)
    control.start()
    other = here.recv()
    told: dict[str, Any] = {"memory_mb": {"idle": memory(api)}}

    def phase(name: str, *clients: Phase, seconds: float) -> dict[str, Any]:
        before = processor(api)
        probes = [Phase(address, "probe", ["/healthz"], 1, seconds) for address in (url, other)]
        *found, probe, machine = side_by_side(*clients, *probes)
        told[name] = {
            **(found[0] if found else {}),
            "probe": probe["requests"],
            "machine": machine["requests"],
        }
        told[name]["processor_seconds"] = round(processor(api) - before, 2)
        told["memory_mb"][name] = memory(api)
        return told[name]

    phase("idle", seconds=5)
    polled = ["/v1/models", "/v1/merges?limit=20", *merges]
    for kind in ("poll", "streams"):
        phase(kind, Phase(url, kind, polled, CLIENTS, SECONDS), seconds=SECONDS)
    floor = bare(folder)
    uploads = phase("uploads", Phase(url, "upload", [], UPLOADS, 0), seconds=max(5.0, 2 * floor))
    size = UPLOADS * UPLOAD_BYTES / 1e6
    uploads["mb_per_second"] = round(size / uploads.get("seconds", 1e9), 1)
    uploads["bare_mb_per_second"] = round(size / floor, 1)
    uploads["relative"] = round(floor / uploads.get("seconds", 1e9), 3)
    control.kill()
    return told


def main() -> int:
    """Run and print; exit status 1 when a request failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__)
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    options = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    with tempfile.TemporaryDirectory(prefix="merganser-load-") as name:
        told = {"load_average": os.getloadavg(), **measure(Path(name))}
    text = json.dumps(told, indent=1)
    sys.stdout.write(f"{text}\n")
    if options.out is not None:
        options.out.write_text(f"{text}\n")
    failed = [name for name in ("poll", "streams", "uploads") if told[name]["requests"].get("errors")]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
