"""Small base models, tokenizers, data sets and heads for tests, written as real files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from adapters import write_adapter
from safetensors.torch import save_file

WORDS = tuple(f"w{i}" for i in range(30))
VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS)
HIDDEN, INNER, LAYERS = 16, 24, 2
MODULES: dict[str, tuple[int, int]] = {}
for layer in range(LAYERS):
    for name in ("query", "key", "value"):
        MODULES[f"encoder.layer.{layer}.attention.self.{name}"] = (HIDDEN, HIDDEN)
    MODULES[f"encoder.layer.{layer}.intermediate.dense"] = (INNER, HIDDEN)
    MODULES[f"encoder.layer.{layer}.output.dense"] = (HIDDEN, INNER)


def write_base(folder: Path, *, seed: int = 0, vocabulary: int = len(VOCABULARY), **config: Any) -> Path:
    """A random BERT with a word-level tokenizer."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    settings = {
        "vocab_size": vocabulary,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": INNER,
        "max_position_embeddings": 32,
        "initializer_range": 0.3,
    }
    BertModel(BertConfig(**{**settings, **config})).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path, words: Sequence[str] = VOCABULARY) -> Path:
    """A tokenizer that splits at spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    fast.save_pretrained(folder)
    return folder


def texts(count: int, seed: int) -> list[str]:
    """Sentences of 2 to 9 words."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        length = int(torch.randint(2, 10, (1,), generator=generator))
        ids = torch.randint(0, len(WORDS), (length,), generator=generator)
        found.append(" ".join(WORDS[i] for i in ids.tolist()))
    return found


def write_texts(path: Path, count: int = 40, seed: int = 0, **more: Any) -> Path:
    """JSON lines of random sentences; ``more`` stands in every row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text, **more}) for text in texts(count, seed)]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_head(path: Path, classes: int = 4, seed: int = 0, width: int = HIDDEN) -> Path:
    """A linear head."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    save_file({"weight": torch.randn(classes, width, generator=generator)}, str(path))
    return path


def world(folder: Path, tasks: int = 3, *, rank: int = 2, **adapter: Any) -> dict[str, Any]:
    """A recipe without a method: base, adapters and data for ``tasks`` tasks."""
    write_base(folder / "base")
    models = []
    for t in range(tasks):
        path = write_adapter(folder / f"task{t}", seed=t, rank=rank, modules=MODULES, **adapter)
        data = write_texts(folder / "data" / f"task{t}.jsonl", seed=100 + t)
        models.append({"model": str(path), "data": str(data)})
    return {"base_model": str(folder / "base"), "models": models, "output": {"dtype": "float32"}}
