"""Streaming statistics of the inputs of layers: Gram matrices, row sketches, means.

Padding does not count, products are accumulated in float32, and every row weighs the same, so that a
sample counts by its tokens (or once, for ``rows: samples``). Layers that read one tensor share its
statistics.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from merging.calibration.base import Base, first_pass
from merging.calibration.samples import Samples
from merging.calibration.settings import CalibrationSettings
from merging.errors import InputError


@dataclass
class GramSum:
    """``X^T X`` and the sum of the rows seen so far."""

    gram: Tensor
    total: Tensor
    count: int = 0

    @classmethod
    def empty(cls, n: int, device: torch.device) -> GramSum:
        return cls(torch.zeros(n, n, device=device), torch.zeros(n, dtype=torch.float64, device=device))

    def add(self, rows: Tensor) -> None:
        """Rows ``(k, n)`` in float32."""
        self.gram.addmm_(rows.mT, rows)
        self.total += rows.sum(0, dtype=torch.float64)
        self.count += len(rows)

    def matrix(self) -> Tensor:
        """``X^T X / count``, ``(n, n)``, exactly symmetric."""
        return (self.gram + self.gram.mT) / (2 * self.count)

    def mean(self) -> Tensor:
        return (self.total / self.count).float()


@dataclass
class Sketch:
    """At most ``size`` rows ``S`` with ``S^T S`` near ``X^T X``: frequent directions (Liberty 2013).

    Exact while no more than ``size`` rows were seen; afterwards ``0 <= X^T X - S^T S <= |X|^2 / size``.
    """

    size: int
    total: Tensor
    rows: Tensor
    count: int = 0

    @classmethod
    def empty(cls, n: int, size: int, device: torch.device) -> Sketch:
        total = torch.zeros(n, dtype=torch.float64, device=device)
        return cls(size, total, torch.zeros(0, n, device=device))

    def add(self, rows: Tensor) -> None:
        self.total += rows.sum(0, dtype=torch.float64)
        self.count += len(rows)
        self.rows = torch.cat([self.rows, rows])
        if len(self.rows) > 2 * self.size:
            self._shrink()

    def matrix(self) -> Tensor:
        """``S / sqrt(count)``, ``(min(size, count), n)``."""
        if len(self.rows) > self.size:
            self._shrink()
        wanted = min(self.size, self.count)
        missing = self.rows.new_zeros(wanted - len(self.rows), self.rows.shape[1])
        return torch.cat([self.rows, missing]).div(math.sqrt(self.count))

    def mean(self) -> Tensor:
        return (self.total / self.count).float()

    def _shrink(self) -> None:
        _, S, Vh = torch.linalg.svd(self.rows.double(), full_matrices=False)
        cut = S[self.size] if len(S) > self.size else S.new_zeros(())
        kept: Tensor = (S[: self.size] ** 2 - cut**2).clamp_min(0.0).sqrt()
        self.rows = (kept.unsqueeze(-1) * Vh[: self.size]).float()


@dataclass
class Watch:
    """Collects the rows that reach each layer; ``shared`` maps a layer to the one whose input it reads."""

    label: str
    settings: CalibrationSettings
    shared: dict[str, str] = field(default_factory=dict)
    sums: dict[str, GramSum | Sketch] = field(default_factory=dict)
    mask: Tensor | None = None
    looking: bool = True
    _seen: list[tuple[Tensor, str]] = field(default_factory=list)

    def __call__(self, name: str, x: Tensor, _y: Tensor) -> None:
        if self.looking:
            self._look(name, x)
        else:
            self.sums[name].add(self._rows(name, x))

    def looked(self) -> list[str]:
        """End the first pass, which only looks; the layers whose inputs are to be summed."""
        self.looking = False
        self._seen.clear()
        return sorted(set(self.shared.values()))

    def _look(self, name: str, x: Tensor) -> None:
        self._rows(name, x)
        for known, first in self._seen:
            if known is x:
                self.shared[name] = first
                return
        self._seen.append((x, name))  # kept alive: identity must mean sameness
        self.shared[name] = name

    def start(self, name: str, n: int, device: torch.device) -> None:
        """Begin the sum of one layer's input."""
        gram = self.settings.statistic == "gram"
        self.sums[name] = (
            GramSum.empty(n, device) if gram else Sketch.empty(n, self.settings.sketch_rows, device)
        )

    def _rows(self, name: str, x: Tensor) -> Tensor:
        """The rows ``(k, n)`` that count. Raises ``activations_not_finite``."""
        rows = x.detach().float()
        if rows.ndim == 2 and self.mask is not None and len(rows) == self.mask.numel():
            rows = rows.view(*self.mask.shape, -1)  # some models put the tokens of all samples in one list
        if rows.ndim == 3 and self.mask is not None and rows.shape[:2] == self.mask.shape:
            keep = self.mask.to(rows.device).bool()
            if self.settings.rows == "samples":
                weight = keep.unsqueeze(-1)
                rows = (rows * weight).sum(1) / weight.sum(1).clamp_min(1)
            else:
                rows = rows[keep]
        elif rows.ndim == 3 and self.settings.rows == "samples":
            rows = rows.mean(1)
        rows = rows.reshape(-1, rows.shape[-1])
        if not bool(torch.isfinite(rows).all()):
            raise InputError(
                "activations_not_finite",
                f"the input of {name} is NaN or infinite on the samples of {self.label}",
                remedy="Look at the base model and the adapter: one of them diverges on these samples.",
                where={"module": name, "model": self.label},
            )
        return rows


def batches(count: int, size: int) -> list[range]:
    """Index ranges of at most ``size``."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def look(base: Base, samples: Samples, watch: Watch, replaced: Mapping[str, Tensor]) -> None:
    """A first pass over one batch: which layers share an input, and whether all is finite."""
    first = samples.batch(batches(len(samples), watch.settings.batch_size)[0])
    watch.mask = first.get("attention_mask")
    with torch.no_grad(), base.hooked(watch), first_pass(watch.label):
        base.run(first, replaced)
    unseen = [name for name in base.layers if name not in watch.shared]
    if unseen:
        raise InputError(
            "module_not_reached",
            f"no sample of {watch.label} reaches {unseen[0]}",
            remedy="The layer is not part of the base model's encoder; leave it out of the merge.",
            where={"module": unseen[0], "model": watch.label},
        )


def collect(
    base: Base, samples: Samples, watch: Watch, replaced: Mapping[str, Tensor], sizes: Mapping[str, int]
) -> Iterator[int]:
    """Sum over all samples; yields after each batch how many samples are done."""
    names = watch.looked()
    for name in names:
        watch.start(name, sizes[name], base.device)
    for indices in batches(len(samples), watch.settings.batch_size):
        batch = samples.batch(indices)
        watch.mask = batch.get("attention_mask")
        with torch.no_grad(), base.hooked(watch, names):
            base.run(batch, replaced)
        yield indices.stop
