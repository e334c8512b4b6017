"""Small reference outputs of mergekit, made by running it: ``python -m benchmarks.mergekit_golden FOLDER``.

Needs a Python that has mergekit 0.1.5, which is no dependency of this project. Two things about mergekit are
left to chance and pinned here from outside: its sorts are made stable (equal magnitudes are taken lowest
index first; unpatched, the order depends on the processor), and its random masks are drawn from the streams
that Merganser draws them from. All else is mergekit as released.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file

from benchmarks.checkpoint_inputs import SHAPES, write_checkpoints
from merging.rules import task_bits

CASES = Path(__file__).resolve().parents[1] / "tests" / "merging" / "mergekit" / "data" / "cases.yaml"
SEED = 0


class Pinned:
    """mergekit's tie order and random masks made reproducible."""

    def __init__(self, keys: dict[str, str] | None = None) -> None:
        self.keys = keys or {}
        """What stands for the content of a model, by its path; its name otherwise."""
        self.tensor = ""
        self.inputs: Iterator[str] = iter(())

    def install(self) -> None:
        """Wrap the functions of torch that mergekit calls, and the method that calls them."""
        from mergekit.merge_methods.generalized_task_arithmetic import (
            GeneralizedTaskArithmeticMerge as Family,
        )

        argsort, sort, merge_group = torch.argsort, torch.sort, Family.merge_group

        def stable_argsort(x: torch.Tensor, dim: int = -1, descending: bool = False) -> torch.Tensor:
            return argsort(x, dim=dim, descending=descending, stable=True)

        def method_argsort(x: torch.Tensor, dim: int = -1, descending: bool = False) -> torch.Tensor:
            return argsort(x, dim=dim, descending=descending, stable=True)

        def stable_sort(x: torch.Tensor, dim: int = -1, descending: bool = False) -> Any:
            return sort(x, dim=dim, descending=descending, stable=True)

        def first_topk(x: torch.Tensor, k: int, largest: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
            order = argsort(x, descending=largest, stable=True)[:k]
            return x[order], order

        def told(method: Any, group: Any, /, **parameters: Any) -> torch.Tensor:
            self.tensor = group.metadata.name
            dense = parameters["density"]
            self.inputs = iter(self.key(str(e.id)) for e in group.non_base if dense[e.id] < 1)
            return merge_group(method, group, **parameters)

        torch.argsort, torch.sort, torch.topk = stable_argsort, stable_sort, first_topk
        torch.Tensor.argsort = method_argsort
        torch.bernoulli = self.bernoulli
        Family.merge_group = told

    def key(self, model: str) -> str:
        """The key of a model's streams."""
        return self.keys.get(model, Path(model).name)

    def bernoulli(self, chances: torch.Tensor) -> torch.Tensor:
        """Ones where the next number of the input's stream is below the chance."""
        bits = task_bits(SEED, next(self.inputs), self.tensor)
        size = chances.numel()
        drawn = bits.random_raw((size + 1) // 2).view(np.uint32)[:size].astype(np.float64)
        keep = drawn < chances.double().numpy().reshape(-1) * 2.0**32
        return torch.from_numpy(keep).reshape(chances.shape).to(chances.dtype)


def main(folder: Path) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    Pinned().install()
    torch.set_num_threads(1)
    cases = yaml.safe_load(CASES.read_text())
    found: dict[str, torch.Tensor] = {}
    facts: dict[str, Any] = {"mergekit": "0.1.5", "torch": torch.__version__, "inputs": {}, "cases": {}}
    with tempfile.TemporaryDirectory() as scratch:
        for path in write_checkpoints(Path(scratch) / "in", SHAPES["tiny"]):
            facts["inputs"][path.name] = digest(path)
        for name, text in cases.items():
            config = MergeConfiguration.model_validate(placed(text, Path(scratch) / "in"))
            out = Path(scratch) / name
            run_merge(
                config, str(out), MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
            )
            tensors = load_file(out / "model.safetensors")
            layers = json.loads((out / "config.json").read_text())["num_hidden_layers"]
            facts["cases"][name] = {"tensors": len(tensors), "num_hidden_layers": layers}
            found |= {f"{name}/{key}": tensor for key, tensor in tensors.items()}
    facts["conventions"] = " ".join((__doc__ or "").split("\n\n")[1].split())
    save_file(found, folder / "mergekit.safetensors")
    (folder / "mergekit.json").write_text(json.dumps(facts, indent=1) + "\n")


def placed(config: Any, folder: Path) -> Any:
    """The configuration with every model named ``base`` or ``tuned-i`` replaced by its path."""
    if isinstance(config, dict):
        return {key: placed(value, folder) for key, value in config.items()}
    if isinstance(config, list):
        return [placed(value, folder) for value in config]
    if isinstance(config, str) and (config.startswith("tuned-") or config == "base"):
        return str(folder / config)
    return config


def digest(path: Path) -> str:
    """sha256 of the weights of a checkpoint."""
    whole = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")):
        whole.update(file.read_bytes())
    return whole.hexdigest()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
