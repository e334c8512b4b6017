"""Which tensors a dense merge makes, and of what: inputs matched with the base, from headers alone. No torch.

The base decides the names, shapes and order of the result. A checkpoint must hold each of its tensors in the
same shape; a task vector or an adapter may hold some of them, for it adds nothing to the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from merging.dense.inputs import Model
from merging.dense.jobs import BUFFERS, FLOATS, Input, InputKind, TensorJob, is_embedding, is_vocabulary
from merging.errors import InputError
from merging.formats.adapter import Adapter
from merging.formats.conv1d import oriented
from merging.formats.guard import TensorInfo
from merging.formats.peft_keys import weight_key
from merging.formats.tensor_set import TensorSet

EXACT_NUMEL = 1 << 24
"""Spectral methods take matrices of more entries by their leading part, of rank ``REDUCED_RANK``."""

REDUCED_RANK = 512
_SHOWN = 10


@dataclass(frozen=True)
class Table:
    """The tensors of a merge and what was noticed on the way."""

    jobs: tuple[TensorJob, ...]
    warnings: tuple[str, ...]


def build_table(
    base: TensorSet | None,
    models: Sequence[Model],
    *,
    missing: Literal["error", "zero"],
    full_modules: str,
    allow_base_mismatch: bool = False,
) -> Table:
    """Match the models with the base.

    ``missing`` decides about tensors that a checkpoint lacks, ``full_modules`` about those that an adapter
    holds in full (``modules_to_save``): ``replace`` those of the base, ``drop``, or anything else to refuse
    them. Raises :class:`InputError`: ``tensor_shape_mismatch``, ``tensor_kind_mismatch``,
    ``missing_tensors``, ``extra_tensors``, ``architecture_mismatch``, ``unmatched_modules``,
    ``modules_to_save``, ``adapter_family_unsupported``.
    """
    return _Matcher(base, models, missing, full_modules, allow_base_mismatch).table()


class _Matcher:
    def __init__(
        self,
        base: TensorSet | None,
        models: Sequence[Model],
        missing: str,
        full_modules: str,
        allow_base_mismatch: bool,
    ) -> None:
        self.base = base
        self.models = models
        self.missing = missing
        self.full_modules = full_modules
        self.allow_base_mismatch = allow_base_mismatch
        self.warnings: list[str] = []
        self.frame = self._frame()
        self.inputs: dict[str, list[Input]] = {name: [] for name in self.frame}
        self.wide: dict[str, bool] = {}

    def table(self) -> Table:
        for index, model in enumerate(self.models):
            if isinstance(model, Adapter):
                self._adapter(index, model)
            else:
                self._tensors(index, model)
        in_base = self.base.infos if self.base is not None else {}
        jobs = tuple(
            TensorJob(
                name,
                info.shape,
                info.dtype,
                tuple(self.inputs[name]),
                name in in_base,
                info.dtype == "F64" or self.wide.get(name, False),
            )
            for name, info in self.frame.items()
        )
        return Table(jobs, tuple(self.warnings))

    def _frame(self) -> Mapping[str, TensorInfo]:
        """The tensors of the result: those of the base, or all that the models hold."""
        if self.base is None:
            found: dict[str, TensorInfo] = {}
            for model in self.models:
                if isinstance(model, TensorSet):
                    found.update({name: info for name, info in model.infos.items() if name not in found})
            return found
        frame = dict(self.base.infos)
        embedding, head = tied(self.base)
        if head is not None and head in frame and embedding in frame:
            del frame[head]
            self.warnings.append(
                f"{head} is tied to {embedding} by config.json; it is merged once and left out of the result"
            )
        return frame

    def _tensors(self, index: int, model: TensorSet) -> None:
        self._check_config(model)
        kind: InputKind = "full" if model.format == "checkpoint" else "delta"
        extra = [name for name in model.infos if name not in self.frame and not self._ignored(name, model)]
        if extra:
            raise self._listing(
                "extra_tensors", model, "holds tensors that the base does not have", extra,
                "Merge models of one architecture and vocabulary",
            )  # fmt: skip
        lacking = [
            name
            for name, info in self.frame.items()
            if name not in model.infos and info.dtype in FLOATS and not name.endswith(BUFFERS)
        ]
        if lacking and kind == "full" and self.missing == "error":
            raise self._listing(
                "missing_tensors", model, "lacks tensors of the base", lacking,
                "Set missing_modules: zero to take them as unchanged",
            )  # fmt: skip
        for name, info in model.infos.items():
            expected = self.frame.get(name)
            if expected is None:
                continue
            self._check_shape(model, name, info.shape, expected.shape)
            if (info.dtype in FLOATS) != (expected.dtype in FLOATS):
                raise InputError(
                    "tensor_kind_mismatch",
                    f"{model.label}: tensor {name} is {info.dtype}, in the base it is {expected.dtype}",
                    where={"model": model.label, "tensor": name},
                )
            if expected.dtype not in FLOATS or name.endswith(BUFFERS) or not math.prod(info.shape):
                continue  # copied from the base
            self.inputs[name].append(Input(index, name, kind))
            self.wide[name] = self.wide.get(name, False) or info.dtype == "F64"

    def _ignored(self, name: str, model: TensorSet) -> bool:
        if name.endswith(BUFFERS):
            return True
        for one in (self.base, model):
            if one is not None and name == tied(one)[1]:
                note = f"{model.label}: {name} is tied to the embedding and was not looked at"
                if note not in self.warnings:
                    self.warnings.append(note)
                return True
        return False

    def _check_config(self, model: TensorSet) -> None:
        if self.base is None or self.base.config is None or model.config is None:
            return
        ours, theirs = self.base.config.get("model_type"), model.config.get("model_type")
        if ours != theirs and not self.allow_base_mismatch:
            raise InputError(
                "architecture_mismatch",
                f"{model.label} is a {theirs!r} model, the base {self.base.label} a {ours!r} model",
                remedy="Set allow_base_mismatch: true if their weights have the same meaning all the same",
                where={"model": model.label, "field": "base_model"},
            )

    def _check_shape(
        self, model: Model, name: str, found: tuple[int, ...], expected: tuple[int, ...]
    ) -> None:
        if found == expected:
            return
        hint = "Merge models of one architecture"
        if len(found) == len(expected) == 2 and found[1:] == expected[1:] and is_vocabulary(name):
            hint = (
                f"The vocabularies have {found[0]} and {expected[0]} entries; give the models one tokenizer"
            )
        raise InputError(
            "tensor_shape_mismatch",
            f"{model.label}: tensor {name} has shape {list(found)}, in the base it is {list(expected)}",
            remedy=hint,
            where={"model": model.label, "tensor": name},
        )

    def _adapter(self, index: int, adapter: Adapter) -> None:
        if self.base is None:
            raise base_required("an adapter beside task vectors")
        experts = any(module.expert is not None for module in adapter.modules.values())
        if adapter.format != "peft" or experts:
            raise InputError(
                "adapter_family_unsupported",
                f"{adapter.label}: only PEFT adapters of layers can be merged with checkpoints",
                where={"model": adapter.label},
            )
        unmatched = []
        keys = {name: weight_key(name, adapter.modules) for name in adapter.modules}
        shapes = {name: self.frame[key].shape for name, key in keys.items() if key in self.frame}
        adapter.modules = oriented(adapter.modules, shapes, (self.base.config or {}).get("model_type"))
        for name, module in adapter.modules.items():
            key = keys[name]
            if key not in self.frame:
                unmatched.append(name)
                continue
            self._check_shape(adapter, key, module.weight_shape, self.frame[key].shape)
            if self.frame[key].dtype not in FLOATS:
                raise InputError(
                    "tensor_kind_mismatch",
                    f"{adapter.label}: {key} is {self.frame[key].dtype} in the base",
                    where={"model": adapter.label, "tensor": key},
                )
            self.inputs[key].append(Input(index, name, "lowrank"))
            self.wide[key] = self.wide.get(key, False) or module.dtype == "F64"
        if unmatched:
            raise self._listing(
                "unmatched_modules", adapter, "adapts modules that the base does not have", unmatched,
                "Give the base that the adapter was trained on; the names must agree",
            )  # fmt: skip
        if self.full_modules == "replace":
            self._replacements(index, adapter)
        elif adapter.full_tensors and self.full_modules != "drop":
            raise InputError(
                "modules_to_save",
                f"{adapter.label} holds fully trained tensors ({next(iter(adapter.full_tensors))}), which "
                "a merge with a base does not take",
                remedy="Set modules_to_save: drop to leave them out, or fold the adapter into a checkpoint",
                where={"model": adapter.label, "field": "modules_to_save"},
            )

    def _replacements(self, index: int, adapter: Adapter) -> None:
        """Tensors that an adapter holds in full stand for those of the base."""
        unknown = [name for name in adapter.full_tensors if name not in self.frame]
        if unknown:
            raise self._listing(
                "unmatched_modules", adapter, "holds tensors that the base does not have", unknown,
                "Give the base that the adapter was trained on; the names must agree",
            )  # fmt: skip
        for name, info in adapter.full_tensors.items():
            self._check_shape(adapter, name, info.shape, self.frame[name].shape)
            self.inputs[name].append(Input(index, name, "full"))

    def _listing(self, code: str, model: Model, what: str, names: Sequence[str], remedy: str) -> InputError:
        shown = ", ".join(names[:_SHOWN]) + (" ..." if len(names) > _SHOWN else "")
        return InputError(
            code,
            f"{model.label} {what}: {len(names)} of them ({shown})",
            remedy=remedy,
            where={"model": model.label, "tensor": names[0]},
        )


def base_required(what: str) -> InputError:
    """The error ``base_model_required``."""
    return InputError(
        "base_model_required",
        f"{what} needs a base model",
        remedy="Set `base_model` in the recipe to the folder of the base checkpoint.",
        where={"field": "base_model"},
    )


def tied(model: TensorSet) -> tuple[str | None, str | None]:
    """The names of the embedding and of the head that ``config.json`` ties to it; ``None`` if it does not."""
    if not (model.config or {}).get("tie_word_embeddings", False):
        return None, None
    embedding = next((name for name in model.infos if is_embedding(name) and "position" not in name), None)
    return embedding, "lm_head.weight"


def merged(jobs: Sequence[TensorJob]) -> Iterator[TensorJob]:
    """The jobs that are more than a copy."""
    return (job for job in jobs if job.inputs)
