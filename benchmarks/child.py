"""One measured merge in a process of its own: ``python -m benchmarks.child '<case as JSON>'``.

Prints one line of JSON: CPU-seconds of the merge (imports excluded), wall seconds, peak memory in bytes.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Step = Callable[[], None]


def main() -> None:
    case = json.loads(sys.argv[1])
    step = {"floor": _floor, "ours": _ours, "peft": _peft, "reference": _reference}[case["tool"]](case)
    wall, before = time.perf_counter(), _cpu()
    step()
    print(
        json.dumps(
            {
                "cpu": _cpu() - before,
                "wall": time.perf_counter() - wall,
                "before": before,
                "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
        )
    )


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _floor(case: dict[str, Any]) -> Step:
    import torch

    from benchmarks import floor

    torch.set_num_threads(1)
    paths = [Path(path) for path in case["inputs"]]
    out = Path(case["out"]).with_suffix(".safetensors")
    options = {"limit": case["limit"]} if case.get("limit") else {}
    return lambda: getattr(floor, case["what"])(paths, out, **options)


def _ours(case: dict[str, Any]) -> Step:
    from merging import catalog, engine

    catalog.load_kernel(catalog.get(case["recipe"]["merge_method"]))
    recipe = {"models": [{"model": path} for path in case["inputs"]], **case["recipe"]}
    return lambda: void(engine.merge(recipe, case["out"], device="cpu", threads=case.get("threads", 1)))


def _reference(case: dict[str, Any]) -> Step:
    import torch

    from benchmarks import reference

    torch.set_num_threads(1)
    paths = [Path(path) for path in case["inputs"]]
    out = Path(case["out"]).with_suffix(".safetensors")
    return reference.step(Path(case["checkout"]), paths, out, rank_print=case["rank_print"], **case["config"])


def _peft(case: dict[str, Any]) -> Step:
    """``add_weighted_adapter`` on a model whose base weights take no memory; loading is not timed."""
    import torch
    from peft import PeftModel

    from benchmarks.inputs import SETS

    torch.set_num_threads(1)
    base = _skeleton(SETS[case["set"]], case.get("only"))
    names = [f"task-{index}" for index in range(len(case["inputs"]))]
    model = PeftModel.from_pretrained(base, case["inputs"][0], adapter_name=names[0])
    for name, path in list(zip(names, case["inputs"], strict=True))[1:]:
        model.load_adapter(path, adapter_name=name)

    def step() -> None:
        model.add_weighted_adapter(
            names, [1.0] * len(names), "merged", case["combination"], **case.get("options", {})
        )
        model.save_pretrained(case["out"], selected_adapters=["merged"])

    return step


def _skeleton(shape: Any, only: str | None) -> Any:
    """The linear layers of a model; all of a layer's weights are one number, seen through a stride of 0."""
    import torch
    from torch import nn

    class Skeleton(nn.Module):
        config = {"model_type": "custom"}  # noqa: RUF012  (as PEFT expects it)

        def prepare_inputs_for_generation(self) -> None:
            """Asked for by PEFT's causal models."""

    root = Skeleton()
    for name, m, n in shape.linears():
        if only is not None and name != only:
            continue
        parent, parts = root, name.split(".")
        for part in parts[:-1]:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        linear = nn.Linear(1, 1, bias=False)
        linear.in_features, linear.out_features = n, m
        linear.weight = nn.Parameter(torch.zeros(1, 1).expand(m, n), requires_grad=False)
        parent.add_module(parts[-1], linear)
    return root


def void(_: Any) -> None:
    """Drop a result."""


if __name__ == "__main__":
    main()
