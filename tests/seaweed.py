"""A real S3 store for tests: SeaweedFS on loopback, in one process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sysconfig
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import obstore
import pytest
from obstore.exceptions import BaseError
from obstore.store import S3Store

from service import deathsig
from service.addresses import with_parameters
from service.storage import Storage
from tests.running import until

OWNER = ("merganser-owner", "owner-secret-owner-secret")
READER = ("merganser-reader", "reader-secret-reader-secret")
REGION = "us-east-1"
BUCKET = "merganser"

_QUIET = (
    *("-master.telemetry=false", "-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0"),
    *("-s3.port.lance=0", "-s3.autoCreateBucket=false", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
    *("-master.volumeSizeLimitMB=64", "-volume.max=32", "-volume.preStopSeconds=0", f"-bucket={BUCKET}"),
)
_PORTS = ("master", "volume", "filer", "s3", "admin")


class Seaweed:
    """One server in a folder of its own. It can be stopped, frozen and started again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # its sockets have names of at most 107 bytes
        self._sockets = tempfile.TemporaryDirectory(prefix="seaweed-")
        names = [f"{name}.port{kind}" for name in _PORTS for kind in ("", ".grpc")]
        ports = dict(zip(names, _free_ports(len(names)), strict=True))
        self._ports = [f"-{name}={port}" for name, port in ports.items()]
        self.port = ports["s3.port"]
        self.process: subprocess.Popen[bytes] | None = None
        (folder / "s3.json").write_text(json.dumps(_identities()))
        self.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, identity: tuple[str, str] = OWNER) -> dict[str, str]:
        """What a process needs to use it, beside the URL of the storage."""
        return {
            "AWS_ACCESS_KEY_ID": identity[0],
            "AWS_SECRET_ACCESS_KEY": identity[1],
            "MERGANSER_S3_ENDPOINT": self.endpoint,
            "MERGANSER_S3_REGION": REGION,
        }

    def url(self) -> str:
        """A storage URL that nobody uses yet."""
        return f"s3://{BUCKET}/test/{uuid.uuid4().hex[:8]}"

    def storage(
        self, identity: tuple[str, str] = OWNER, *, bucket: str = BUCKET, patient: bool = False
    ) -> Storage:
        """A storage of its own in it, for this process."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environment(identity).items():
                patch.setenv(name, value)
            url = self.url().replace(BUCKET, bucket, 1)
            url = with_parameters(url, endpoint=self.endpoint, region=REGION)
            return Storage.open(url, patient=patient)

    def start(self) -> None:
        """Start it, again after :meth:`kill`, and wait until it serves."""
        command = [
            *(str(Path(sysconfig.get_path("scripts")) / "weed"), "mini", f"-dir={self._folder}"),
            *(f"-s3.config={self._folder / 's3.json'}", *self._ports, *_QUIET),
            f"-filer.localSocket={self._sockets.name}/filer",
            f"-s3.localSocket={self._sockets.name}/s3",
        ]
        if threading.current_thread() is threading.main_thread():  # it would end with any other thread
            command = deathsig.wrap(command)
        with (self._folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self._folder,
                env={name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        until(self._serves, what=f"SeaweedFS serves; {self._folder / 'log'} tells more")

    def _serves(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self._folder / "log").read_text()[-4000:]
        store = S3Store(
            BUCKET,
            endpoint=self.endpoint,
            region=REGION,
            access_key_id=OWNER[0],
            secret_access_key=OWNER[1],
            client_options={"allow_http": True, "timeout": "2s", "connect_timeout": "1s"},
            retry_config={"max_retries": 0},
        )
        try:
            obstore.put(store, "ready", b"ready")
        except (BaseError, FileNotFoundError):  # not there, or not its bucket
            return False
        return True

    def freeze(self) -> None:
        """Let it answer nothing, with its connections open."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it in the middle of whatever it does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def close(self) -> None:
        """End it for good."""
        self.kill()
        self._sockets.cleanup()


@contextmanager
def in_bucket(server: Seaweed, url: str) -> Iterator[None]:
    """The processes started meanwhile keep their objects there."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**server.environment(), "MERGANSER_STORAGE_URL": url}.items():
            patch.setenv(name, value)
        yield


def _identities() -> dict[str, object]:
    everything = ["Admin", "Read", "List", "Tagging", "Write"]
    return {
        "identities": [
            {
                "name": access,
                "credentials": [{"accessKey": access, "secretKey": secret}],
                "actions": actions,
            }
            for (access, secret), actions in ((OWNER, everything), (READER, ["Read", "List"]))
        ]
    }


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """One server for all tests of a process; each takes a prefix of its own."""
    server = Seaweed(tmp_path_factory.mktemp("seaweed"))
    yield server
    server.close()
