"""Unlabeled samples: JSON lines with ``text`` (and ``text_pair``), or safetensors. No torch.

A row of JSON lines may also name its ``task`` and carry a ``label``; labels are never read. A tensor
file holds one row per sample in each of ``input_ids``, ``attention_mask``, ``token_type_ids``,
``pixel_values``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from merging.errors import InputError
from merging.formats.files import open_regular, read_at
from merging.formats.guard import Header, check_safetensors
from merging.formats.tensors import TensorFile

MAX_TEXT_BYTES = 256 << 20
MAX_TENSOR_BYTES = 4 << 30
MAX_ROWS = 1_000_000
MAX_LINES = 2 * MAX_ROWS
"""With the empty ones."""
MAX_ROW_CHARACTERS = 200_000
KEYS = ("text", "text_pair", "task", "label")
TENSORS = {"input_ids": 2, "attention_mask": 2, "token_type_ids": 2, "pixel_values": 4}
_INTEGERS = ("I64", "I32", "I16", "U8", "U16", "U32", "BOOL")
_FLOATS = ("F32", "F16", "BF16")

Text = tuple[str, str | None]


@dataclass(frozen=True)
class Dataset:
    """The samples of one task: ``texts`` (each with its partner or None), or ``tensors``."""

    path: Path
    digest: str
    texts: tuple[Text, ...] = ()
    tensors: TensorFile | None = None

    def __len__(self) -> int:
        if self.tensors is None:
            return len(self.texts)
        return next(iter(self.tensors.header.tensors.values())).shape[0]

    @cached_property
    def is_images(self) -> bool:
        """Whether the samples are pictures."""
        return self.tensors is not None and "pixel_values" in self.tensors.header.tensors

    def width(self) -> int | None:
        """Tokens per sample as stored, or None where a tokenizer decides."""
        if self.tensors is None or self.is_images:
            return None
        return self.tensors.header.tensors["input_ids"].shape[1]


def find_data(path: Path) -> Path:
    """The file of a data set: ``path`` itself, or the one data file in that folder."""
    if not path.is_dir():
        if path.suffix not in (".jsonl", ".safetensors"):
            _fail(
                "dataset_not_found", path, "is neither .jsonl nor .safetensors", "Give JSON lines or tensors."
            )
        return path
    names = sorted(entry.name for entry in path.iterdir() if entry.suffix in (".jsonl", ".safetensors"))
    if len(names) != 1:
        _fail(
            "dataset_not_found",
            path,
            f"holds {len(names)} data files",
            "Name the .jsonl or .safetensors file.",
        )
    return path / names[0]


def open_dataset(path: str | Path) -> Dataset:
    """The data set at ``path``. Raises :class:`InputError` with a ``dataset_*`` code that names the row.

    Rows that name a task are refused here; see :func:`open_shared`.
    """
    path = find_data(Path(path))
    if path.suffix == ".safetensors":
        return _tensors(path)
    digest, rows = _rows(path)
    for number, row in enumerate(rows, 1):
        if row.get("task") is not None:
            _fail(
                "dataset_names_tasks",
                path,
                f"line {number} names a task, but the file belongs to one model",
                "Give the file as calibration.data, or leave `task` out.",
            )
    return Dataset(path, digest, tuple((row["text"], row.get("text_pair")) for row in rows))


def open_shared(path: str | Path, tasks: Sequence[str]) -> dict[str, Dataset]:
    """The data sets of one file for several tasks; every row names one of ``tasks``.

    Raises ``dataset_unknown_task`` and ``dataset_without_task`` beside the codes of :func:`open_dataset`.
    """
    path = find_data(Path(path))
    if path.suffix != ".jsonl":
        _fail("dataset_without_task", path, "cannot name tasks", "Give JSON lines, or one file per model.")
    digest, rows = _rows(path)
    found: dict[str, list[Text]] = {task: [] for task in tasks}
    for number, row in enumerate(rows, 1):
        task = row.get("task")
        if task is None:
            _fail("dataset_without_task", path, f"line {number} names no task", "Every row needs a `task`.")
        if task not in found:
            _fail(
                "dataset_unknown_task",
                path,
                f"line {number} is for the task {task[:64]!r}, which is not in the recipe",
                f"The tasks are: {', '.join(tasks)}.",
            )
        found[task].append((row["text"], row.get("text_pair")))
    return {
        task: Dataset(path, hashlib.sha256(f"{digest} {task}".encode()).hexdigest(), tuple(texts))
        for task, texts in found.items()
    }


def count_rows(path: Path) -> int:
    """How many rows a file of JSON lines has, for one task or several; all are checked."""
    return sum(1 for _ in _each(path, _read(path)))


def _rows(path: Path) -> tuple[str, list[dict[str, Any]]]:
    data = _read(path)
    rows = list(_each(path, data))
    return hashlib.sha256(data).hexdigest(), rows


def _each(path: Path, data: bytes) -> Iterator[dict[str, Any]]:
    """The rows, one at a time: as objects, many short lines would take far more memory than the file."""
    found, number, start = 0, 0, 0
    while start < len(data):
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        number += 1
        if number > MAX_LINES:
            _fail("dataset_too_large", path, f"has more than {MAX_LINES} lines", None)
        try:
            line = data[start:end].decode("utf-8")
        except UnicodeDecodeError as error:
            _fail("dataset_not_text", path, f"is not UTF-8 at byte {start + error.start}", None)
        start = end + 1
        if not line.strip():
            continue
        found += 1
        if found > MAX_ROWS:
            _fail("dataset_too_large", path, f"has more than {MAX_ROWS} rows", None)
        yield _row(path, number, line)
    if not found:
        _fail("dataset_empty", path, "has no rows", None)


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    def wrong(what: str) -> NoReturn:
        _fail(
            "dataset_row_invalid",
            path,
            f"line {number} {what}",
            f"A row is an object with: {', '.join(KEYS)}.",
        )

    if len(line) > MAX_ROW_CHARACTERS:
        wrong(f"has more than {MAX_ROW_CHARACTERS} characters")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        wrong("is not JSON")
    if not isinstance(row, dict):
        wrong("is not an object")
    for key in row:
        if key not in KEYS:
            wrong(f"has the unknown key {key[:64]!r}")
    if not isinstance(row.get("text"), str) or not row["text"]:
        wrong("has no text")
    for key in ("text_pair", "task"):
        if not isinstance(row.get(key), str | None):
            wrong(f"has a {key} that is not text")
    return row


def _read(path: Path) -> bytes:
    try:
        with open_regular(path) as (handle, status):
            if status.st_size > MAX_TEXT_BYTES:
                _fail(
                    "dataset_too_large",
                    path,
                    f"has {status.st_size} bytes, the limit is {MAX_TEXT_BYTES}",
                    None,
                )
            return read_at(handle, status.st_size, 0)
    except OSError as error:
        _fail("dataset_not_found", path, f"cannot be read ({error.strerror})", None)


def _tensors(path: Path) -> Dataset:
    if not path.exists():
        _fail("dataset_not_found", path, "does not exist", None)
    header = check_safetensors(path)
    if header.size > MAX_TENSOR_BYTES:
        _fail("dataset_too_large", path, f"has {header.size} bytes, the limit is {MAX_TENSOR_BYTES}", None)
    _check_tensors(path, header)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Dataset(path, digest, (), TensorFile(path, header))


def _check_tensors(path: Path, header: Header) -> None:
    shapes = {name: info.shape for name, info in header.tensors.items()}
    for name, info in header.tensors.items():
        if name not in TENSORS:
            _fail(
                "dataset_tensors_invalid",
                path,
                f"holds an unknown tensor {name[:64]!r}",
                f"It may hold: {', '.join(TENSORS)}.",
            )
        kinds = _FLOATS if name == "pixel_values" else _INTEGERS
        if info.dtype not in kinds or len(info.shape) != TENSORS[name]:
            _fail(
                "dataset_tensors_invalid",
                path,
                f"{name} has the type {info.dtype} and shape {info.shape}",
                None,
            )
    if ("input_ids" in shapes) == ("pixel_values" in shapes):
        _fail("dataset_tensors_invalid", path, "must hold either input_ids or pixel_values", None)
    tokens = {name: shape for name, shape in shapes.items() if name != "pixel_values"}
    if len(set(tokens.values())) > 1 or ("pixel_values" in shapes and tokens):
        _fail("dataset_tensors_invalid", path, f"tensors of different shapes: {shapes}", None)
    if min(next(iter(shapes.values()))) == 0:
        _fail("dataset_empty", path, "has no samples", None)


def _fail(code: str, path: Path, what: str, remedy: str | None) -> NoReturn:
    raise InputError(code, f"data set {path.name}: {what}", remedy=remedy, where={"file": path.name})
