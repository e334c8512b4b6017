"""The server commands: what they start, and how they refuse to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest


def merganser(*arguments: str, tmp_path: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MERGANSER_")}
    return subprocess.run(
        [sys.executable, "-m", "service", *arguments],
        env={**environment, "MERGANSER_DATA_DIR": str(tmp_path), **settings},
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("command", ["serve", "worker"])
def test_the_split_commands_need_a_redis(command: str, tmp_path: Path) -> None:
    done = merganser(command, tmp_path=tmp_path)
    assert done.returncode == 2
    assert done.stderr.endswith("[redis_missing]\n")
    assert "MERGANSER_REDIS_URL" in done.stderr


@pytest.mark.parametrize("command", ["up", "serve"])
def test_the_api_is_not_opened_to_the_network_without_keys(command: str, tmp_path: Path) -> None:
    done = merganser(command, "--host", "0.0.0.0", "--port", "0", tmp_path=tmp_path, MERGANSER_AUTH="off")
    assert done.returncode == 2
    assert done.stderr.endswith("[settings_invalid]\n")


def test_a_port_out_of_range_names_the_setting(tmp_path: Path) -> None:
    done = merganser("up", "--port", "70000", tmp_path=tmp_path)
    assert done.returncode == 2
    assert "MERGANSER_PORT" in done.stderr


def test_up_serves_in_the_very_process_that_was_started_and_ends_on_sigterm(tmp_path: Path) -> None:
    """So that a supervisor's signals reach it, and the exit status is its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "service", "up", "--port", "0", "--data", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        state = tmp_path / "server.json"
        deadline = time.monotonic() + 60
        while not state.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        described = json.loads(state.read_text())
        assert described["pid"] == process.pid
        assert httpx.get(f"{described['url']}/healthz", trust_env=False).status_code == 200
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    assert described["url"] in printed
    assert not state.exists()
