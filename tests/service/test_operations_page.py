"""docs/operations.md names the metrics and settings that there are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx

from service.settings import Settings

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")


def test_its_metrics_are_those_of_a_service(http: httpx.Client, merged: dict[str, Any]) -> None:
    families = set(re.findall(r"^# TYPE (\S+)", http.get("/metrics").text, re.MULTILINE))
    named = {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"\bmerganser_[a-z_]+\b", PAGE)}
    assert named == families


def test_its_settings_exist() -> None:
    named = set(re.findall(r"\bMERGANSER_[A-Z0-9_]+\b", PAGE))
    assert named <= {f"MERGANSER_{name.upper()}" for name in Settings.model_fields}


def test_labels_of_alerts_are_those_of_their_metrics(http: httpx.Client, merged: dict[str, Any]) -> None:
    text = http.get("/metrics").text
    for metric, label in re.findall(r"(merganser_[a-z_]+)\{(\w+)=", PAGE):
        if not metric.startswith("merganser_merge_failures"):  # nothing has failed here
            assert re.search(rf"^{metric}\{{[^}}]*\b{label}=", text, re.MULTILINE), (metric, label)
