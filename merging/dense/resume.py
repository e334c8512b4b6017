"""Merges that survive their process: finished shards are kept beside the output and not made again.

An attempt is a hidden folder beside the output, named after everything that decides the bytes of the result
(recipe, contents of the inputs, layout of the shards, versions). Each finished shard is a synchronised file
with a line in the journal that tells its sha256 and what was measured; what the passes over the whole model
found is kept too. Whoever runs the same merge to the same place next takes over what is there; another merge
to that place removes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from merging.dense.plan import DensePlan
from merging.dense.runner import ShardResult
from merging.dense.settled import Settled
from merging.errors import MergeError, MergeFailure
from merging.formats.files import sha256_of
from merging.formats.result_dir import ResultDirectory, lock_folder
from merging.report import versions

JOURNAL = "journal.jsonl"
SETTLED = "settled.json"


def attempt_key(plan: DensePlan) -> str:
    """A digest of everything that decides the bytes of the shards."""
    layout = [[shard.file, [job.name for job in shard.jobs]] for shard in plan.shards]
    data = json.dumps([plan.digest, layout, versions()], sort_keys=True)
    return hashlib.sha256(data.encode()).hexdigest()


class Attempt(ResultDirectory):
    """Context manager: ``path`` collects finished shards and becomes the output on success.

    A process that dies, or an error from outside (a full disk, an interrupt), leaves the folder for the next
    attempt; a deliberate error (bad input, cancelled) removes it. Raises ``output_exists`` like
    :class:`ResultDirectory`, and :class:`MergeFailure` ``merge_in_progress`` if another process is at it.
    """

    def __init__(self, out: str | Path, key: str, overwrite: bool = False) -> None:
        super().__init__(out, overwrite)
        self._prefix = f".{self.out.name}.attempt-"
        self.path = self.out.with_name(self._prefix + key[:24])
        self.surplus: Sequence[str] = ()
        """Files that are no part of the result; until it is complete they save work."""

    def __enter__(self) -> Self:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self._recover()
        self._clear_others()
        old = self.path.with_name(self.path.name + ".old")
        if old.is_dir() and not self.out.exists():
            old.rename(self.out)  # killed between the two renames of an overwrite
        self.check()
        self.path.mkdir(exist_ok=True)
        self._handle = lock_folder(self.path)
        if self._handle is None:
            raise MergeFailure(
                "merge_in_progress",
                f"another process is writing {self.out.name}",
                remedy="Wait for it, or choose another folder",
                where={"file": str(self.out)},
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._publish()
            elif issubclass(kind, MergeError):
                shutil.rmtree(self.path, ignore_errors=True)
        finally:
            if self._handle is not None:
                os.close(self._handle)
                self._handle = None

    def finished(self, count: int) -> list[ShardResult]:
        """The shards of earlier attempts whose files still have the bytes that the journal states."""
        journal = self.path / JOURNAL
        found: dict[int, ShardResult] = {}
        if journal.exists():
            data = journal.read_bytes()
            whole = data.rfind(b"\n") + 1  # the last line may have been cut short
            os.truncate(journal, whole)
            for line in data[:whole].splitlines():
                part = _noted(line)
                if part is not None and 0 <= part.index < count and self._intact(part):
                    found[part.index] = part
        parts = [found[index] for index in sorted(found)]
        self._clear(parts)
        return parts

    def note(self, part: ShardResult) -> None:
        """Write a finished shard into the journal, to disk."""
        with (self.path / JOURNAL).open("ab") as journal:
            journal.write(json.dumps(part.to_dict()).encode() + b"\n")
            journal.flush()
            os.fsync(journal.fileno())
        handle = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def settled(self) -> Settled | None:
        """What the passes over the whole model found, if an earlier attempt made them."""
        try:
            return Settled.of(json.loads((self.path / SETTLED).read_bytes()))
        except (OSError, ValueError, KeyError, TypeError):  # none, or cut short
            return None

    def settle(self, found: Settled) -> None:
        """Keep what the passes found, to disk."""
        with (self.path / SETTLED).open("wb") as file:
            file.write(json.dumps(found.to_dict()).encode())
            file.flush()
            os.fsync(file.fileno())

    def _ready(self) -> None:
        """As late as possible, for until then whoever comes next goes on from here."""
        for name in (*self.surplus, SETTLED, JOURNAL):
            (self.path / name).unlink(missing_ok=True)

    def _intact(self, part: ShardResult) -> bool:
        path = self.path / part.file
        return path.is_file() and path.stat().st_size == part.nbytes and sha256_of(path) == part.sha256

    def _clear(self, parts: Sequence[ShardResult]) -> None:
        """Remove what no finished shard owns."""
        names = {JOURNAL, SETTLED, *(part.file for part in parts)}
        for entry in list(self.path.iterdir()):
            if entry.name not in names:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def _clear_others(self) -> None:
        """Remove attempts at other results for the same place that nobody works on."""
        for entry in sorted(self.out.parent.iterdir()):
            if not entry.name.startswith(self._prefix) or entry == self.path or entry.suffix == ".old":
                continue
            handle = lock_folder(entry)
            if handle is not None:
                shutil.rmtree(entry, ignore_errors=True)
                os.close(handle)


def _noted(line: bytes) -> ShardResult | None:
    """A line of the journal; ``None`` for one that a failing disk or a lost power supply left."""
    try:
        return ShardResult.of(json.loads(line))
    except (ValueError, TypeError, KeyError):
        return None
