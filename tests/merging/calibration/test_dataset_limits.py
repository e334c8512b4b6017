"""Counting the samples of an upload takes little more memory than its bytes, whatever its lines are."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from merging.calibration import dataset
from merging.calibration.dataset import count_rows, open_dataset
from merging.errors import InputError


@pytest.mark.parametrize("line", ['{"text": "a"}', "", " "], ids=["rows", "empty", "blank"])
def test_short_lines_take_no_more_memory_than_the_file(tmp_path: Path, line: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "first"}\n' + f"{line}\n" * 100_000)
    tracemalloc.start()
    try:
        count_rows(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < path.stat().st_size + (1 << 20)


def test_lines_are_limited_as_rows_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "MAX_LINES", 3)
    monkeypatch.setattr(dataset, "MAX_ROWS", 2)
    path = tmp_path / "data.jsonl"
    row = '{"text": "a"}\n'
    for content, outcome in ((row + "\n" + row, 2), (row * 3, None), ("\n\n\n" + row, None)):
        path.write_text(content)
        if outcome is None:
            with pytest.raises(InputError) as caught:
                count_rows(path)
            assert caught.value.code == "dataset_too_large"
        else:
            assert count_rows(path) == outcome


def test_the_last_line_needs_no_end_and_bytes_are_told(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "é"}\n\n{"text": "b"}', encoding="utf-8")
    assert open_dataset(path).texts == (("é", None), ("b", None))
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(InputError, match="UTF-8 at byte 24"):
        count_rows(path)
