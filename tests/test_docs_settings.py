"""Names of settings in pages, examples and docker/ exist, and every setting is on some page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from service import cli_client
from service.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {f"MERGANSER_{name.upper()}" for name in Settings.model_fields}
CLIENT = set(re.findall(r"\"(MERGANSER_[A-Z_]+)\"", Path(cli_client.__file__).read_text(encoding="utf-8")))
"""What the client commands read."""
TESTS = {"MERGANSER_TEST_INSTALL"}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
PLACES = sorted(
    path
    for path in [*PAGES, ROOT / "Makefile", *(ROOT / "docker").rglob("*"), *(ROOT / "examples").rglob("*")]
    if path.is_file() and path.suffix not in (".safetensors", ".pyc")
)


def named(path: Path) -> set[str]:
    return set(re.findall(r"\bMERGANSER_[A-Z0-9_]+\b", path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "path", [path for path in PLACES if named(path)], ids=lambda path: str(path.relative_to(ROOT))
)
def test_a_name_of_a_setting_exists(path: Path) -> None:
    assert named(path) <= SETTINGS | CLIENT | TESTS


def test_the_client_has_settings() -> None:
    assert CLIENT


@pytest.mark.parametrize("name", sorted(SETTINGS | CLIENT))
def test_a_setting_is_on_a_page(name: str) -> None:
    assert any(name in named(page) for page in PAGES), f"{name} is described nowhere"
