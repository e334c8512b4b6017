"""Samples ready for the model: token ids or pixels of the chosen rows of a data set, cut into batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merging.calibration.base import Base, _quiet, transformers
from merging.calibration.dataset import Dataset
from merging.errors import InputError
from merging.rules import task_generator


@dataclass(frozen=True)
class Samples:
    """The chosen samples of one task.

    ``rows`` holds one mapping per sample for texts (lists of ids), ``tensors`` the rows of ready tensors
    otherwise.
    """

    rows: tuple[dict[str, list[int]], ...]
    tensors: Mapping[str, Tensor]
    padding: int

    def __len__(self) -> int:
        return len(self.rows) or len(next(iter(self.tensors.values())))

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Inputs of the model for some samples, padded to the longest of them."""
        if self.tensors:
            picked = {key: value[list(indices)] for key, value in self.tensors.items()}
            mask = picked.get("attention_mask")
            if mask is None:
                return picked
            width = max(1, int(mask.any(0).nonzero().max()) + 1) if bool(mask.any()) else mask.shape[1]
            return {key: value[:, :width].long() for key, value in picked.items()}
        rows = [self.rows[i] for i in indices]
        width = max(len(row["input_ids"]) for row in rows)
        found = {}
        for key in rows[0]:
            fill = self.padding if key == "input_ids" else 0
            found[key] = torch.tensor([row[key] + [fill] * (width - len(row[key])) for row in rows])
        found["attention_mask"] = torch.tensor(
            [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
        )
        return found


def draw(dataset: Dataset, count: int, seed: int) -> list[int]:
    """Which rows are used: ``count`` of them, drawn by the seed and the content of the data."""
    order = torch.randperm(len(dataset), generator=task_generator(seed, dataset.digest, "samples"))
    chosen: list[int] = order[:count].tolist()
    return chosen


def load_tokenizer(folder: Path, base: Base) -> Any:
    """The tokenizer in ``folder``. Raises ``tokenizer_invalid``, ``tokenizer_mismatch``."""
    library = transformers()
    where = {"file": folder.name, "field": "calibration.tokenizer"}
    with _quiet(library):
        try:
            tokenizer = library.AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # the library raises whatever its parsers raise
            problem = " ".join(str(error).split())[:300]
            raise InputError(
                "tokenizer_invalid",
                f"the tokenizer in {folder.name} cannot be loaded: {problem}",
                where=where,
            ) from error
    vocabulary = base.vocabulary
    if vocabulary is not None and len(tokenizer) > vocabulary:
        raise InputError(
            "tokenizer_mismatch",
            f"the tokenizer in {folder.name} has {len(tokenizer)} tokens, the base model {vocabulary}",
            remedy="Use the tokenizer of the base model.",
            where=where,
        )
    padding, own = base.padding, tokenizer.pad_token_id
    if padding is not None and own is not None and padding != own:
        raise InputError(
            "tokenizer_mismatch",
            f"the tokenizer in {folder.name} pads with the token {own}, the base model with {padding}",
            remedy="Use the tokenizer of the base model.",
            where=where,
        )
    return tokenizer


def encode(
    label: str, dataset: Dataset, chosen: Sequence[int], tokenizer: Any, base: Base, max_length: int
) -> Samples:
    """The chosen rows as inputs of the base model.

    Raises ``token_out_of_range`` (a wrong tokenizer), ``sequence_too_long``, ``samples_not_finite``.
    """
    if dataset.tensors is not None:
        samples = _stored(dataset, chosen)
    else:
        samples = _tokenized(dataset, chosen, tokenizer, min(max_length, base.positions or max_length))
    _check(label, dataset, samples, base)
    return samples


def _stored(dataset: Dataset, chosen: Sequence[int]) -> Samples:
    assert dataset.tensors is not None
    rows = list(chosen)
    tensors = {}
    for key in sorted(dataset.tensors.header.tensors):
        tensor = dataset.tensors.tensor(key)[rows]
        tensors[key] = tensor.float() if tensor.is_floating_point() else tensor.long()
    if "input_ids" in tensors and "attention_mask" not in tensors:
        tensors["attention_mask"] = torch.ones_like(tensors["input_ids"])
    return Samples((), tensors, 0)


def _tokenized(dataset: Dataset, chosen: Sequence[int], tokenizer: Any, length: int) -> Samples:
    rows = []
    for index in chosen:
        text, pair = dataset.texts[index]
        coded = tokenizer(text, pair, truncation=True, max_length=length)
        rows.append({key: list(coded[key]) for key in ("input_ids", "token_type_ids") if key in coded})
    return Samples(tuple(rows), {}, tokenizer.pad_token_id or 0)


def _check(label: str, dataset: Dataset, samples: Samples, base: Base) -> None:
    where = {"model": label, "file": dataset.path.name}
    if dataset.is_images:
        if not bool(torch.isfinite(samples.tensors["pixel_values"]).all()):
            raise InputError(
                "samples_not_finite", f"the samples of {label} hold NaN or infinite values", where=where
            )
        return
    if samples.tensors:
        ids = samples.tensors["input_ids"]
        low, high, width = int(ids.min()), int(ids.max()), ids.shape[1]
    else:
        low = min(min(row["input_ids"]) for row in samples.rows)
        high = max(max(row["input_ids"]) for row in samples.rows)
        width = max(len(row["input_ids"]) for row in samples.rows)
    vocabulary = base.vocabulary
    outlier = low if low < 0 else high
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        raise InputError(
            "token_out_of_range",
            f"the samples of {label} hold the token {outlier}; the base model has {vocabulary}",
            remedy="Use the tokenizer of the base model.",
            where=where,
        )
    if base.positions is not None and width > base.positions:
        raise InputError(
            "sequence_too_long",
            f"the samples of {label} have up to {width} tokens; the base model takes {base.positions}",
            where=where,
        )
