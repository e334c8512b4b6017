"""Does a start by ``osrm_init`` make adapters that merge better? Trains both ways, merges, scores.

Adapters of the same rank on the same layers are trained on the labelled validation texts of the offline
quality suite (it ships its training texts without a tokenizer): from PEFT's default start, the same ``A``
for all tasks or one of its own for each, and from the starts that ``osrm_init`` makes of the unlabeled
samples, with the same batches. Each set is scored on the test texts, alone and merged; differences are
paired by text and seed. Trained adapters are kept in the scratch folder, so that a run can be continued.
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
SHARED, INDEPENDENT, OSRM = "default start, shared", "default start, independent", "osrm_init"
STARTS = (SHARED, INDEPENDENT, OSRM)
MERGES: dict[str, dict[str, Any]] = {
    "sum": {"merge_method": "linear"},
    "task arithmetic, 0.5": {"merge_method": "linear", "parameters": {"lambda": 0.5}},
    "mean": {"merge_method": "linear", "parameters": {"normalize": True}},
    "ties, core": {"merge_method": "ties", "space": "core"},
    "tsv": {"merge_method": "tsv"},
}


def batches(source: Path, table: torch.Tensor, size: int, epochs: int, seed: int) -> Any:
    """Token ids, mask and labels, in an order that depends on the number of texts and the seed."""
    with np.load(source) as stored:
        flat, offsets = stored["tokens"].astype(np.int64), stored["offsets"].astype(np.int64)
        labels = torch.from_numpy(stored["labels"].astype(np.int64))
    generator = torch.Generator().manual_seed(seed)
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


class Comparison:
    """Adapters of every start and seed, and which test texts they get right."""

    def __init__(self, suite: Suite, inputs: Inputs, quality: Path, options: argparse.Namespace) -> None:
        self.suite = suite
        self.inputs = inputs
        self.quality = quality
        self.options = options
        self.table = vocabulary(quality)
        self.single: dict[tuple[str, int], Hits] = {}
        self.merged: dict[tuple[str, int, str], Hits] = {}

    def run(self, start: str, seed: int) -> None:
        """Train the adapters of one start, merge them in all ways, score everything."""
        folder = self.options.scratch / f"seed-{seed}" / start.replace(", ", "-").replace(" ", "_")
        begun = self._starts(folder / "starts", seed) if start == OSRM else None
        found: Hits = {}
        for place, task in enumerate(self.suite.tasks):
            out = folder / "trained" / task
            if not (out / "adapter_config.json").exists():
                drawn = seed if start != INDEPENDENT else 1000 * (place + 1) + seed
                self._train(task, begun / task if begun else None, out, seed, drawn)
            found |= self.suite.hits(self.suite.load(out), "test", [task])
        self.single[start, seed] = found
        alone = np.mean([found[task].mean() for task in self.suite.tasks])
        note(f"seed {seed}, {start}: alone {alone:.3f}")
        for label in MERGES:
            hits = self._merge(label, folder)
            self.merged[start, seed, label] = hits
            note(f"seed {seed}, {start}, {label}: {np.mean([h.mean() for h in hits.values()]):.3f}")

    def told(self) -> dict[str, Any]:
        """Mean accuracies, and the paired differences of ``osrm_init`` to the default starts."""
        seeds = self.options.seeds
        tables: dict[str, Any] = {}
        for label in ("alone", *MERGES):
            rows = {
                start: [
                    self.single[start, seed] if label == "alone" else self.merged[start, seed, label]
                    for seed in seeds
                ]
                for start in STARTS
            }
            tables[label] = {
                start: {
                    "accuracy": _mean(hits),
                    "seeds": [_mean([one]) for one in hits],
                    "interval": _interval(hits),
                    "osrm_init is better by": _mean(rows[OSRM]) - _mean(hits),
                    "difference_interval": _interval(rows[OSRM], hits),
                }
                for start, hits in rows.items()
            }
        return tables

    def _starts(self, out: Path, seed: int) -> Path:
        """The result of ``osrm_init``: a folder per task."""
        from merging import engine

        options = self.options
        recipe = self.inputs.recipe("osrm_init", {"r": options.rank, "target_modules": TARGETS}, head=False)
        recipe["models"] = [{**entry, "model": Path(entry["model"]).name} for entry in recipe["models"]]
        recipe["calibration"] = {"samples": options.samples}
        recipe["seed"] = seed
        engine.merge(recipe, out, device="cpu", threads=1, overwrite=True)
        return out

    def _merge(self, label: str, folder: Path) -> Hits:
        from merging import engine

        models = [{"model": str(folder / "trained" / task)} for task in self.suite.tasks]
        out = folder / "merged" / label.replace(", ", "-").replace(" ", "_")
        engine.merge({**MERGES[label], "models": models}, out, device="cpu", threads=1, overwrite=True)
        return self.suite.hits(self.suite.load(out), "test", self.suite.tasks)

    def _train(self, task: str, start: Path | None, out: Path, seed: int, drawn: int) -> None:
        """Train one adapter and write it; ``drawn`` seeds the default start."""
        from peft import LoraConfig, PeftModel, get_peft_model
        from transformers import AutoModel

        options = self.options
        base = AutoModel.from_pretrained(self.inputs.base)
        torch.manual_seed(drawn)
        if start is None:
            config = LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=TARGETS)
            model = get_peft_model(base, config)
        else:
            model = PeftModel.from_pretrained(base, start, is_trainable=True)
        head = normalize(load_file(str(self.inputs.heads[task]))["head"].float(), dim=-1)
        source = self.quality / "public" / "tasks" / task / "val.npz"
        steps = list(batches(source, self.table, options.batch, options.epochs, seed))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(steps))
        model.eval()  # no dropout: all starts see the same
        for ids, mask, labels in steps:
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
            weight = mask.unsqueeze(-1).float()
            features = normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)
            loss = cross_entropy(float(HEAD["scale"]) * features @ head.T, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.save_pretrained(out)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _mean(hits: list[Hits]) -> float:
    return float(np.mean([right.mean() for one in hits for right in one.values()]))


def _interval(hits: list[Hits], other: list[Hits] | None = None) -> float:
    """Half of the 95 % interval of the mean accuracy, or of the paired difference, over the test texts."""
    variance = 0.0
    for task in hits[0]:
        values = np.mean([one[task].astype(float) for one in hits], axis=0)
        if other is not None:
            values = values - np.mean([one[task].astype(float) for one in other], axis=0)
        variance += values.var(ddof=1) / len(values)
    return float(1.96 * np.sqrt(variance) / len(hits[0]))


def table(told: dict[str, Any]) -> str:
    """For people."""
    lines = [f"| merge | {' | '.join(STARTS)} | to shared | to independent |", "| --- " * 6 + "|"]
    for label, rows in told.items():
        cells = [f"{rows[start]['accuracy']:.3f} ± {rows[start]['interval']:.3f}" for start in STARTS]
        for start in (SHARED, INDEPENDENT):
            entry = rows[start]
            cells.append(f"{entry['osrm_init is better by']:+.3f} ± {entry['difference_interval']:.3f}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.osrm_start", description=__doc__)
    parser.add_argument("--suite", type=Path, default=ROOT.parent / "shared" / "quality")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "merganser-osrm-start")
    parser.add_argument("--tasks", default="debsection,supersense,icd,langid")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=16)
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
    comparison = Comparison(suite, inputs, quality, options)
    for seed in options.seeds:
        for start in STARTS:
            comparison.run(start, seed)
    told = comparison.told()
    print(table(told))
    told["seconds"] = round(time.perf_counter() - begin, 1)
    (options.scratch / "osrm-start.json").write_text(json.dumps(told, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
