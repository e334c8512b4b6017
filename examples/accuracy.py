"""Accuracy of adapters in the real base model: ``python examples/accuracy.py QUALITY_DIR ADAPTER...``.

Loads each adapter into the base model with PEFT, as its users do, and prints the accuracy per task on
held-out texts. QUALITY_DIR holds the base model (``base/*.safetensors``, MiniLM-L6 with a reduced vocabulary)
and the tasks (``public/tasks/<task>``: token ids, labels, and the frozen embeddings of the label prompts).
Needs the extra ``eval``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize
from transformers import BertConfig, BertModel

from service.cli_console import columns

TASKS = ("supersense", "biblegenre", "icd", "langid")
BATCH = 64


@dataclass(frozen=True)
class Task:
    """Texts as token ids, their labels, and one unit row of ``head`` per label."""

    texts: list[Tensor]
    labels: Tensor
    head: Tensor

    @classmethod
    def load(cls, folder: Path, limit: int, token_row: Tensor) -> Task:
        """The first ``limit`` test texts; ``token_row`` maps token ids to rows of the embedding."""
        data = np.load(folder / "test.npz")
        tokens = token_row[torch.from_numpy(data["tokens"].astype(np.int64))]
        starts = data["offsets"].tolist()
        texts = [tokens[a:b] for a, b in pairwise(starts[: limit + 1])]
        labels = torch.from_numpy(data["labels"].astype(np.int64))[:limit]
        return cls(texts, labels, load_file(folder / "head.safetensors")["head"])

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Positions, padded ids and mask of texts of similar length."""
        order = sorted(range(len(self.texts)), key=lambda i: len(self.texts[i]))
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            texts = [self.texts[i] for i in chosen]
            ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
            lengths = torch.tensor([len(text) for text in texts])
            yield torch.tensor(chosen), ids, torch.arange(ids.shape[1]) < lengths[:, None]


def load_base(folder: Path) -> tuple[BertModel, Tensor]:
    """The base model, and the row of its embedding for each token id (-1: not in it)."""
    weights = load_file(next(iter(sorted(folder.glob("*.safetensors")))))
    kept = weights.pop("vocab_ids").long()
    token_row = torch.full((int(kept.max()) + 1,), -1)
    token_row[kept] = torch.arange(len(kept))
    config = BertConfig(
        vocab_size=len(kept),
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        max_position_embeddings=weights["embeddings.position_embeddings.weight"].shape[0],
    )
    model = BertModel(config, add_pooling_layer=False)
    model.load_state_dict({name: weight.float() for name, weight in weights.items() if "pooler" not in name})
    return model.eval(), token_row


@torch.inference_mode()
def accuracy(model: torch.nn.Module, task: Task) -> float:
    """The share of texts whose mean embedding is nearest to the head row of their label."""
    right = 0
    for chosen, ids, mask in task.batches():
        hidden = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        right += int(((normalize(mean, dim=-1) @ task.head.T).argmax(1) == task.labels[chosen]).sum())
    return right / len(task.texts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("quality", type=Path, metavar="QUALITY_DIR")
    parser.add_argument("adapters", type=Path, nargs="+", metavar="ADAPTER")
    parser.add_argument("--own", type=Path, metavar="DIR", help="also each task's own adapter, DIR/<task>")
    parser.add_argument("--limit", type=int, default=500, help="texts per task (default: all 500)")
    options = parser.parse_args()
    torch.set_num_threads(min(4, os.cpu_count() or 1))
    model, token_row = load_base(options.quality / "base")
    folder = options.quality / "public" / "tasks"
    tasks = {name: Task.load(folder / name, options.limit, token_row) for name in TASKS}
    rows = [("base model", *(accuracy(model, task) for task in tasks.values()))]
    if options.own:
        own = (accuracy_with(model, options.own / name, [task])[0] for name, task in tasks.items())
        rows.append(("its own adapter", *own))
    for path in options.adapters:
        rows.append((path.name, *accuracy_with(model, path, list(tasks.values()))))
    cells = [(row[0], *(f"{value:.3f}" for value in row[1:])) for row in rows]
    print(columns(cells, ("MODEL", *TASKS)))
    return 0


def accuracy_with(model: BertModel, adapter: Path, tasks: list[Task]) -> list[float]:
    """Accuracy per task with an adapter, which is taken off the model again."""
    adapted = PeftModel.from_pretrained(model, str(adapter))  # in evaluation mode
    try:
        return [accuracy(adapted, task) for task in tasks]
    finally:
        adapted.unload()


if __name__ == "__main__":
    sys.exit(main())
