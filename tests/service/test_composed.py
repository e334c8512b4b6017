"""The deployment of docker/compose.yaml as plain processes: its settings, its commands, no containers.

A Redis on TCP with a password and an append-only file, SeaweedFS as the store, the API (in an environment
without torch, as its image has none) and two workers.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import redis
import yaml
from adapters import write_adapter

from service.client import Client
from service.embedded_redis import find_binary
from tests.running import ROOT, push, until
from tests.seaweed import BUCKET, OWNER, Seaweed, seaweed  # noqa: F401 (fixture)

SERVICES = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Deployment:
    """Processes with the settings of compose.yaml, where the names of its hosts are ports of this machine."""

    folder: Path
    store: Seaweed
    password: str = field(default_factory=lambda: secrets.token_hex(16))
    redis_port: int = field(default_factory=free_port)
    port: int = field(default_factory=free_port)
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, service: str) -> dict[str, str]:
        values = {
            "REDIS_PASSWORD": self.password,
            "S3_ACCESS_KEY": OWNER[0],
            "S3_SECRET_KEY": OWNER[1],
            "PUBLIC_URL": self.url,
        }
        named = {
            name: re.sub(r"\$\{([A-Z0-9_]+)[^}]*\}", lambda match: values[match[1]], value)
            for name, value in SERVICES[service]["environment"].items()
        }
        named["MERGANSER_REDIS_URL"] = named["MERGANSER_REDIS_URL"].replace(
            "@redis:6379", f"@127.0.0.1:{self.redis_port}"
        )
        named["MERGANSER_S3_ENDPOINT"] = self.store.endpoint
        assert named["MERGANSER_STORAGE_URL"] == f"s3://{BUCKET}"
        named["MERGANSER_STORAGE_URL"] += f"/split/{secrets.token_hex(4)}"
        if service == "api":
            named |= {"MERGANSER_HOST": "127.0.0.1", "MERGANSER_PORT": str(self.port)}
        return {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **named}

    def start(self, name: str, command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, env=environment, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.running.append(process)
        return process

    def connection(self) -> redis.Redis:
        return redis.Redis(port=self.redis_port, password=self.password)

    def answers(self, path: str) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}{path}", trust_env=False, timeout=5).status_code == 200
        return False

    def logs(self) -> str:
        return "".join(path.read_text()[-3000:] for path in sorted(self.folder.glob("*.log")))


def without_torch(folder: Path) -> str:
    """A folder whose torch cannot be imported."""
    folder.mkdir()
    (folder / "torch.py").write_text("raise ImportError('the image of the API has no torch')\n")
    return str(folder)


def program(command: list[str]) -> list[str]:
    """The command of an image, run from this checkout."""
    assert command[0] == "merganser"
    return [sys.executable, "-m", "service", *command[1:]]


@pytest.fixture(scope="module")
def deployment(seaweed: Seaweed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:  # noqa: F811
    folder = tmp_path_factory.mktemp("split")
    made = Deployment(folder, seaweed)
    shell = SERVICES["redis"]["command"][2]
    options = re.findall(r"(--\S+) (\S+)", shell.replace('"$$REDIS_PASSWORD"', made.password))
    flags = [word for option in options for word in option]
    assert "--appendonly" in flags
    place = ["--port", str(made.redis_port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""]
    made.start("redis", [str(find_binary()), *flags, *place], {"PATH": os.environ["PATH"]})
    api = made.environment("api")
    storage = api["MERGANSER_STORAGE_URL"]
    api["MERGANSER_DATA_DIR"] = str(folder / "api")
    api["PYTHONPATH"] = f"{without_torch(folder / 'bare')}:{ROOT}"
    made.start("api", program(["merganser", "serve"]), api)
    for name in ("first", "second"):
        worker = made.environment("worker") | {"MERGANSER_DATA_DIR": str(folder / name)}
        worker["MERGANSER_STORAGE_URL"] = storage
        made.start(name, program(["merganser", "worker"]), worker)
    try:
        until(lambda: made.answers("/readyz"), what=f"the API is ready: {made.logs()}")
        with made.connection() as connection:
            until(lambda: connection.scard("rq:workers") == 2, what="both workers are registered")
        (folder / "storage").write_text(storage)
        yield made
    finally:
        own, server = made.running[1:], made.running[:1]
        for process in own:
            process.terminate()
        for process in [*own, *server]:  # Redis goes last, for workers say goodbye to it
            if process in server:
                process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def key(deployment: Deployment) -> str:
    """A key made as the head of compose.yaml says: by the command, with the settings of the API."""
    environment = deployment.environment("api")
    environment["MERGANSER_STORAGE_URL"] = (deployment.folder / "storage").read_text()
    environment["MERGANSER_DATA_DIR"] = str(deployment.folder / "api")
    done = subprocess.run(
        program(["merganser", "keys", "create", "--tenant", "acme", "--scope", "admin"]),
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout.strip()


def test_nobody_gets_in_without_the_password_or_a_key(deployment: Deployment) -> None:
    with redis.Redis(port=deployment.redis_port) as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()
    assert httpx.get(f"{deployment.url}/v1/models", trust_env=False).status_code == 401


def test_workers_are_well_as_their_health_check_sees_them(deployment: Deployment) -> None:
    environment = deployment.environment("worker")
    check = [sys.executable, "-m", "workers.health"]
    assert subprocess.run(check, env=environment, check=False, timeout=60).returncode == 0
    environment["MERGANSER_REDIS_URL"] = f"redis://:{deployment.password}@127.0.0.1:{deployment.redis_port}/1"
    assert subprocess.run(check, env=environment, check=False, timeout=60).returncode == 1


def test_two_workers_merge_what_came_through_the_api(
    deployment: Deployment, key: str, tmp_path: Path
) -> None:
    with Client(deployment.url, key=key) as client:
        models = [
            push(client, write_adapter(tmp_path / name, seed=seed), f"acme/{name}")
            for seed, name in enumerate("ab")
        ]
        recipe = {"merge_method": "linear", "models": [{"model": name} for name in models]}
        merges = [client.submit({**recipe, "seed": seed})["id"] for seed in range(4)]
        ended = [client.wait(merge) for merge in merges]
        assert [merge["state"] for merge in ended] == ["succeeded"] * 4, deployment.logs()
        result = client.download_result(merges[0], tmp_path / "result")
    assert (tmp_path / "result" / "adapter_model.safetensors").stat().st_size > 0, result
    assert not list((deployment.folder / "api").rglob("*.safetensors")), "files stay in the store"


def test_metrics_tell_of_both_workers(deployment: Deployment, key: str) -> None:
    answer = httpx.get(
        f"{deployment.url}/metrics", headers={"Authorization": f"Bearer {key}"}, trust_env=False
    )
    assert re.search(r"^merganser_workers 2(\.0)?$", answer.text, re.MULTILINE)
