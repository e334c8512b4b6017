"""What lies beside the shards: index, configuration, tokenizer, report, card and the configuration itself."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merging.card import code, plain
from merging.dense.runner import ShardResult
from merging.formats.checkpoint_out import copy_companions
from merging.formats.guard import ITEM_BYTES
from merging.formats.shards import index_text
from merging.mergekit.plan import MergekitPlan
from merging.report import versions
from merging.result import json_text, write_text

INDEX = "model.safetensors.index.json"
BESIDE = (INDEX, "config.json", "README.md", "merge.yaml", "report.json")


def finish(
    plan: MergekitPlan, parts: Sequence[ShardResult], out: Path
) -> tuple[dict[str, Any], dict[str, str]]:
    """Complete the folder that holds the shards; the report and the sha256 of every file."""
    for name in BESIDE:  # of an earlier attempt at this step
        (out / name).unlink(missing_ok=True)
    files = {part.file: part.sha256 for part in parts}
    if len(parts) > 1:
        files[INDEX] = write_text(out / INDEX, _index(plan))
    if plan.donor.config is not None:
        text = json.dumps(plan.model_config(), indent=2) + "\n"
        files["config.json"] = write_text(out / "config.json", text)
    copied, left = copy_companions(plan.donor.path, out, tokenizer=plan.tokenizer)
    files.update(copied)
    found = report(plan, left)
    files["README.md"] = write_text(out / "README.md", card(plan, found))
    files["merge.yaml"] = write_text(out / "merge.yaml", plan.to_yaml())
    files["report.json"] = write_text(out / "report.json", json_text(found))
    return found, dict(sorted(files.items()))


def report(plan: MergekitPlan, left: Sequence[str] = ()) -> dict[str, Any]:
    """The content of ``report.json``."""
    warnings = [{"code": "mergekit_note", "message": text} for text in plan.schedule.warnings]
    if left:
        message = f"code beside the model was not copied: {', '.join(left[:10])}"
        warnings.append({"code": "code_not_copied", "message": message})
    return {
        "recipe_digest": plan.digest,
        "method": plan.config.method.name,
        "space": None,
        "compat": "mergekit",
        "seed": plan.config.seed,
        "device": "cpu",
        "versions": versions(),
        "inputs": [{"model": model, "digest": plan.digest_of(model)} for model in plan.models],
        "summary": {
            "tensors": len(plan.schedule.outputs),
            "parameters": sum(math.prod(output.shape) for output in plan.schedule.outputs),
            "bytes": sum(shard.nbytes for shard in plan.shards),
            "layers": plan.schedule.layers,
        },
        "modules": [
            {
                "name": output.name,
                "shape": list(output.shape),
                "dtype": output.out_dtype,
                "inputs": [f"{item.model}:{item.tensor}" for item in output.inputs],
                "parameters": dict(output.values.shared),
                "input_parameters": [dict(values) for values in output.values.inputs],
            }
            for output in plan.schedule.outputs
        ],
        "warnings": warnings,
    }


def card(plan: MergekitPlan, found: dict[str, Any]) -> str:
    """Markdown with front matter, as model hubs read it."""
    lines = [
        "---",
        "library_name: transformers",
        "tags: [merge, mergekit, merganser]",
        "---",
        "",
        f"# {plan.config.method.name}: {len(plan.models)} models merged",
        "",
        "Merged by Merganser from a mergekit configuration, with mergekit's arithmetic.",
        "",
        *[
            f"- {code(model)}" + (" (base)" if model == plan.config.base_model else "")
            for model in plan.models
        ],
        "",
        f"- tensors: {found['summary']['tensors']}, parameters: {found['summary']['parameters']}",
        f"- recipe digest: `{found['recipe_digest']}`",
        "",
        "`merge.yaml` reproduces this result byte for byte from the same inputs.",
        "",
    ]
    if found["warnings"]:
        lines += ["## Warnings", "", *[f"- {plain(entry['message'])}" for entry in found["warnings"]], ""]
    return "\n".join(lines)


def _index(plan: MergekitPlan) -> str:
    outputs = plan.schedule.outputs
    homes = {output.name: shard.file for shard in plan.shards for output in shard.outputs}
    size = sum(math.prod(output.shape) * ITEM_BYTES[output.out_dtype] for output in outputs)
    return index_text(homes, size, sum(math.prod(output.shape) for output in outputs))
