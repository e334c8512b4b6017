"""Write the result directory: weights, configuration, card, resolved recipe, report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merging.card import model_card
from merging.formats import peft_out
from merging.formats.experts import join_factors, stored_pairs
from merging.formats.families import FAMILIES
from merging.formats.image_out import common_alpha
from merging.formats.peft_keys import weight_key
from merging.formats.saved import saved_modules
from merging.formats.writer import TensorSpec, write_safetensors
from merging.preparing import Prepared
from merging.report import Findings
from merging.spool import Spool

DELTA_NAME = "delta.safetensors"


def write_result(
    folder: Path, findings: Findings, spool: Spool, report: dict[str, Any], *, task: str | None = None
) -> dict[str, str]:
    """Write the files of one adapter or task vector into ``folder``; file names to sha256 digests.

    ``task`` names a part of a multi-output merge; its factors lie in the spool under that name.
    """
    prepared = findings.prepared
    recipe = prepared.recipe
    metadata = header_metadata(report)
    files: dict[str, str] = {}
    if recipe.output.format == "delta":
        files[DELTA_NAME] = _write_delta(folder / DELTA_NAME, findings, spool, metadata)
    else:
        files.update(_write_adapter(folder, findings, spool, metadata, task))
    card = model_card(
        recipe,
        prepared.resolved.method,
        report,
        # what kohya's files state is a version, not the name of a model
        prepared.table.base_model if prepared.table.family != "kohya" else None,
        task=task,
        library=FAMILIES[prepared.table.family].library,
    )
    files["README.md"] = write_text(folder / "README.md", card)
    files["merge.yaml"] = write_text(folder / "merge.yaml", recipe.to_yaml())
    files["report.json"] = write_text(folder / "report.json", json_text(report))
    return dict(sorted(files.items()))


def header_metadata(report: dict[str, Any]) -> dict[str, str]:
    """What the header of every written safetensors file says."""
    return {
        "format": "pt",
        "merganser.recipe_digest": report["recipe_digest"],
        "merganser.method": report["method"],
        "merganser.version": report["versions"]["merganser"],
    }


def json_text(value: Any) -> str:
    """JSON with a line per entry down to the second level, such as one per module of a report.

    (The encoder of the library writes single lines in C, and indented text in Python.)
    """
    return _lines(value, 2, "") + "\n"


def _lines(value: Any, levels: int, pad: str) -> str:
    if levels == 0 or not value or not isinstance(value, dict | list):
        return json.dumps(value)
    deeper = pad + " "
    if isinstance(value, dict):
        parts = [f"{json.dumps(key)}: {_lines(item, levels - 1, deeper)}" for key, item in value.items()]
        start, end = "{", "}"
    else:
        parts = [_lines(item, levels - 1, deeper) for item in value]
        start, end = "[", "]"
    return f"{start}\n{deeper}" + f",\n{deeper}".join(parts) + f"\n{pad}{end}"


def write_text(path: Path, text: str) -> str:
    """Write a new text file; its sha256."""
    data = text.encode()
    with path.open("xb") as file:
        file.write(data)
    return hashlib.sha256(data).hexdigest()


def result_modules(findings: Findings) -> list[peft_out.ResultModule]:
    """The modules of the result by name, with the ranks that are written."""
    prepared = findings.prepared
    written = {module["name"]: module["rank"] for module in findings.modules}
    experts = {name: expert for name in written if (expert := prepared.module(name).expert) is not None}
    ranks = peft_out.result_ranks(written, {name: expert.layer for name, expert in experts.items()})
    if prepared.recipe.output.uniform_rank and ranks:
        highest = max(ranks.values())
        ranks = dict.fromkeys(ranks, highest)
    found = []
    for name in sorted(ranks):
        module = prepared.module(name)
        found.append(
            peft_out.ResultModule(
                name, module.kind, module.m, module.n, ranks[name], module.weight_shape, experts.get(name)
            )
        )
    return found


def _write_adapter(
    folder: Path, findings: Findings, spool: Spool, metadata: dict[str, str], task: str | None
) -> dict[str, str]:
    prepared = findings.prepared
    family = FAMILIES[prepared.table.family]
    modules = result_modules(findings)
    alpha = common_alpha(modules) if modules else 1
    full = full_tensors(prepared) if task is None else own_full_tensors(prepared, findings.tasks[0])
    prefix = "" if task is None else f"{task}/"
    pairs = stored_pairs(modules)
    specs = [spec for stored in pairs for spec in family.specs(stored, prepared.dtype)]
    specs += [spec for spec, _ in full]

    def tensors() -> Iterator[Tensor]:
        for stored, parts in pairs.items():
            factors = [load_factors(spool, module, findings.lambda_, prefix) for module in parts]
            B, A = factors[0] if parts == (stored,) else join_factors(factors, parts[0].rank)
            yield from family.tensors(stored, B, A, alpha)
        for _, make in full:
            yield make()

    metadata = {**family.header(prepared.adapters, modules), **metadata}
    weights = write_safetensors(folder / family.weights_name, specs, tensors(), metadata)
    files = {family.weights_name: weights}
    table = prepared.table
    if table.family != "peft":
        return files
    config = peft_out.adapter_config(
        modules,
        base_model=table.base_model,
        revision=table.base_revision,
        task_type=table.task_type,
        fan_in_fan_out=table.fan_in_fan_out,
        modules_to_save=table.modules_to_save if task is None else _own_modules(findings),
        anchored_targets=table.anchored_targets,
        target_parameters=table.target_parameters,
    )
    return {**files, peft_out.CONFIG_NAME: peft_out.write_adapter_config(folder, config)}


def _own_modules(findings: Findings) -> tuple[str, ...]:
    """The names of the model's own fully trained modules, as PEFT's configuration gives them."""
    adapter = findings.prepared.adapters[findings.tasks[0]]
    return saved_modules([adapter], adapter.full_tensors)


def load_factors(
    spool: Spool, module: peft_out.ResultModule, factor: float, prefix: str = ""
) -> tuple[Tensor, Tensor]:
    """``B (m, k)`` and ``A (k, n)`` of a module times ``factor``; identities are written out."""
    B, A = _stored(spool, f"{prefix}{module.name}")
    if B is None:
        assert A is not None
        return torch.eye(module.m, dtype=A.dtype), A * factor
    if A is None:
        return B * factor, torch.eye(module.n, dtype=B.dtype)
    return B * factor, A


def _stored(spool: Spool, name: str) -> tuple[Tensor | None, Tensor | None]:
    B = spool.get(f"{name}.B") if f"{name}.B" in spool else None
    A = spool.get(f"{name}.A") if f"{name}.A" in spool else None
    return B, A


def _write_delta(path: Path, findings: Findings, spool: Spool, metadata: dict[str, str]) -> str:
    """A task-vector file: the update of every base weight, in the base's own shape."""
    prepared = findings.prepared
    modules = result_modules(findings)
    names = [module.name for module in modules]
    specs = [TensorSpec(weight_key(m.name, names), prepared.dtype, m.weight_shape) for m in modules]

    def tensors() -> Iterator[Tensor]:
        for module, name in zip(modules, names, strict=True):
            B, A = _stored(spool, name)
            product = A if B is None else B if A is None else B @ A
            assert product is not None
            delta = product * findings.lambda_
            stored = prepared.module(name)
            transposed = stored.kind == "embedding" or stored.fan_in_fan_out
            yield (delta.mT if transposed else delta).reshape(module.weight_shape).contiguous()

    return write_safetensors(path, specs, tensors(), {**metadata, "merge.kind": "task_vector"})


def full_tensors(prepared: Prepared) -> list[tuple[TensorSpec, Any]]:
    """Specs and makers of the fully trained tensors that the recipe asks to keep."""
    return [
        (TensorSpec(peft_out.full_key(name), full.dtype, full.shape), _maker(prepared, name, full.sources))
        for name, full in prepared.table.full_tensors.items()
    ]


def own_full_tensors(prepared: Prepared, task: int) -> list[tuple[TensorSpec, Any]]:
    """The fully trained tensors of one model; each part of a multi-output merge keeps its own."""
    full = prepared.adapters[task].full_tensors
    return [
        (TensorSpec(peft_out.full_key(name), info.dtype, info.shape), _maker(prepared, name, (task,)))
        for name, info in full.items()
    ]


def _maker(prepared: Prepared, name: str, models: tuple[int, ...]) -> Any:
    def make() -> Tensor:
        tensors = [prepared.adapters[t].full_tensor(name) for t in models]
        if len(tensors) == 1:
            return tensors[0]
        total = tensors[0].double()
        for tensor in tensors[1:]:
            total = total + tensor.double()
        return total / len(tensors)

    return make


__all__ = ["header_metadata", "json_text", "load_factors", "result_modules", "write_result", "write_text"]
