"""Models of the Hub by reference; the client is replaced, nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from merging.errors import InputError
from merging.hub import snapshot
from merging.preparing import local_path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, str | None]]:
    calls: list[tuple[str, str | None]] = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert not any(pattern.endswith((".bin", ".pt", ".py", "*")) for pattern in allow_patterns)
        calls.append((name, revision))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


def test_a_reference_names_a_repository_and_a_revision(
    asked: list[tuple[str, str | None]], tmp_path: Path
) -> None:
    assert local_path("hf://org/base") == tmp_path
    assert local_path("hf://org/base@v1.0") == tmp_path
    assert asked == [("org/base", None), ("org/base", "v1.0")]


@pytest.mark.parametrize("reference", ["hf://base", "hf://org/base/more", "hf://../base", "hf://org/b@"])
def test_other_forms_are_refused(asked: list[tuple[str, str | None]], reference: str) -> None:
    with pytest.raises(InputError) as caught:
        snapshot(reference)
    assert caught.value.code == "model_reference_invalid"
    assert asked == []


def test_an_error_of_the_client_is_one_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **more: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError) as caught:
        snapshot("hf://org/base")
    assert caught.value.code == "hub_failed"
