"""Where workers run: devices, environment, scratch folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from merging.errors import InputError
from service.scratch import Scratch, sweep
from service.settings import load_settings
from tests.running import ROOT
from workers import devices
from workers import environment as env


def test_scratch_folders_of_the_dead_are_swept(tmp_path: Path) -> None:
    code = (
        "import sys, os, pathlib; from service.scratch import Scratch;"
        "s = Scratch(pathlib.Path(sys.argv[1])); (s.path / 'x').write_text('x'); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, cwd=ROOT)
    living = Scratch(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert sweep(tmp_path) == 1
    assert list(tmp_path.iterdir()) == [living.path]
    living.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_whose_owner_died_while_removing_it_is_swept(tmp_path: Path) -> None:
    young, old = tmp_path / "work-young", tmp_path / "work-old"
    for folder in (young, old):
        folder.mkdir()
        (folder / "result").write_text("x")
    os.utime(old, (0, 0))
    assert sweep(tmp_path) == 1
    assert list(tmp_path.iterdir()) == [young]


class TestDevices:
    """From the setting to workers."""

    def test_lists(self) -> None:
        found = devices.parse("cpu, cuda:1,cuda")
        assert found == (devices.Device("cpu"), devices.Device("cuda", "1"), devices.Device("cuda", "0"))

    @pytest.mark.parametrize("text", ["", "gpu", "cuda:x", "cpu,,cpu", "cuda:-1"])
    def test_nonsense(self, text: str) -> None:
        with pytest.raises(InputError) as raised:
            devices.parse(text)
        assert raised.value.code == "devices_invalid"

    def test_auto_takes_what_is_visible(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1,3")
        assert [device.gpu for device in devices.parse("auto")] == ["GPU-1", "3"]
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert devices.parse("auto") == (devices.Device("cpu"),)


def test_a_worker_gets_the_settings_and_one_thread(tmp_path: Path) -> None:
    settings = load_settings(data_dir=tmp_path, redis_url="unix:///x.sock")
    environment = env.child(settings, EXTRA="1")
    assert environment["OMP_NUM_THREADS"] == "1"
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    assert environment["EXTRA"] == "1"
    names = {name: value for name, value in environment.items() if name.startswith("MERGANSER_")}
    code = "import json; from service.settings import load_settings; print(load_settings().model_dump_json())"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**environment, **names}, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == json.loads(settings.model_dump_json())
