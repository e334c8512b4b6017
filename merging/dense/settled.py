"""What the passes over the whole model found, as data: kept by an attempt, handed to other processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from merging.entrywise import Whole


@dataclass(frozen=True)
class Settled:
    """``lambda``, a factor for each model, and what the surveys of the method found over all tensors.

    The default is for recipes that need no pass.
    """

    lambda_: float = 1.0
    scales: tuple[float, ...] = ()
    shared: Any = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, exact to the last bit. Raises :class:`TypeError` for findings of an unknown kind."""
        return {"lambda": self.lambda_, "scales": list(self.scales), "shared": _told(self.shared)}

    @classmethod
    def of(cls, data: dict[str, Any]) -> Settled:
        """The inverse of :meth:`to_dict`."""
        scales = tuple(float(scale) for scale in data["scales"])
        return cls(float(data["lambda"]), scales, _read(data.get("shared")))


def _told(shared: Any) -> Any:
    if shared is None:
        return None
    if isinstance(shared, Whole):
        squares = None if shared.squares is None else shared.squares.tolist()
        return {"inner": _told(shared.inner), "squares": squares, "sign": shared.sign}
    if isinstance(shared, dict) and all(isinstance(value, float | None) for value in shared.values()):
        return {"thresholds": [[task, value] for task, value in sorted(shared.items())]}
    raise TypeError(f"findings of the kind {type(shared).__name__} cannot be written down")


def _read(data: Any) -> Any:
    if data is None:
        return None
    if "thresholds" in data:
        return dict(data["thresholds"])
    squares = data["squares"]
    return Whole(
        _read(data["inner"]),
        None if squares is None else torch.tensor(squares, dtype=torch.float64),
        data["sign"],
    )
