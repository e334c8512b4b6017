"""What pydantic says of a document, as one sentence that names the field in its own terms. No torch here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

_BRANCH = re.compile(
    r"(literal|function|tagged|lax|constrained|nullable)[-\[]|(float|int|str|bool|tuple|dict|list)(\[|$)"
)
_SUBJECT = re.compile(r"^(?:Input|Tuple|List|Dictionary|String|Value|Data) should\b")
_COUNTED = re.compile(r" after validation, not (?:more than )?\d+$")


@dataclass(frozen=True)
class Complaint:
    """One thing that is wrong: the ``field`` (``a.0.b``), pydantic's ``kind`` and the whole ``sentence``."""

    field: str
    kind: str
    sentence: str


def complaint(error: ValidationError) -> Complaint:
    """The first complaint. Where a field may be one of several things, that which fits best is told."""
    errors = error.errors(include_url=False, include_input=False)
    places = [_place(one) for one in errors]
    first = places[0]
    below = [i for i, place in enumerate(places) if place[: len(first)] == first]
    deepest = max(below, key=lambda i: len(places[i]))
    if len(places[deepest]) > len(first):
        below = [deepest]
    place = places[below[0]]
    field = ".".join(place)
    texts = list(dict.fromkeys(_text(errors[i]) for i in below if places[i] == place))
    text = ", or ".join([texts[0], *(other.removeprefix("must be ") for other in texts[1:])])
    joint = " " if text.startswith(("must ", "is ")) else ": "
    return Complaint(field, errors[below[0]]["type"], f"{field or 'it'}{joint}{text}")


def misplaced(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Where a document holds what JSON cannot: the field and what is there."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from misplaced(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from misplaced(item, f"{place}.{index}")
    elif isinstance(value, float):
        if value - value != 0.0:
            yield place, f"{value}"
    elif not isinstance(value, str | int | bool | None):
        yield place, f"a {type(value).__name__}"


def _place(error: ErrorDetails) -> tuple[str, ...]:
    """The location without the names of the branches of a union, which pydantic puts among the keys."""
    parts = [str(part) for part in error["loc"]]
    own = error["type"] in ("extra_forbidden", "missing")
    return tuple(
        "".join(c if c.isprintable() else "?" for c in part[:200])
        for index, part in enumerate(parts)
        if not (_BRANCH.match(part) or (part[:1].isupper() and not (own and index == len(parts) - 1)))
    )


def _text(error: ErrorDetails) -> str:
    if error["type"] == "missing":
        return "is missing"
    text = _COUNTED.sub("", error["msg"].removeprefix("Value error, "))
    return _SUBJECT.sub("must", text)
