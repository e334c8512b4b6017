"""The tensors of one model, in one file or in shards: headers are known, data is read in pieces. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from merging.formats.files import sha256_of
from merging.formats.guard import TensorInfo, check_safetensors
from merging.formats.shards import check_against, index_error, read_index
from merging.formats.source import check_inside
from merging.formats.tensors import TensorFile

Kind = Literal["checkpoint", "task_vector"]


class TensorSet:
    """An opened checkpoint or task vector.

    ``infos`` maps every tensor to its dtype and shape, in the order in which the data lies on disk (shard by
    shard). ``config`` is the content of ``config.json``, if there is one. ``digest`` identifies the content.
    """

    def __init__(
        self,
        *,
        label: str,
        path: Path,
        kind: Kind,
        files: tuple[TensorFile, ...],
        config: Mapping[str, Any] | None = None,
        config_path: Path | None = None,
        warnings: tuple[str, ...] = (),
    ) -> None:
        self.label = label
        self.path = path
        self.format = kind
        self.config = config
        self.warnings = warnings
        self._files = files
        self._config_path = config_path
        self._home: dict[str, TensorFile] = {}
        infos: dict[str, TensorInfo] = {}
        for file in files:
            for name, info in sorted(file.header.tensors.items(), key=lambda item: item[1].begin):
                self._home[name] = file
                infos[name] = info
        self.infos: Mapping[str, TensorInfo] = MappingProxyType(infos)

    @property
    def base_model(self) -> str | None:
        """The base that the configuration of the model names; checkpoints name none."""
        return None

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) over the digests of the weight files and of ``config.json``; reads everything."""
        return self.digest_by(sha256_of)

    def digest_by(self, sha256: Callable[[Path], str]) -> str:
        """:attr:`digest` for a caller who knows the sha256 (hex) of each file."""
        total = hashlib.sha256()
        paths = [file.path for file in self._files]
        if self._config_path is not None:
            paths.append(self._config_path)
        for path in paths:
            name = path.name if len(self._files) > 1 or path == self._config_path else "weights"
            total.update(f"{sha256(path)}  {name}\n".encode())
        return total.hexdigest()

    @property
    def metadata(self) -> Mapping[str, str]:
        """The string metadata of the first weights file."""
        return self._files[0].header.metadata

    def read_into(self, name: str, view: memoryview, start: int) -> None:
        """Fill ``view`` with the bytes of a tensor from byte ``start`` on. Any thread may call."""
        self._home[name].read_into(name, view, start)

    def file_of(self, name: str) -> str:
        """The name of the file that holds a tensor; for messages."""
        return self._home[name].path.name

    def close(self) -> None:
        """Close the weight files."""
        for file in self._files:
            file.close()


def open_files(folder: Path, stem: str) -> tuple[TensorFile, ...]:
    """The weight files of a folder: by ``<stem>.safetensors.index.json``, or ``<stem>.safetensors`` alone.

    Every header is checked, and the index against them. Raises :class:`InputError`: ``checkpoint_index``,
    ``link_outside_folder``, ``safetensors_*``.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if not index.exists():
        return (open_file(folder, f"{stem}.safetensors"),)
    check_inside(folder, index)
    weight_map = read_index(index)
    single = f"{stem}.safetensors"
    if (folder / single).exists() and single not in weight_map.values():
        raise index_error(
            index.name,
            f"stands beside {single}, which it does not name; which of them is the model cannot be told",
            remedy="Remove the one that is out of date",
        )
    files = tuple(open_file(folder, name) for name in sorted(set(weight_map.values())))
    held: dict[str, list[str]] = {}
    for file in files:
        for tensor in file.header.tensors:
            held.setdefault(tensor, []).append(file.path.name)
    check_against(index.name, weight_map, held)
    return files


def open_file(folder: Path, name: str) -> TensorFile:
    """One checked weight file of a folder."""
    path = folder / name
    check_inside(folder, path)
    return TensorFile(path, check_safetensors(path))
