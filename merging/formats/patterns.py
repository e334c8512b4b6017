"""``rank_pattern`` and ``alpha_pattern`` of PEFT, matched in bounded time.

PEFT 0.21 takes, for a module path, the first pattern in dict order for which Python's
``re.match(r"(.*\\.)?(" + pattern + r")$", path)`` succeeds. The patterns come from the uploaded file, so
they never reach a backtracking engine here: patterns that are plain paths are looked up in tables, the
others go to RE2, which runs in linear time. A pattern that the two engines would read differently is
refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NoReturn

import re2

from merging.errors import InputError

MAX_PATTERNS = 20_000
MAX_PATTERN_LENGTH = 512
MAX_REGEXES = 256
MAX_REGEX_LENGTH = 256
MAX_PROGRAM = 2_000
MAX_WORK = 500_000
"""Budget of one table, in units of about a microsecond in the worst case."""

# A path: an optional '^', then plain characters, escaped punctuation or '.' (any character), maybe '$'.
_PATH = re.compile(r"(\^?)((?:[A-Za-z0-9_\-.]|\\[.\-])++)\$?\Z")
# Where RE2 and Python's re disagree without either of them saying so; module paths are plain ASCII, so
# code point escapes (whose folded ranges are slow to compile) have no use either.
_AMBIGUOUS = re.compile(r"\[\[|\{,|\\[CQEpPzZxuU0-9]|--|&&|\|\||~~|[^\x20-\x7e]")


class PatternTable:
    """An ordered table pattern -> value with PEFT's look-up rule.

    ``field`` and ``file`` go into the errors. Raises :class:`InputError` with ``pattern_too_long``,
    ``too_many_patterns`` or ``pattern_unsupported``.
    """

    def __init__(self, patterns: Mapping[str, float], *, field: str, file: str) -> None:
        self._field, self._file = field, file
        self._values = list(patterns.values())
        self._anchored: dict[str, int] = {}
        # (length, places of the wild characters) -> masked text -> index of the first such pattern
        self._paths: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        self._regexes: list[tuple[int, re2._Regexp[str]]] = []
        self._work = 0
        if len(patterns) > MAX_PATTERNS:
            self._refuse("too_many_patterns", f"has {len(patterns)} patterns")
        for index, pattern in enumerate(patterns):
            self._add(index, pattern)

    def lookup(self, path: str, default: float) -> float:
        """The value of the first pattern that hits the module ``path``, else ``default``."""
        best = len(self._values)
        if not best:
            return default
        starts = [0, *(dot.end() for dot in re.finditer(r"\.", path))]
        for start in starts:
            suffix = path[start:]
            for wild, texts in self._paths.get(len(suffix), {}).items():
                self._spend(3)
                best = min(best, texts.get(_mask(suffix, wild), best))
        best = min(best, self._anchored.get(path, best))
        for index, regex in self._regexes:
            if index >= best:
                break
            self._spend(1 + regex.programsize * (len(path) + 1) // 500)
            if regex.fullmatch(path):
                best = index
        return default if best == len(self._values) else self._values[best]

    def _add(self, index: int, pattern: str) -> None:
        if len(pattern) > MAX_PATTERN_LENGTH:
            self._refuse("pattern_too_long", f"has a pattern of {len(pattern)} characters")
        plain = _PATH.match(pattern)
        if plain is None:
            self._add_regex(index, pattern)
            return
        text, wild = _literal(plain[2])
        if plain[1] and not wild:
            self._anchored.setdefault(text, index)
        elif plain[1]:
            self._add_regex(index, pattern)
        else:
            groups = self._paths.setdefault(len(text), {})
            groups.setdefault(wild, {}).setdefault(_mask(text, wild), index)

    def _add_regex(self, index: int, pattern: str) -> None:
        if len(pattern) > MAX_REGEX_LENGTH:
            self._refuse("pattern_too_long", f"has a pattern of {len(pattern)} characters")
        if len(self._regexes) >= MAX_REGEXES:
            self._refuse("too_many_patterns", f"has more than {MAX_REGEXES} regular expressions")
        wrapped = rf"(?:.*\.)?(?:{pattern})"
        options = re2.Options()
        options.log_errors = False
        options.max_mem = 1 << 18
        try:
            if _AMBIGUOUS.search(pattern):
                raise ValueError("not portable")
            re.compile(pattern)
            regex = re2.compile(wrapped, options)
            if regex.programsize > MAX_PROGRAM:
                raise ValueError("too complex")
            self._regexes.append((index, regex))
        except (re.error, re2.error, ValueError, OverflowError, RecursionError):
            self._refuse(
                "pattern_unsupported",
                f"has the pattern {pattern[:80]!r}, which is not a regular expression that can be "
                "matched in linear time",
            )

    def _spend(self, work: int) -> None:
        self._work += work
        if self._work > MAX_WORK:
            self._refuse("too_many_patterns", "has too many patterns for this many modules")

    def _refuse(self, code: str, what: str) -> NoReturn:
        raise InputError(
            code,
            f"{self._file}: {self._field} {what}",
            remedy="Write the patterns as full module paths with escaped dots",
            where={"file": self._file, "field": self._field},
        ) from None


def _literal(text: str) -> tuple[str, tuple[int, ...]]:
    """The characters of a path pattern and the places where '.' stands for any character."""
    characters: list[str] = []
    wild: list[int] = []
    escaped = False
    for character in text:
        if character == "\\" and not escaped:
            escaped = True
            continue
        if character == "." and not escaped:
            wild.append(len(characters))
        characters.append(character)
        escaped = False
    return "".join(characters), tuple(wild)


def _mask(text: str, wild: tuple[int, ...]) -> str:
    if not wild:
        return text
    characters = list(text)
    for place in wild:
        characters[place] = "."
    return "".join(characters)
