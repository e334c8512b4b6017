"""One tensor of a dense merge: its name, shape and dtype, and what the models give to it. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

FLOATS = ("F16", "BF16", "F32", "F64")
BUFFERS = (".rotary_emb.inv_freq", ".position_ids", ".masked_bias", ".attn.bias")
"""Buffers that some versions of a library save and others do not; they are never merged, nor rounded."""

InputKind = Literal["full", "delta", "lowrank"]


@dataclass(frozen=True, slots=True)
class Input:
    """What a model gives to a tensor: the whole tensor, a difference, or the module of an adapter."""

    model: int
    key: str
    kind: InputKind


@dataclass(frozen=True, slots=True)
class TensorJob:
    """One tensor of the result. Without ``inputs`` it is copied from the base.

    ``dtype`` is that of the base, ``wide`` says that some input is stored in float64, in which the tensor is
    then computed.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    inputs: tuple[Input, ...]
    in_base: bool
    wide: bool = False

    @property
    def tasks(self) -> tuple[int, ...]:
        """The models that take part."""
        return tuple(entry.model for entry in self.inputs)

    @property
    def matrix(self) -> tuple[int, int]:
        """The tensor as a matrix: rows are out features; vectors are one row; experts follow each other."""
        shape = self.shape
        if len(shape) < 2:
            return 1, math.prod(shape)
        if len(shape) == 3:
            return shape[0] * shape[1], shape[2]
        return shape[0], math.prod(shape[1:])

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


_EMBEDDINGS = (
    "embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "shared", "embeddings",
    "token_embedding", "wpe", "embed_positions", "position_embeddings", "token_type_embeddings",
)  # fmt: skip


def is_embedding(name: str) -> bool:
    """Whether a tensor is by its name the table of an embedding."""
    module = name.removesuffix(".weight")
    return module != name and module.rpartition(".")[2] in _EMBEDDINGS


def is_vocabulary(name: str) -> bool:
    """Whether the rows of a tensor are by its name the tokens of a vocabulary."""
    return is_embedding(name) or name.endswith(("lm_head.weight", "embed_out.weight"))
