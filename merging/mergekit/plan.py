"""A mergekit configuration with its models opened and checked: everything that headers can tell. No torch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from merging.errors import InputError
from merging.formats.checkpoint_in import open_checkpoint
from merging.formats.guard import ITEM_BYTES
from merging.formats.shards import shard_names
from merging.formats.tensor_set import TensorSet
from merging.mergekit.config import MergekitConfig
from merging.mergekit.reader import parse
from merging.mergekit.schedule import Output, Schedule, schedule
from merging.mergekit.tokenizers import tokenizer_folder

Resolve = Callable[[str], Path]
SHARD_BYTES = 2_000_000_000
CONFIG_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


@dataclass(frozen=True)
class Shard:
    """One output file and its tensors."""

    index: int
    file: str
    outputs: tuple[Output, ...]
    nbytes: int


@dataclass(frozen=True)
class MergekitPlan:
    """A checked merge. ``models`` are the opened checkpoints by their references.

    ``sums`` gives their content digests where the caller knows them; they are found by reading every file
    otherwise. ``tokenizer`` is the folder of the tokenizer, if that is not the donor's.
    """

    schedule: Schedule
    models: Mapping[str, TensorSet]
    shard_bytes: int = SHARD_BYTES
    sums: Mapping[str, str] = field(default_factory=dict)
    tokenizer: Path | None = None

    @property
    def config(self) -> MergekitConfig:
        return self.schedule.config

    @property
    def donor(self) -> TensorSet:
        """The model that gives ``config.json`` and what lies beside the weights."""
        return self.models[self.schedule.donor]

    def digest_of(self, model: str) -> str:
        """The content digest of a model."""
        return self.sums.get(model) or self.models[model].digest

    @cached_property
    def digest(self) -> str:
        """The digest of the configuration with the content of its models. Reads every file."""
        content = {model: self.digest_of(model) for model in self.models}
        text = json.dumps([_replaced(self.document, content)], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def document(self) -> dict[str, Any]:
        """The configuration as it is kept beside the result; it gives the same result again."""
        return {**self.config.document, "compat": "mergekit", "seed": self.config.seed}

    def to_yaml(self) -> str:
        """The document as YAML."""
        return yaml.safe_dump(self.document, sort_keys=False, allow_unicode=True)

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        """The output files, tensors in the order of the schedule."""
        groups: list[list[Output]] = []
        sizes: list[int] = []
        for output in self.schedule.outputs:
            size = math.prod(output.shape) * ITEM_BYTES[output.out_dtype]
            if not groups or (sizes[-1] and sizes[-1] + size > self.shard_bytes):
                groups.append([])
                sizes.append(0)
            groups[-1].append(output)
            sizes[-1] += size
        names = shard_names("model", len(groups))
        parts = zip(names, groups, sizes, strict=True)
        return tuple(Shard(i, name, tuple(outputs), size) for i, (name, outputs, size) in enumerate(parts))

    def model_config(self) -> dict[str, Any]:
        """``config.json`` of the result: that of the donor with the number of layers and the dtype."""
        config = {key: value for key, value in (self.donor.config or {}).items() if key != "auto_map"}
        if self.schedule.layers is not None:
            key = next((key for key in ("num_hidden_layers", "n_layer", "num_layers") if key in config), None)
            if key is not None:
                config[key] = self.schedule.layers
            if isinstance(config.get("layer_types"), list):
                config.pop("layer_types")
        stated = self.config.out_dtype or self.config.dtype
        if stated is not None:
            names = [key for key in ("torch_dtype", "dtype") if key in config] or ["dtype"]
            config.update(dict.fromkeys(names, CONFIG_DTYPES[stated]))
        return config


@contextmanager
def prepare(
    document: Mapping[str, Any],
    *,
    resolve: Resolve,
    name: str = "configuration",
    shard_bytes: int = SHARD_BYTES,
    sums: Mapping[str, str] | None = None,
) -> Iterator[MergekitPlan]:
    """Read a configuration, open its models and evaluate it; they are closed on exit.

    ``sums`` gives the content digests of models, as far as they are known. Raises :class:`InputError`:
    ``mergekit_*`` and what opening a checkpoint raises.
    """
    config = parse(document, name)
    models: dict[str, TensorSet] = {}
    try:
        for reference in config.models:
            models[reference] = open_checkpoint(_found(reference, resolve), label=reference)
        _check_architecture(models)
        folders = {model: found.path for model, found in models.items()}
        tokenizer = tokenizer_folder(config, folders, lambda reference: _found(reference, resolve))
        evaluated = schedule(config, {key: model.infos for key, model in models.items()})
        yield MergekitPlan(evaluated, models, shard_bytes, sums or {}, tokenizer)
    finally:
        for model in models.values():
            model.close()


def _found(reference: str, resolve: Resolve) -> Path:
    try:
        return resolve(reference)
    except InputError as error:
        if error.code != "model_not_found":
            raise
        raise InputError(
            error.code,
            error.message,
            remedy="Give a folder, or hf://org/name for a model of the Hugging Face Hub.",
            where=error.where,
        ) from error


def _check_architecture(models: Mapping[str, TensorSet]) -> None:
    kinds = {model: (found.config or {}).get("model_type") for model, found in models.items()}
    first, *others = kinds.items()
    for model, kind in others:
        if kind != first[1]:
            raise InputError(
                "mergekit_architecture",
                f"{model} is a {kind!r} model, {first[0]} a {first[1]!r} model",
                remedy="Merge models of one architecture.",
                where={"model": model},
            )


def _replaced(value: Any, content: Mapping[str, str]) -> Any:
    """The document with every reference to a model replaced by the digest of its content."""
    if isinstance(value, dict):
        return {key: _replaced(item, content) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, content) for item in value]
    return content.get(value, value) if isinstance(value, str) else value
