"""Server-sent events: complete, in order, and resumed exactly."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from service.client import Client
from tests.running import Up
from tests.service.conftest import Pair


def test_events_tell_the_whole_story(client: Client, merged: dict[str, Any]) -> None:
    found = list(client.events(merged["id"]))
    assert [data["state"] for _, kind, data in found if kind == "state"] == ["queued", "running", "succeeded"]
    assert found[-1][1] == "state"
    fractions = [data["progress"] for _, kind, data in found if kind == "progress"]
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0]
    assert fractions[-1] <= 1
    ids = [tuple(map(int, event_id.split("-"))) for event_id, _, _ in found]
    assert ids == sorted(set(ids))


def test_resuming_after_any_event_gives_exactly_the_rest(client: Client, merged: dict[str, Any]) -> None:
    found = list(client.events(merged["id"]))
    for index, (event_id, _, _) in enumerate(found):
        assert list(client.events(merged["id"], after=event_id)) == found[index + 1 :]


def test_live_events_are_those_that_are_kept(client: Client, pair: Pair) -> None:
    merge_id = client.submit(pair.recipe())["id"]
    live = list(client.events(merge_id))
    assert live[-1][2]["state"] == "succeeded"
    assert live == list(client.events(merge_id))


def test_wait_reports_each_event_once(client: Client, pair: Pair) -> None:
    seen: list[tuple[str, dict[str, Any]]] = []
    done = client.wait(client.submit(pair.recipe())["id"], lambda kind, data: seen.append((kind, data)))
    assert done["state"] == "succeeded"
    assert seen == [(kind, data) for _, kind, data in client.events(done["id"])]


def test_the_end_is_told_even_when_the_events_are_gone(up: Up, client: Client, pair: Pair) -> None:
    merge_id = client.wait(client.submit(pair.recipe())["id"])["id"]
    with up.redis() as redis:
        redis.delete(f"mg:local:merge:{merge_id}:events")
    assert [data["state"] for _, _, data in client.events(merge_id)] == ["succeeded"]


def test_the_stream_is_an_event_stream(http: httpx.Client, merged: dict[str, Any]) -> None:
    answer = http.get(merged["links"]["events"])
    assert answer.headers["content-type"].startswith("text/event-stream")
    first = answer.text.split("\n\n")[0].splitlines()
    assert first[0] == "event: state"
    assert first[1].startswith('data: {"state": "queued"')


@pytest.mark.parametrize("header", ["abc", "1", "1-2-3", "-1-0"])
def test_an_impossible_last_event_id_is_refused(
    http: httpx.Client, merged: dict[str, Any], header: str
) -> None:
    answer = http.get(merged["links"]["events"], headers={"Last-Event-ID": header})
    assert (answer.status_code, answer.json()["code"]) == (422, "request_invalid")
    assert answer.json()["errors"][0]["parameter"].lower() == "last-event-id"
