"""From finished shards to a result directory: index, configuration, report, card, recipe."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from merging.dense import card
from merging.dense.extract import A_TAIL, B_TAIL, module_kind
from merging.dense.jobs import TensorJob
from merging.dense.plan import STEMS, DensePlan
from merging.dense.report import dense_report
from merging.dense.runner import ShardResult, header_metadata
from merging.dense.settled import Settled
from merging.errors import MergeFailure
from merging.formats import peft_out
from merging.formats.checkpoint_out import config_text, copy_companions
from merging.formats.guard import check_safetensors
from merging.formats.shards import index_text
from merging.formats.tensors import TensorFile
from merging.formats.writer import TensorSpec, write_safetensors
from merging.result import json_text, write_text

CONFIG_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def finalise(
    plan: DensePlan,
    parts: Sequence[ShardResult],
    out: Path,
    *,
    settled: Settled | None = None,
    keep_parts: bool = False,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Complete the folder ``out`` that holds the files of all ``parts``; the report and each file's sha256.

    Files of an earlier attempt at this step are replaced. What an adapter was put together from is removed,
    unless ``keep_parts`` says that the caller will. Raises :class:`MergeFailure` ``shards_incomplete``.
    """
    done = {part.index: part for part in parts}
    missing = [shard.file for shard in plan.shards if shard.index not in done]
    if missing or any(not (out / part.file).is_file() for part in parts):
        raise MergeFailure("shards_incomplete", f"not all shards are there; missing: {missing[:5]}")
    parts = [done[shard.index] for shard in plan.shards]
    settled = settled or Settled(_number(plan))
    files: dict[str, str] = {}
    if plan.recipe.output.format == "lora":
        files.update(_adapter(plan, parts, out))
    else:
        files.update({part.file: part.sha256 for part in parts})
        files.update(_beside(plan, parts, out))
    report = dense_report(plan, parts, settled)
    recipe = plan.recipe if plan.origin is None else plan.origin.recipe
    for name, text in (
        ("README.md", card.dense_card(plan, report)),
        ("merge.yaml", recipe.to_yaml()),
        ("report.json", json_text(report)),
    ):
        files[name] = _text(out / name, text)
    for part in parts:
        if part.file not in files and not keep_parts:
            (out / part.file).unlink()
    return report, dict(sorted(files.items()))


def _number(plan: DensePlan) -> float:
    value = plan.resolved.params.lambda_
    if value == "auto":
        raise ValueError("lambda: auto was settled before the shards were made; pass it on")
    return float(value)


def _beside(plan: DensePlan, parts: Sequence[ShardResult], out: Path) -> dict[str, str]:
    """The index of several shards and, for a checkpoint, what the base has beside its weights."""
    files: dict[str, str] = {}
    output = plan.recipe.output
    if len(parts) > 1:
        name = f"{STEMS[output.format]}.safetensors.index.json"
        where = {job.name: shard.file for shard in plan.shards for job in shard.jobs}
        numbers = sum(job.numel for job in plan.jobs)
        text = index_text(where, sum(shard.nbytes for shard in plan.shards), numbers)
        files[name] = _text(out / name, text)
    base = plan.base
    if output.format != "checkpoint" or base is None:
        return files
    copied, _ = copy_companions(base.path, out)
    files.update(copied)
    if base.config is not None:
        dtype = None if output.dtype == "auto" else output.dtype
        files["config.json"] = _text(out / "config.json", config_text(base.config, dtype))
    return files


def _adapter(plan: DensePlan, parts: Sequence[ShardResult], out: Path) -> dict[str, str]:
    """``adapter_model.safetensors`` and its configuration from the factors in the shards."""
    opened = [TensorFile(out / part.file, check_safetensors(out / part.file)) for part in parts]
    home = {key: file for file in opened for key in file.header.tensors}
    modules: list[peft_out.ResultModule] = []
    whole: list[TensorJob] = []
    for job in sorted(plan.jobs, key=lambda job: job.name):
        kind = module_kind(job)
        if job.name in home:
            whole.append(job)
        elif kind is not None and job.name + B_TAIL in home:
            rank = home[job.name + B_TAIL].header.tensors[job.name + B_TAIL].shape[1]
            name = job.name.removesuffix(".weight")
            modules.append(peft_out.ResultModule(name, kind, *job.matrix, rank, job.shape))
    if plan.recipe.output.uniform_rank and modules:
        highest = max(module.rank for module in modules)
        modules = [
            peft_out.ResultModule(one.name, one.kind, one.m, one.n, highest, one.weight_shape)
            for one in modules
        ]
    stored = sorted({plan.dtype(job) for job in plan.jobs if job.inputs})
    dtype = stored[0] if len(stored) == 1 and stored[0] != "F64" else "F32"
    specs = [spec for module in modules for spec in peft_out.factor_specs(module, dtype)]
    specs += [TensorSpec(peft_out.full_key(job.name), plan.dtype(job), job.shape) for job in whole]

    def tensors() -> Iterator[Tensor]:
        for module in modules:
            key = f"{module.name}.weight"
            B, A = (home[key + tail].tensor(key + tail) for tail in (B_TAIL, A_TAIL))
            yield from peft_out.factor_tensors(module, B, A)
        for job in whole:
            yield home[job.name].tensor(job.name)

    path = out / peft_out.WEIGHTS_NAME
    path.unlink(missing_ok=True)
    (out / peft_out.CONFIG_NAME).unlink(missing_ok=True)
    files = {peft_out.WEIGHTS_NAME: write_safetensors(path, specs, tensors(), header_metadata(plan))}
    config = (plan.base.config if plan.base is not None else None) or {}
    named = config.get("architectures")
    causal = isinstance(named, list) and any(str(name).endswith("ForCausalLM") for name in named)
    fields = peft_out.adapter_config(
        modules,
        base_model=plan.recipe.base_model,
        task_type="CAUSAL_LM" if causal else None,
        modules_to_save=[job.name.removesuffix(".weight").removesuffix(".bias") for job in whole],
    )
    files[peft_out.CONFIG_NAME] = peft_out.write_adapter_config(out, fields)
    for file in opened:
        file.close()
    return files


def _text(path: Path, text: str) -> str:
    path.unlink(missing_ok=True)
    return write_text(path, text)


def norm(square: float) -> float:
    """The root of a squared norm, which rounding may have made negative."""
    return math.sqrt(max(square, 0.0))
