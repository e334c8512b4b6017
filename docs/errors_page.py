"""Write ``docs/errors.md`` from the sources: ``python docs/errors_page.py [--check]``."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from error_codes import GAP, Raised, Sources

PAGE = Path(__file__).resolve().parent / "errors.md"
_MOST_MESSAGES = 3
_GROUPS = {
    "Requests and the service": ("service", "workers"),
    "Recipes, files and merges": ("merging",),
}
_HEAD = """<!-- Written by docs/errors_page.py from the sources. -->
# Errors

Every error has a `code` that does not change between releases. Over HTTP it stands in a problem document
(its `type` is `urn:merganser:problem:{code}`), on the command line at the end of the message. `…` stands for
names and numbers. The status is that of an answer; a merge that fails later keeps the problem as its `error`.
On the command line statuses below 500 exit with 2, others with 1.

What no route takes is answered with `bad_request` (400), `not_found` (404), `method_not_allowed` (405, with
`Allow`), `not_acceptable` (406), `length_required` (411), `too_large` (413), `unsupported_media_type` (415),
`range_not_satisfiable` (416) or `headers_too_large` (431).
"""


def page() -> str:
    """The text of the page."""
    rows = Sources().raised()
    parts = [_HEAD]
    seen: set[str] = set()
    for title, packages in _GROUPS.items():
        own = [row for row in rows if row.module.partition(".")[0] in packages and row.code not in seen]
        seen.update(row.code for row in own)
        parts.append(f"\n## {title}\n\n| code | status | says |\n| --- | --- | --- |\n")
        parts.extend(_row(code, [row for row in own if row.code == code]) for code in _codes(own))
    return "".join(parts)


def _codes(rows: list[Raised]) -> list[str]:
    return sorted({row.code for row in rows})


def _row(code: str, rows: list[Raised]) -> str:
    statuses = sorted({row.status for row in rows})
    messages = list(dict.fromkeys(_clean(row.message) for row in rows))
    told = [message for message in messages if re.search(r"[a-z]{3}", message)] or ["it says itself"]
    more = "; …" if len(told) > _MOST_MESSAGES else ""
    numbers = ", ".join(map(str, statuses))
    return f"| `{code}` | {numbers} | {'; or: '.join(told[:_MOST_MESSAGES])}{more} |\n"


def _clean(message: str) -> str:
    text = re.sub(rf"{GAP}(?:[.]?{GAP})+", GAP, " ".join(message.split()))
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").strip()


def main(arguments: list[str] | None = None) -> int:
    """Write the page, or say whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    text = page()
    if not options.check:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    sys.stderr.write(f"{PAGE} is out of date; run: python docs/errors_page.py\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
