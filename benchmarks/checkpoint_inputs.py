"""Seeded llama-shaped checkpoints, a base and its fine-tunes, written as sharded safetensors directories.

``tiny`` is for tests, ``quick`` (about 100 MB in bf16 each) and ``half`` (270 MB) for a look, ``real`` (1 GB)
for figures. Numbers come from numpy's PCG64, so that the same seed gives the same files everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

FINE_TUNES = 3
WEIGHT = 0.02
SHARED, OWN = 2e-4, 3e-4
"""Standard deviations: of the weights, of the change all fine-tunes share, and of each one's own."""

Dtype = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class Shape:
    """Sizes of a llama-like model without tied embeddings."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    layers: int
    vocab: int
    shards: int = 2

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor in the order of a forward pass."""
        h, f, kv = self.hidden, self.inner, self.hidden // self.heads * self.kv_heads
        yield "model.embed_tokens.weight", (self.vocab, h)
        for layer in range(self.layers):
            stem = f"model.layers.{layer}"
            yield f"{stem}.input_layernorm.weight", (h,)
            yield f"{stem}.self_attn.q_proj.weight", (h, h)
            yield f"{stem}.self_attn.k_proj.weight", (kv, h)
            yield f"{stem}.self_attn.v_proj.weight", (kv, h)
            yield f"{stem}.self_attn.o_proj.weight", (h, h)
            yield f"{stem}.post_attention_layernorm.weight", (h,)
            yield f"{stem}.mlp.gate_proj.weight", (f, h)
            yield f"{stem}.mlp.up_proj.weight", (f, h)
            yield f"{stem}.mlp.down_proj.weight", (h, f)
        yield "model.norm.weight", (h,)
        yield "lm_head.weight", (self.vocab, h)

    def config(self, dtype: Dtype) -> dict[str, object]:
        """``config.json`` of a LlamaForCausalLM of these sizes."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "num_hidden_layers": self.layers,
            "vocab_size": self.vocab,
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "torch_dtype": dtype,
        }


SHAPES = {
    "tiny": Shape(16, 8, 2, 1, 3, 12),
    "quick": Shape(768, 2048, 12, 4, 6, 8000),
    "half": Shape(1024, 4096, 16, 4, 8, 8000),
    "real": Shape(1536, 6144, 16, 4, 14, 16000),
}


def values(shape: Shape, seed: int) -> Iterator[tuple[str, list[Tensor]]]:
    """Each tensor of the base and of every fine-tune, in float32."""
    for number, (name, size) in enumerate(shape.tensors()):
        random = np.random.Generator(np.random.PCG64([seed, number]))
        norm = len(size) == 1
        base = random.standard_normal(size, dtype=np.float32) * WEIGHT + float(norm)
        shared = random.standard_normal(size, dtype=np.float32) * SHARED
        tuned = [
            base + shared + random.standard_normal(size, dtype=np.float32) * OWN for _ in range(FINE_TUNES)
        ]
        yield name, [torch.from_numpy(array) for array in (base, *tuned)]


def write_checkpoints(folder: Path, shape: Shape, *, dtype: Dtype = "bfloat16", seed: int = 0) -> list[Path]:
    """Write ``base``, ``tuned-0``, ``tuned-1``, ``tuned-2`` below ``folder``; their paths in that order."""
    paths = [folder / name for name in ("base", *(f"tuned-{index}" for index in range(FINE_TUNES)))]
    for path in paths:
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(shape.config(dtype), indent=1))
        _write_tokenizer(path, shape.vocab)
    total = sum(int(np.prod(size)) for _, size in shape.tensors())
    limit = -(-total // shape.shards)
    held: list[dict[str, Tensor]] = [{} for _ in paths]
    weight_map: dict[str, str] = {}
    size, shard = 0, 1

    def flush() -> None:
        file = f"model-{shard:05d}-of-{shape.shards:05d}.safetensors"
        for path, tensors in zip(paths, held, strict=True):
            save_file(tensors, path / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(held[0], file))
        for tensors in held:
            tensors.clear()

    for name, tensors in values(shape, seed):
        for kept, tensor in zip(held, tensors, strict=True):
            kept[name] = tensor.to(getattr(torch, dtype))
        size += tensors[0].numel()
        if size >= shard * limit and shard < shape.shards:
            flush()
            shard += 1
    flush()
    bytes_each = total * torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    index = {"metadata": {"total_size": bytes_each}, "weight_map": weight_map}
    for path in paths:
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return paths


def checkpoint_set(scratch: Path, name: str, *, dtype: Dtype = "bfloat16") -> list[Path]:
    """The folders of a size below ``scratch``; made on first use, atomically, and kept."""
    folder = scratch / "checkpoints" / f"{name}-{dtype}"
    if not folder.exists():
        part = folder.with_name(f".{folder.name}.part")
        write_checkpoints(part, SHAPES[name], dtype=dtype)
        (part / "shape.json").write_text(json.dumps(asdict(SHAPES[name])))
        part.rename(folder)
    return [folder / name for name in ("base", *(f"tuned-{index}" for index in range(FINE_TUNES)))]


def _write_tokenizer(path: Path, vocab: int) -> None:
    """A byte-pair tokenizer without merges whose vocabulary fills every row of the embedding."""
    special = ["<unk>", "<s>", "</s>"]
    tokens = special + [f"t{index}" for index in range(vocab - len(special))]
    added = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
        for i, token in enumerate(special)
    ]
    model = {"type": "BPE", "unk_token": "<unk>", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": []}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": model,
    }
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    config |= {"bos_token": "<s>", "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
