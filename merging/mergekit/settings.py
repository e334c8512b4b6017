"""Parameter values of a mergekit configuration: scalars, gradients over layers, filters by tensor name.

A value is a scalar, a list of scalars (a gradient: interpolated linearly over the layers of a slice), a
mapping ``{filter, value}`` or a list of such mappings, of which the first that applies counts. A filter is a
plain substring of the tensor's name, ``*`` or nothing applies to every tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from merging.errors import InputError

MAX_STEPS = 4096
MAX_CONDITIONS = 1024

Scalar = bool | int | float | str


@dataclass(frozen=True)
class Condition:
    """A value for the tensors whose names hold ``filter``; ``None`` holds for all."""

    filter: str | None
    value: Scalar | tuple[Scalar, ...]


@dataclass(frozen=True)
class Setting:
    """A parsed value: conditions in order, the first that applies counts."""

    conditions: tuple[Condition, ...]

    def at(self, tensor: str, t: float, cast: Callable[[Scalar], Any]) -> Any | None:
        """The value for a tensor at the place ``t`` (0 to 1) of its slice; ``None`` where none applies."""
        for condition in self.conditions:
            if condition.filter is None or condition.filter == "*" or condition.filter in tensor:
                return _value(condition.value, t, cast)
        return None

    def scalars(self) -> tuple[Scalar, ...]:
        """Every scalar in it."""
        found: list[Scalar] = []
        for condition in self.conditions:
            found.extend(condition.value if isinstance(condition.value, tuple) else (condition.value,))
        return tuple(found)


def parse(value: Any, field: str) -> Setting:
    """Raises ``mergekit_parameter_value`` naming ``field``."""
    if isinstance(value, dict):
        return Setting((_condition(value, field),))
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        if len(value) > MAX_CONDITIONS:
            raise _wrong(field, f"has {len(value)} filters; the limit is {MAX_CONDITIONS}")
        return Setting(tuple(_condition(item, f"{field}[{i}]") for i, item in enumerate(value)))
    return Setting((Condition(None, _plain(value, field)),))


def number(value: Scalar) -> float:
    """A finite float, as mergekit reads one. Raises :class:`ValueError`."""
    if isinstance(value, bool):
        raise ValueError("true and false are not numbers")
    try:
        found = float(value)
    except OverflowError:
        raise ValueError("it is too large") from None
    if not math.isfinite(found):
        raise ValueError(f"{value} is not finite")
    return found


def truth(value: Scalar) -> bool:
    """true or false, or 1 or 0. Raises :class:`ValueError`."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    raise ValueError(f"{value!r} is not true or false")


def _value(value: Scalar | tuple[Scalar, ...], t: float, cast: Callable[[Scalar], Any]) -> Any:
    if not isinstance(value, tuple):
        return cast(value)
    ends = [cast(item) for item in value]
    if not all(isinstance(item, float) for item in ends):
        return ends[int(t * (len(ends) - 1))]
    place = t * (len(ends) - 1)
    first = int(place)
    second = min(len(ends) - 1, first + 1)
    share = place - first
    return (1 - share) * ends[first] + share * ends[second]


def _condition(value: dict[Any, Any], field: str) -> Condition:
    unknown = [key for key in value if key not in ("filter", "value")]
    if unknown:
        raise _wrong(field, f"has the unknown key {unknown[0]!r}; a filter has `filter` and `value`")
    if "value" not in value:
        raise _wrong(field, "has no `value`")
    wanted = value.get("filter")
    if wanted is not None and (not isinstance(wanted, str) or len(wanted) > 1024):
        raise _wrong(f"{field}.filter", "must be a part of a tensor name")
    return Condition(wanted, _plain(value["value"], f"{field}.value"))


def _plain(value: Any, field: str) -> Scalar | tuple[Scalar, ...]:
    if isinstance(value, bool | int | float | str):
        return value
    if (
        isinstance(value, list)
        and value
        and all(isinstance(item, bool | int | float | str) for item in value)
    ):
        if len(value) > MAX_STEPS:
            raise _wrong(field, f"has {len(value)} steps; the limit is {MAX_STEPS}")
        return tuple(value)
    raise _wrong(field, "must be a scalar, a list of scalars or a list of {filter, value}")


def _wrong(field: str, problem: str) -> InputError:
    return InputError("mergekit_parameter_value", f"{field} {problem}", where={"field": field})
