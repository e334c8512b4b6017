"""What evaluated parameters and dtypes must satisfy before any work. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merging.errors import InputError
from merging.mergekit.methods import Values


def promoted(dtypes: list[str]) -> str:
    """The dtype that holds all: that of the inputs if they agree, F32 for F16 with BF16."""
    if len(dtypes) == 1:
        return dtypes[0]
    return "F64" if "F64" in dtypes else "F32"


def check_ranges(method: str, tensor: str, values: Values) -> None:
    """Raises ``mergekit_parameter_range`` for a value that has no meaning."""
    for each in values.inputs:
        density, gamma = each.get("density"), each.get("gamma")
        if density is not None and density < 0.0:
            raise _range(method, tensor, f"density {density} is negative")
        if gamma is not None and not 0.0 <= gamma <= 1.0:
            raise _range(method, tensor, f"gamma {gamma} is not between 0 and 1")
        _check_epsilon(method, tensor, each)


def _check_epsilon(method: str, tensor: str, values: Mapping[str, Any]) -> None:
    density, epsilon = values.get("density"), values.get("epsilon")
    if density is None or epsilon is None or not 0.0 < density < 1.0:
        return
    if density - epsilon <= 0.0 or density + epsilon >= 1.0:
        raise _range(method, tensor, f"density {density} plus or minus epsilon {epsilon} leaves 0 to 1")


def _range(method: str, tensor: str, problem: str) -> InputError:
    return InputError(
        "mergekit_parameter_range",
        f"{method}, {tensor}: {problem}",
        where={"field": "parameters", "module": tensor},
    )
