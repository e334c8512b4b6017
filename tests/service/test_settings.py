"""Settings: checked once, refused with the name of the variable."""

from __future__ import annotations

from pathlib import Path

import pytest

from merging.errors import InputError
from service.settings import is_loopback, load_settings


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MERGANSER_PORT", "1234")
    monkeypatch.setenv("MERGANSER_DATA_DIR", str(tmp_path))
    settings = load_settings()
    assert (settings.port, settings.data_dir) == (1234, tmp_path)
    assert settings.storage_location == f"file://{tmp_path}/storage"
    assert load_settings(port=7).port == 7


@pytest.mark.parametrize(
    ("given", "variable"),
    [
        ({"host": "0.0.0.0", "auth": "off"}, "MERGANSER_HOST"),
        ({"host": "example.org", "auth": "off"}, "MERGANSER_HOST"),
        ({"port": 70000}, "MERGANSER_PORT"),
        ({"port": "http"}, "MERGANSER_PORT"),
        ({"redis_url": "http://x"}, "MERGANSER_REDIS_URL"),
        ({"public_url": "example.org"}, "MERGANSER_PUBLIC_URL"),
        ({"auth": "none"}, "MERGANSER_AUTH"),
        ({"max_upload_bytes": 0}, "MERGANSER_MAX_UPLOAD_BYTES"),
    ],
)
def test_bad_values_name_their_variable(given: dict[str, object], variable: str) -> None:
    with pytest.raises(InputError) as raised:
        load_settings(**given)
    assert raised.value.code == "settings_invalid"
    assert raised.value.where["field"] == variable


@pytest.mark.parametrize(
    ("given", "auth"),
    [
        ({}, "off"),
        ({"host": "::1"}, "off"),
        ({"host": "0.0.0.0"}, "keys"),
        ({"host": "example.org"}, "keys"),
        ({"public_url": "http://localhost:8000"}, "off"),
        ({"public_url": "https://merge.example.org"}, "keys"),
        ({"auth": "keys"}, "keys"),
    ],
)
def test_keys_are_needed_unless_only_this_machine_can_ask(given: dict[str, object], auth: str) -> None:
    assert load_settings(**given).auth == auth


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.example.org", False),
        ("", False),
    ],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
