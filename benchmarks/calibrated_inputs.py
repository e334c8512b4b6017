"""The quality suite as inputs of recipes that look at data: a transformers folder, token ids, heads.

The suite ships a pruned vocabulary and ready token ids, so the base gets a configuration with that
vocabulary and the samples are written as tensors with the ids renumbered.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

HEAD = {"pooling": "mean", "normalize": True, "scale": 20.0}
"""How the suite predicts: the cosine with the head's rows; training used 20 times it."""

CONFIG = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "pad_token_id": 0,
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
}


@dataclass(frozen=True)
class Inputs:
    """Folders and files of one adapter set."""

    base: Path
    adapters: dict[str, Path]
    data: dict[str, Path]
    heads: dict[str, Path]

    def recipe(self, method: str, parameters: dict[str, Any], *, head: bool, **more: Any) -> dict[str, Any]:
        """A recipe over all tasks that brings their samples (and heads)."""
        models = []
        for task, path in self.adapters.items():
            entry = {"model": str(path), "data": str(self.data[task])}
            models.append({**entry, "head": str(self.heads[task])} if head else entry)
        calibration = {**({"head": HEAD} if head else {}), **more.pop("calibration", {})}
        return {
            "merge_method": method,
            "base_model": str(self.base),
            "models": models,
            "parameters": parameters,
            "calibration": calibration,
            "output": {"dtype": "float32"},
            **more,
        }


def build(quality: Path, adapters: dict[str, Path], scratch: Path) -> Inputs:
    """Write what is missing in ``scratch``."""
    base = scratch / "base"
    vocabulary = _base(quality / "base" / "minilm_l6_pruned_fp16.safetensors", base)
    data, heads = {}, {}
    for task in adapters:
        folder = quality / "public" / "tasks" / task
        heads[task] = folder / "head.safetensors"
        data[task] = scratch / "data" / f"{task}.safetensors"
        if not data[task].exists():
            _samples(folder / "unlabeled.npz", vocabulary, data[task])
    return Inputs(base, adapters, data, heads)


def _base(source: Path, folder: Path) -> torch.Tensor:
    """The base as transformers reads it; returns old id -> new id."""
    weights = load_file(str(source))
    ids = weights.pop("vocab_ids").long()
    table = torch.full((int(ids.max()) + 1,), -1, dtype=torch.long)
    table[ids] = torch.arange(len(ids))
    if not (folder / "model.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        kept = {key: value.float() for key, value in weights.items() if value.is_floating_point()}
        positions = kept["embeddings.position_embeddings.weight"].shape[0]
        config = {**CONFIG, "vocab_size": len(ids), "max_position_embeddings": positions}
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        save_file(kept, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return table


def _samples(source: Path, vocabulary: torch.Tensor, path: Path) -> None:
    with np.load(source) as stored:
        flat, offsets = stored["tokens"].astype(np.int64), stored["offsets"].astype(np.int64)
    rows = [torch.from_numpy(flat[a:b]) for a, b in itertools.pairwise(offsets)]
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int32)
    mask = torch.zeros(len(rows), width, dtype=torch.uint8)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = vocabulary[row].int()
        mask[i, : len(row)] = 1
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"input_ids": ids, "attention_mask": mask.int()}, str(path))
