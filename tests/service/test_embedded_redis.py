"""The embedded Redis: private, durable, and gone with its owner."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import redis

from merging.errors import InputError
from service.embedded_redis import DataLock, EmbeddedRedis
from tests.running import ROOT, alive, until


def test_it_is_private_and_listens_on_no_port(tmp_path: Path) -> None:
    lock = DataLock(tmp_path / "d")
    server = EmbeddedRedis(tmp_path / "d", lock)
    server.start()
    try:
        assert stat.S_IMODE((tmp_path / "d").stat().st_mode) == 0o700
        assert stat.S_IMODE(server.socket.parent.stat().st_mode) == 0o700
        assert stat.S_IMODE(server.socket.stat().st_mode) == 0o700
        with redis.Redis.from_url(server.url) as client:
            config = client.config_get()
        assert config["port"] == "0"
        assert config["appendonly"] == "yes"
        assert config["appendfsync"] == "everysec"
        assert config["maxmemory-policy"] == "noeviction"
    finally:
        server.stop()
        lock.release()
    assert not server.socket.exists()


def test_a_killed_server_comes_back_with_its_data(tmp_path: Path) -> None:
    lock = DataLock(tmp_path)
    server = EmbeddedRedis(tmp_path, lock)
    server.start()
    with redis.Redis.from_url(server.url) as client:
        client.mset({f"k{i}": "v" for i in range(500)})
        os.kill(server.pid, signal.SIGKILL)
        until(lambda: not server.alive, what="the server is dead")
        server.start()
        assert client.dbsize() == 500
    server.stop()
    lock.release()


def test_a_long_path_gets_a_short_socket(tmp_path: Path) -> None:
    data = tmp_path / ("x" * 120)
    lock = DataLock(data)
    server = EmbeddedRedis(data, lock)
    server.start()
    assert len(str(server.socket)) < 100
    assert stat.S_IMODE(server.socket.parent.stat().st_mode) == 0o700
    server.stop()
    lock.release()
    server.socket.parent.rmdir()


def test_the_folder_belongs_to_one(tmp_path: Path) -> None:
    lock = DataLock(tmp_path)
    with pytest.raises(InputError) as raised:
        DataLock(tmp_path, patience=0.1)
    assert raised.value.code == "data_dir_in_use"
    lock.release()
    DataLock(tmp_path, patience=0).release()


OWNER = """
import sys, time
from pathlib import Path
from service.embedded_redis import DataLock, EmbeddedRedis
data = Path(sys.argv[1])
server = EmbeddedRedis(data, DataLock(data))
server.start()
print(server.pid, flush=True)
time.sleep(60)
"""


def test_it_dies_with_its_owner_and_frees_the_folder(tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    owner.kill()
    owner.wait()
    owner.stdout.close()
    until(lambda: not alive(pid), what="the server dies with its owner")
    DataLock(tmp_path, patience=30).release()
