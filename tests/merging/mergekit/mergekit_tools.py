"""Run mergekit configurations on small checkpoints, and the outputs mergekit itself gave for them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from merging.formats.guard import check_safetensors
from merging.formats.header import TensorInfo
from merging.mergekit import reader as configs
from merging.mergekit.arithmetic import TORCH, Work, merge
from merging.mergekit.entries import Held
from merging.mergekit.schedule import Schedule, schedule

DATA = Path(__file__).parent / "data"


def cases() -> dict[str, Any]:
    return dict(yaml.safe_load((DATA / "cases.yaml").read_text()))


def facts() -> dict[str, Any]:
    return dict(json.loads((DATA / "mergekit.json").read_text()))


def reference(case: str) -> dict[str, Tensor]:
    """What mergekit wrote for a case."""
    found = load_file(DATA / "mergekit.safetensors")
    return {k.removeprefix(f"{case}/"): v for k, v in found.items() if k.startswith(f"{case}/")}


@dataclass
class Checkpoints:
    """Checkpoint folders by the names that configurations use."""

    folder: Path

    def files(self, name: str) -> list[Path]:
        return sorted((self.folder / name).glob("*.safetensors"))

    def header(self, name: str) -> Mapping[str, TensorInfo]:
        found: dict[str, TensorInfo] = {}
        for file in self.files(name):
            found |= check_safetensors(file).tensors
        return found

    def tensors(self, name: str) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for file in self.files(name):
            with safe_open(file, "pt") as handle:
                found |= {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
        return found

    def schedule(self, document: Mapping[str, Any]) -> Schedule:
        config = configs.parse(document)
        return schedule(config, {name: self.header(name) for name in config.models})

    def merge(self, document: Mapping[str, Any], seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        """Every output tensor by its name."""
        table = self.schedule(document)
        held = {name: self.tensors(name) for name in table.config.models}
        for output in table.outputs:
            work = Work(output, table.config.method, seed, tuple(item.model for item in output.inputs))
            parts: list[Tensor] = []
            rows = [Held(held[item.model][item.tensor]) for item in output.inputs]
            merge(work, rows, lambda start, part: parts.append(part.clone()))  # noqa: B023
            yield output.name, torch.cat(parts).to(TORCH[output.out_dtype]).view(output.shape)


def units_apart(x: Tensor, y: Tensor) -> Tensor:
    """How many representable numbers lie between two 16-bit tensors, entry by entry."""
    return (_ordered(x) - _ordered(y)).abs()


def _ordered(x: Tensor) -> Tensor:
    bits = x.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)
