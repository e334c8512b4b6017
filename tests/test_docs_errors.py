"""docs/errors.md names every error that is raised on purpose, with its status."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_LITERAL = re.compile(
    r"\b(?:InputError|MergeFailure|ServiceError|NotFound|Conflict|BadRequest|TooLarge|Forbidden|Unauthorized|"
    r"NoSpace|Unavailable|Gone)\(\s*\"([a-z][a-z0-9_]+)\""
)


@pytest.fixture(scope="module")
def rows() -> dict[str, set[int]]:
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| `([a-z0-9_]+)` \| ([0-9, ]+) \|", text, flags=re.MULTILINE)
    return {code: {int(status) for status in statuses.split(",")} for code, statuses in found}


def test_the_page_has_the_codes_and_statuses_of_the_sources(
    rows: dict[str, set[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import error_codes

    raised: dict[str, set[int]] = {}
    for item in error_codes.Sources().raised():
        raised.setdefault(item.code, set()).add(item.status)
    sys.modules.pop("error_codes")
    assert {code: rows.get(code) for code in raised} == raised, "run: python docs/errors_page.py"
    assert sorted(rows.keys() - raised.keys()) == [], "run: python docs/errors_page.py"


@pytest.mark.parametrize("package", ["merging", "service", "workers"])
def test_the_page_has_every_code_that_is_written_where_it_is_raised(
    rows: dict[str, set[int]], package: str
) -> None:
    written = {
        code for path in (ROOT / package).rglob("*.py") for code in _LITERAL.findall(path.read_text("utf-8"))
    }
    assert sorted(written - rows.keys()) == []


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("rate_limited", 429),  # of a class that knows its code
        ("range_not_satisfiable", 416),
        ("safetensors_overlap", 422),  # made of two parts
        ("recipe_missing_key", 422),  # chosen between two
        ("pickle_not_accepted", 422),  # given to a function that raises
        ("merge_not_found", 404),
    ],
)
def test_codes_are_found_however_they_are_raised(rows: dict[str, set[int]], code: str, status: int) -> None:
    assert status in rows[code]
