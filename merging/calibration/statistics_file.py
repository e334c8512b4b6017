"""The file format of activation statistics of one task: checked by its header, no torch at import.

``statistics.safetensors`` holds for every layer input ``<source>.gram (n, n)`` (or ``<source>.sketch (k,
n)``) and ``<source>.mean (n,)``, each divided by the number of rows, so that ``gram = X^T X / rows``.
Layers that read one input share a ``source``. ``<module>.output_gram (m, m)`` of output gradients may be
there too (for ``mats``). The header says which base model, adapter and samples it is of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from merging.errors import InputError
from merging.formats.guard import check_safetensors
from merging.formats.tensors import TensorFile
from merging.formats.writer import TensorSpec

if TYPE_CHECKING:
    import torch

METADATA_KEY = "merganser.statistics"
HEX = r"^[0-9a-f]{64}$"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StatisticsModule(_Strict):
    """One layer: its sizes and the name under which the statistics of its input stand."""

    m: int = Field(ge=1)
    n: int = Field(ge=1)
    source: str = Field(min_length=1, max_length=1024)


class StatisticsInfo(_Strict):
    """What the header says. ``model`` is the digest of the adapter that was active, if one was."""

    version: Literal[1] = 1
    base: str = Field(pattern=HEX)
    base_model: str | None = Field(default=None, max_length=1024)
    features: Literal["base", "model"]
    model: str | None = Field(default=None, pattern=HEX)
    data: str = Field(pattern=HEX)
    samples: int = Field(ge=1)
    rows: int = Field(ge=1)
    row: Literal["tokens", "samples"]
    statistic: Literal["gram", "sketch"]
    sketch_rows: int | None = None
    modules: Mapping[str, StatisticsModule] = Field(min_length=1)

    def specs(self) -> list[TensorSpec]:
        """The tensors of the file that every layer input has, in order."""
        sizes = {module.source: module.n for module in self.modules.values()}
        specs = []
        for source, n in sorted(sizes.items()):
            k = n if self.statistic == "gram" else min(self.sketch_rows or n, self.rows)
            specs += [
                TensorSpec(f"{source}.{self.statistic}", "F32", (k, n)),
                TensorSpec(f"{source}.mean", "F32", (n,)),
            ]
        return specs


class StatisticsFile:
    """An opened statistics file; only its header has been read.

    Raises :class:`InputError` ``statistics_not_found``, ``statistics_invalid``, and the codes of the guard.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(
                "statistics_not_found",
                f"there is no statistics file at {path}",
                remedy="`merganser stats RECIPE --out DIR` writes them.",
                where={"file": str(path), "field": "statistics"},
            )
        header = check_safetensors(self.path)
        self._file = TensorFile(self.path, header)
        text = header.metadata.get(METADATA_KEY)
        if text is None:
            raise self._invalid("it does not describe statistics")
        try:
            self.info = StatisticsInfo.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise self._invalid(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        found = dict(header.tensors)
        for spec in self.info.specs():
            info = found.pop(spec.name, None)
            if info is None or info.shape != spec.shape or info.dtype not in ("F32", "F64"):
                raise self._invalid(f"the tensor {spec.name} is missing or does not fit the description")
        for name, info in found.items():
            module = self.info.modules.get(name.removesuffix(".output_gram"))
            if module is None or not name.endswith(".output_gram") or info.shape != (module.m, module.m):
                raise self._invalid(f"the tensor {name} does not belong there")

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the file."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def has_output_grams(self) -> bool:
        """Whether every layer has a Gram matrix of output gradients."""
        return all(f"{name}.output_gram" in self._file.header.tensors for name in self.info.modules)

    def gram(self, name: str) -> torch.Tensor:
        """``X^T X / rows`` of the input of a layer, ``(n, n)``; from the sketch where there is no more."""
        source = self.info.modules[name].source
        if self.info.statistic == "sketch":
            rows = self._read(f"{source}.sketch", name)
            return rows.mT @ rows
        gram = self._read(f"{source}.gram", name)
        return (gram + gram.mT) / 2

    def mean(self, name: str) -> torch.Tensor:
        """The mean input of a layer, ``(n,)``."""
        return self._read(f"{self.info.modules[name].source}.mean", name)

    def output_gram(self, name: str) -> torch.Tensor:
        """The Gram matrix of the gradients at the output of a layer, ``(m, m)``."""
        gram = self._read(f"{name}.output_gram", name)
        return (gram + gram.mT) / 2

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, key: str, module: str) -> torch.Tensor:
        import torch

        tensor = self._file.tensor(key)
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(
                "statistics_not_finite",
                f"{self.path.name}: the tensor {key} holds NaN or infinite values",
                where={"file": self.path.name, "module": module},
            )
        return tensor

    def _invalid(self, reason: str) -> InputError:
        return InputError(
            "statistics_invalid",
            f"{self.path.name} is not a valid statistics file: {reason}",
            where={"file": str(self.path), "field": "statistics"},
        )
