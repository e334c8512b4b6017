"""Does a start by ``osrm_init`` make adapters that merge better? Trains both ways, merges, scores.

Adapters of the same rank on the same layers are trained on the labelled validation texts of the offline
quality suite (it ships its training texts without a tokenizer), once from PEFT's default start and once
from the starts that ``osrm_init`` makes of the unlabeled samples, with the same batches; then each set
is merged and scored on the test texts, alone and merged.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, normalize

from benchmarks.calibrated_inputs import HEAD, Inputs, build
from benchmarks.suite import Hits, Suite

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ["query", "value"]


def batches(source: Path, table: torch.Tensor, size: int, epochs: int) -> Any:
    """Token ids, mask and labels, in an order that depends on the task's texts alone."""
    with np.load(source) as stored:
        flat, offsets = stored["tokens"].astype(np.int64), stored["offsets"].astype(np.int64)
        labels = torch.from_numpy(stored["labels"].astype(np.int64))
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for picked in torch.randperm(len(labels), generator=generator).split(size):
            rows = [torch.from_numpy(flat[offsets[i] : offsets[i + 1]]) for i in picked.tolist()]
            ids = torch.nn.utils.rnn.pad_sequence([table[row] for row in rows], batch_first=True)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            yield ids, mask, labels[picked]


def vocabulary(quality: Path) -> torch.Tensor:
    """Old token id -> row of the pruned embedding."""
    ids = load_file(str(quality / "base" / "minilm_l6_pruned_fp16.safetensors"))["vocab_ids"].long()
    table = torch.full((int(ids.max()) + 1,), -1, dtype=torch.long)
    table[ids] = torch.arange(len(ids))
    return table


def train(
    inputs: Inputs, quality: Path, task: str, start: Path | None, out: Path, options: argparse.Namespace
) -> float:
    """Train one adapter and write it; the mean loss of the last epoch."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModel

    torch.manual_seed(0)  # every task from the same default start, as users do
    base = AutoModel.from_pretrained(inputs.base)
    if start is None:
        config = LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=TARGETS)
        model = get_peft_model(base, config)
    else:
        model = PeftModel.from_pretrained(base, start, is_trainable=True)
    head = normalize(load_file(str(inputs.heads[task]))["head"].float(), dim=-1)
    trained = [p for p in model.parameters() if p.requires_grad]
    source = quality / "public" / "tasks" / task / "val.npz"
    steps = list(batches(source, vocabulary(quality), options.batch, options.epochs))
    optimizer = torch.optim.AdamW(trained, lr=options.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(steps))
    losses = []
    model.eval()  # no dropout: both starts see the same
    for ids, mask, labels in steps:
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).float()
        features = normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)
        loss = cross_entropy(float(HEAD["scale"]) * features @ head.T, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    model.save_pretrained(out)
    return sum(losses[-len(steps) // options.epochs :]) / max(1, len(steps) // options.epochs)


def starts(inputs: Inputs, out: Path, options: argparse.Namespace) -> Path:
    """The result of ``osrm_init``: a folder per task."""
    from merging import engine

    recipe = inputs.recipe("osrm_init", {"r": options.rank, "target_modules": TARGETS}, head=False)
    recipe["models"] = [{**entry, "model": Path(entry["model"]).name} for entry in recipe["models"]]
    recipe["calibration"] = {"samples": options.samples}
    engine.merge(recipe, out, device="cpu", threads=1, overwrite=True)
    return out


def score(suite: Suite, hits: Hits, single: dict[str, float]) -> float:
    """Mean over tasks of the accuracy over that of the task's own adapter."""
    return float(np.mean([hits[task].mean() / single[task] for task in suite.tasks]))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.osrm_start", description=__doc__)
    parser.add_argument("--suite", type=Path, default=ROOT.parent / "shared" / "quality")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "merganser-osrm-start")
    parser.add_argument("--tasks", default="debsection,supersense,icd,langid")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--limit", type=int, default=0, help="test texts per task; 0: all 500")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    quality = options.suite.resolve()
    options.scratch.mkdir(parents=True, exist_ok=True)
    suite = Suite(quality, "r16", options.scratch, limit=options.limit)
    suite.tasks = options.tasks.split(",")
    inputs = build(quality, {task: suite.adapters[task] for task in suite.tasks}, options.scratch)
    begin = time.perf_counter()
    told = {name: _one(name, suite, inputs, quality, options) for name in ("default start", "osrm_init")}
    told["seconds"] = {"all": round(time.perf_counter() - begin, 1)}
    print(json.dumps(told, indent=1))
    (options.scratch / "osrm-start.json").write_text(json.dumps(told, indent=1) + "\n")
    return 0


def _one(
    name: str, suite: Suite, inputs: Inputs, quality: Path, options: argparse.Namespace
) -> dict[str, Any]:
    from merging import engine

    folder = options.scratch / name.replace(" ", "-")
    begun = None if name == "default start" else starts(inputs, folder / "starts", options)
    single: dict[str, float] = {}
    losses = {}
    for task in suite.tasks:
        out = folder / "trained" / task
        losses[task] = train(inputs, quality, task, begun / task if begun else None, out, options)
        single[task] = float(suite.hits(suite.load(out), "test", [task])[task].mean())
        print(
            f"{name}, {task}: loss {losses[task]:.3f}, accuracy {single[task]:.3f}",
            file=sys.stderr,
            flush=True,
        )
    models = [{"model": str(folder / "trained" / task)} for task in suite.tasks]
    merged = {}
    for label, recipe in {
        "mean": {"merge_method": "linear", "parameters": {"normalize": True}},
        "sum": {"merge_method": "linear"},
        "ties, core": {"merge_method": "ties", "space": "core"},
    }.items():
        out = folder / "merged" / label.replace(", ", "-")
        engine.merge({**recipe, "models": models}, out, device="cpu", threads=1, overwrite=True)
        hits = suite.hits(suite.load(out), "test", suite.tasks)
        accuracy = {task: float(hits[task].mean()) for task in suite.tasks}
        error = float(np.sqrt(sum(hits[t].var() / len(hits[t]) for t in suite.tasks)) / len(suite.tasks))
        merged[label] = {
            "normalized": score(suite, hits, single),
            "accuracy": float(np.mean(list(accuracy.values()))),
            "accuracy_interval": 1.96 * error,
        }
        print(f"{name}, {label}: {merged[label]}", file=sys.stderr, flush=True)
    return {"single": single, "loss": losses, "merged": merged}


if __name__ == "__main__":
    sys.exit(main())
