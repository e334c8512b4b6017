"""What a kernel that looks at data sees: statistics per module and task, or an adaptation to the samples."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from merging.calibration import measure
from merging.calibration.outlook import outlook
from merging.calibration.statistics_file import StatisticsFile
from merging.catalog.data import AdarankParams
from merging.methods.adarank import Components
from merging.preparing import Prepared


class Steps(Protocol):
    """Counts steps and tells of them; may raise to stop the merge."""

    def tick(self, phase: str, message: str = "") -> None: ...


class Calibration:
    """The data of one merge, on ``device``. ``facts`` is what the report says of it.

    ``folder`` holds files for the time of the merge. ``checkpoint`` is where an adaptation keeps its
    state, so that a later attempt of the same merge goes on from there.
    """

    def __init__(
        self, prepared: Prepared, folder: Path, device: torch.device, checkpoint: Path | None = None
    ) -> None:
        assert prepared.inputs is not None
        self.prepared = prepared
        self.inputs = prepared.inputs
        modules = {name: prepared.module(name) for name in prepared.table.modules}
        outlook(self.inputs, modules, prepared.resolved.params)  # refuses what is too large
        self.folder = folder
        self.device = device
        self.checkpoint = checkpoint
        self.facts: dict[str, Any] = {}
        self._files: tuple[StatisticsFile, ...] = ()
        self._steps: Steps | None = None

    @property
    def ticks(self) -> int:
        """How many steps the preparation and the adaptation take."""
        if self.inputs.entropy:
            params = self.prepared.resolved.params
            assert isinstance(params, AdarankParams)
            return params.steps
        return measure.ticks(self.prepared)

    def start(self, steps: Steps) -> None:
        """Compute the statistics that the recipe does not bring."""
        self._steps = steps
        if self.inputs.entropy:
            return

        def tick(message: str) -> None:
            steps.tick("calibrate", message)

        written = measure.measure(self.prepared, self.folder, self.device, tick)
        self._files = measure.opened(written, self.prepared)
        self.facts = {
            "features": self.inputs.features,
            "tasks": [
                {
                    "model": label,
                    "data": file.info.data,
                    "base": file.info.base,
                    "samples": file.info.samples,
                    "rows": file.info.rows,
                    "row": file.info.row,
                    "statistic": file.info.statistic,
                }
                for label, file in zip(self.prepared.labels, self._files, strict=True)
            ],
        }

    # statistics

    def gram(self, name: str, task: int) -> Tensor:
        """``X^T X / rows`` of the inputs of a module, ``(n, n)`` on the CPU."""
        return self._files[task].gram(name)

    def mean(self, name: str, task: int) -> Tensor:
        """The mean input of a module, ``(n,)`` on the CPU."""
        return self._files[task].mean(name)

    def output_gram(self, name: str, task: int) -> Tensor:
        """The Gram matrix of the gradients at the output of a module, ``(m, m)`` on the CPU."""
        return self._files[task].output_gram(name)

    # adaptation

    def adapt(
        self,
        components: Sequence[Components],
        params: AdarankParams,
        seed: int,
        warn: Callable[[str, str], None],
    ) -> Mapping[str, Tensor]:
        """Minimise entropy on the samples; what each component of each module is multiplied by."""
        from merging.calibration.entropy import adapt

        assert self._steps is not None
        factors, self.facts = adapt(self, components, params, seed, warn, self._steps)
        return factors

    def close(self) -> None:
        for task, file in enumerate(self._files):
            if self.inputs.statistics[task] is None:
                file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def calibrated(
    prepared: Prepared, folder: Path, device: torch.device, checkpoint: Path | None
) -> Iterator[Calibration | None]:
    """The data of a merge for as long as it runs; None for methods that look at none."""
    if prepared.inputs is None:
        yield None
        return
    with (
        tempfile.TemporaryDirectory(prefix=".calibration-", dir=folder) as scratch,
        Calibration(prepared, Path(scratch), device, checkpoint) as data,
    ):
        yield data
