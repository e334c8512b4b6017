"""Write the files of a checkpoint: shards filled in any order, and what goes beside the weights."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from merging.errors import InputError
from merging.formats.files import open_regular, read_at
from merging.formats.source import check_inside
from merging.formats.writer import TensorSpec, build_header

COMPANIONS = (
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json",
    "merges.txt", "normalizer.json", "preprocessor_config.json", "processor_config.json",
    "sentencepiece.bpe.model", "sentencepiece.model", "source.spm", "special_tokens_map.json", "spiece.model",
    "spm.model", "target.spm", "tekken.json", "tokenizer.json", "tokenizer.model", "tokenizer.model.v3",
    "tokenizer_config.json", "video_preprocessor_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip
"""What is copied from the base beside ``config.json``; never code."""

OF_THE_MODEL = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json",
)  # fmt: skip
"""Those of them that do not belong to the tokenizer."""

MAX_COMPANION_BYTES = 256 << 20
_CHUNK = 8 << 20


class ShardWriter:
    """A safetensors file of known tensors, whose data may come in any order and from several threads.

    A context manager: after an error the file does not exist. :meth:`finish` synchronises it to disk and
    returns its sha256 (hex).
    """

    def __init__(self, path: Path, specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> None:
        head, offsets = build_header(specs, metadata)
        self._path = path
        self._starts = {spec.name: len(head) + offset for spec, offset in zip(specs, offsets, strict=True)}
        self._sizes = {spec.name: spec.nbytes for spec in specs}
        self.nbytes = len(head) + sum(self._sizes.values())
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o644)
        self._write_at(memoryview(head), 0)

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Write ``data`` from byte ``start`` of a tensor on."""
        if start < 0 or start + len(data) > self._sizes[name]:
            raise ValueError(f"{name} has no bytes {start}..{start + len(data)}")
        self._write_at(data, self._starts[name] + start)

    def finish(self) -> str:
        """Everything to disk; the sha256 of the file."""
        os.ftruncate(self._handle, self.nbytes)
        os.fsync(self._handle)
        digest = hashlib.sha256()
        position = 0
        buffer = bytearray(_CHUNK)
        while count := os.preadv(self._handle, [buffer], position):
            digest.update(memoryview(buffer)[:count])
            position += count
        os.close(self._handle)
        self._handle = -1
        return digest.hexdigest()

    def _write_at(self, data: memoryview, offset: int) -> None:
        while data:
            count = os.pwrite(self._handle, data, offset)
            data = data[count:]
            offset += count

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
        if kind is not None:
            with suppress(OSError):
                self._path.unlink()


def copy_companions(
    base: Path, out: Path, *, tokenizer: Path | None = None
) -> tuple[dict[str, str], list[str]]:
    """Copy tokenizer and generation settings of a base folder; file names to sha256, and what was left.

    ``tokenizer`` is the folder of the tokenizer, if that is another. Only files of known names are taken, and
    no code. Raises ``link_outside_folder`` and ``companion_too_large``.
    """
    files: dict[str, str] = {}
    for name in COMPANIONS:
        folder = base if tokenizer is None or name in OF_THE_MODEL else tokenizer
        source = folder / name
        if not os.path.lexists(source):
            continue
        check_inside(folder, source)
        try:
            with open_regular(source) as (handle, status):
                if status.st_size > MAX_COMPANION_BYTES:
                    raise InputError(
                        "companion_too_large",
                        f"{name} of {folder.name} has {status.st_size} bytes; at most {MAX_COMPANION_BYTES}",
                        where={"file": name},
                    )
                data = read_at(handle, status.st_size, 0)
        except OSError:
            continue  # a folder of that name, for instance
        (out / name).write_bytes(data)
        files[name] = hashlib.sha256(data).hexdigest()
    return files, sorted(entry.name for entry in base.glob("*.py"))


def config_text(config: Mapping[str, Any], dtype: str | None) -> str:
    """The ``config.json`` of the result: that of the base without remote code, with a new dtype."""
    data = {key: value for key, value in config.items() if key != "auto_map"}
    if dtype is not None:
        for key in ("torch_dtype", "dtype"):
            if key in data:
                data[key] = dtype
        if "torch_dtype" not in data and "dtype" not in data:
            data["dtype"] = dtype
    return json.dumps(data, indent=2) + "\n"
